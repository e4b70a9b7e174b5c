"""The texts: words and their ids, what cannot be read, downloads; the columns and windows of a corpus; the stand-in."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_download import Site, site
from torch import Generator

from data import text
from data.bundle import Batch
from data.text import EMBEDDED, Corpus, Text, tokens
from tests.datafiles import error, md5, write_files

__all__ = ["site"]  # a fixture

# Spaces as in the official files; the validation text has no newline at its end, and the test text an empty line.
SMALL = {"train": " the cat <unk> sat \n the mat \n", "valid": "<unk> cat sat", "test": " \n mat the \n"}
IDS = {"train": [0, 1, 2, 3, 4, 0, 5, 4], "valid": [2, 1, 3, 4], "test": [4, 5, 0, 4]}  # the cat <unk> sat <eos> mat
PTB, WIKI = (replace(known, sizes={"train": 8, "valid": 4, "test": 4}, num_classes=6) for known in (text.ptb, text.wikitext2))
FILES, ZIP = {"ptb": "ptb/ptb.{}.txt", "wikitext2": "wikitext-2/wiki.{}.tokens"}, "wikitext-2-v1.zip"


def files(known: Text, **changed: str) -> dict[str, bytes]:
    """The small text as the files of this one."""
    return {FILES[known.name].format(split): content.encode() for split, content in (SMALL | changed).items()}


def zipped(members: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def another(known: Text) -> str:
    return f"so it is truncated or not {known.title}'s: delete it and add runtime.download=true to fetch it again"


def load(known: Text, root: Path, **options: object) -> Corpus:
    return known(str(root), "cpu", **options)  # type: ignore[arg-type]


def whole(corpus: Corpus) -> dict[str, list[int]]:
    """The words of each split; what follows each of them must be the next one."""
    found = {}
    for split, (x, y) in corpus.splits.items():
        assert x.dtype == y.dtype == torch.int64 and len(x) == len(y) and x.tolist()[1:] == y.tolist()[:-1]
        found[split] = [*x.tolist(), int(y[-1])]
    return found


def test_each_line_s_words_are_followed_by_eos() -> None:
    assert tokens("a b\r\n\nc") == tokens(" a  b \n\r\n\tc\n") == ["a", "b", "<eos>", "<eos>", "c", "<eos>"]
    assert tokens("") == [] and tokens("\n") == ["<eos>"] and tokens("\n\n") == ["<eos>"] * 2
    draw = random.Random(0)
    for length in range(200):
        content, words = "".join(draw.choices(["a", "bc", "<unk>", " ", "\n", "\r\n"], k=length)), []
        for line in io.StringIO(content, newline=None):  # as the PyTorch example reads a file
            words += [*line.split(), "<eos>"]
        assert tokens(content) == words


@pytest.mark.parametrize(("known", "packed"), [(PTB, False), (WIKI, False), (WIKI, True)], ids=["ptb", "folder", "zip"])
@pytest.mark.parametrize("source", ["auto", "files"])
def test_ids_are_numbered_by_first_appearance_in_the_training_text(raw: Path, known: Text, packed: bool, source: str) -> None:
    write_files(raw, {ZIP: zipped(files(known))} if packed else files(known))
    corpus = load(known, raw, source=source, bptt=3)
    assert whole(corpus) == IDS and list(corpus.splits) == ["train", "valid", "test"]
    assert (corpus.num_classes, corpus.bptt, corpus.unit, corpus.epoch_size(False)) == (6, 3, "words", 7)
    variant = {"ptb": "Penn Treebank, official text", "wikitext2": "WikiText-2, official text"}[known.name]
    cut = load(known, raw, train=5, test=3)  # the vocabulary is that of the whole text
    assert whole(cut) == {split: ids[: 5 if split == "train" else 3] for split, ids in IDS.items()} and cut.num_classes == 6
    assert cut.variant == f"{variant}, 5 training words, 3 valid words, 3 test words"
    assert corpus.variant == variant and load(known, raw, train=2, test=4).variant == f"{variant}, 2 training words"


def test_files_come_before_the_zip_if_none_is_missing(raw: Path) -> None:
    write_files(raw, files(WIKI) | {ZIP: zipped(files(WIKI, valid="mat mat mat"))})
    assert whole(load(WIKI, raw)) == IDS
    (raw / "wikitext-2" / "wiki.test.tokens").unlink()
    assert whole(load(WIKI, raw)) == IDS | {"valid": [5, 5, 5, 4]}


# What cannot be read.


def test_a_text_that_is_not_there_names_the_places_and_the_remedies(raw: Path) -> None:
    parts = [f"ptb/ptb.{split}.txt" for split in ("train", "valid", "test")]
    assert error(lambda: load(text.ptb, raw)) == (
        f"ptb is not under {raw} (looked for {', '.join(parts)}): add runtime.download=true to fetch it, "
        f"or place {' and '.join(parts)} there by hand, or point DATA_DIR at it"
    )
    assert error(lambda: load(text.wikitext2, raw / "new", source="files")) == (
        f"wikitext2 is not under {raw / 'new'} (looked for wikitext-2/wiki.train.tokens, {ZIP}): "
        f"add runtime.download=true to fetch it, or place {ZIP} there by hand, or point DATA_DIR at it"
    )
    assert not list(raw.iterdir())


@pytest.mark.parametrize("split", SMALL)
@pytest.mark.parametrize("packed", [False, True], ids=["files", "zip"])
def test_a_truncated_text_is_refused(raw: Path, split: str, packed: bool) -> None:
    known, path = (WIKI, raw / ZIP) if packed else (PTB, raw / f"ptb/ptb.{split}.txt")
    members = files(known, **{split: SMALL[split].rstrip().rpartition(" ")[0]})  # its last word is missing
    write_files(raw, {ZIP: zipped(members)} if packed else members)
    counts = {"train": "7 words, wanted 8", "valid": "3 words, wanted 4", "test": "3 words, wanted 4"}[split]
    assert error(lambda: load(known, raw)) == f"{path} has {counts}, {another(known)}"


def test_the_vocabulary_is_that_of_all_three_parts(raw: Path) -> None:
    write_files(raw, files(PTB, train="the cat the cat \n the cat \n", valid="a cat the", test="dog cat sat"))
    assert whole(load(PTB, raw)) == {"train": [0, 1, 0, 1, 2, 0, 1, 2], "valid": [3, 1, 0, 2], "test": [4, 1, 5, 2]}


def test_another_vocabulary_and_other_bytes_are_refused(raw: Path) -> None:
    path = raw / "ptb" / "ptb.train.txt"
    for word, count in (("cat", 5), ("dog", 7)):
        write_files(
            raw, files(PTB, train=SMALL["train"].replace("mat", word), test=SMALL["test"].replace("mat", "cat" * (count == 5) or "mat"))
        )
        wrong = f"and its like have {count} different words, wanted 6"
        assert error(lambda wrong=wrong: load(PTB, raw)) == f"{path} {wrong}, {another(PTB)}"
    path.write_bytes(b"the \xff cat")
    said = error(lambda: load(PTB, raw))
    assert said.startswith(f"{path} cannot be read ('utf-8' codec can't decode byte 0xff in position 4") and said.endswith(another(PTB))


@pytest.mark.parametrize("damage", ["no zip", "truncated", "bad sum", "bad deflate", "another folder", "one missing", "bytes"])
def test_a_zip_that_cannot_be_read_is_told_with_a_remedy(raw: Path, damage: str) -> None:
    train, _, test = members = files(WIKI)
    stored, packed = zipped(members, zipfile.ZIP_STORED), zipped(members)
    data = packed.index(b"tokens") + len(b"tokens")  # where the first member's begins
    content, reason = {
        "no zip": (b"<html>", "File is not a zip file"),
        "truncated": (stored[:-30], "File is not a zip file"),
        "bad sum": (stored.replace(b"the mat", b"the hat"), f"Bad CRC-32 for file '{train}'"),
        "bad deflate": (packed[:data] + b"\xff\xff" + packed[data + 2 :], "invalid block type"),
        "another folder": (zipped({f"x/{name}": content for name, content in members.items()}), f"no item named '{train}' in the archive"),
        "one missing": (zipped(dict(list(members.items())[:2])), f"no item named '{test}' in the archive"),
        "bytes": (zipped(members | {test: b"a \xff"}), "'utf-8' codec can't decode byte 0xff in position 2"),
    }[damage]
    write_files(raw, {ZIP: content})
    said = error(lambda: load(WIKI, raw))
    assert said.startswith(f"{raw / ZIP} cannot be read (") and reason in said and said.endswith(another(WIKI))


@pytest.mark.parametrize("known", [PTB, text.docs], ids=["ptb", "docs"])
@pytest.mark.parametrize(("option", "least"), [("train", 2), ("test", 2), ("bptt", 1), ("classes", 3)])
def test_options_that_are_not_allowed(raw: Path, known: Text, option: str, least: int) -> None:
    wrong = {"ptb": ("zip", "auto, files, embedded"), "docs": ("files", "auto, embedded")}[known.name]
    assert error(lambda: load(known, raw, source=wrong[0])) == f"dataset.source={wrong[0]}: choose one of {wrong[1]}"
    below = error(lambda: load(known, raw, source="embedded", **{option: least - 1}))
    assert below == f"dataset.{option}={least - 1}: choose a whole number of at least {least}"
    load(known, raw, source="embedded", **{option: least})


# Downloads.


def published(site: Site, known: Text, content: dict[str, bytes], where: str = "official") -> Text:
    """The text, published on the site, where its files lie in this folder."""
    names = {path: Path(path).name for path in content}
    site.files |= {f"/{where}/{names[path]}": data for path, data in content.items()}
    return replace(known, published=tuple((f"{site.base}/official/{names[path]}", path, md5(data)) for path, data in content.items()))


@pytest.mark.parametrize("known", [PTB, WIKI], ids=["ptb", "wikitext2"])
@pytest.mark.parametrize("where", ["official", "mirror"])
def test_what_is_missing_is_fetched_once(site: Site, raw: Path, known: Text, where: str) -> None:
    content = files(known) if known is PTB else {ZIP: zipped(files(known))}
    known, download = published(site, known, content, where), [f"{site.base}/mirror/"] if where == "mirror" else True
    with ThreadPoolExecutor(3) as jobs:
        found = list(jobs.map(lambda _: whole(load(known, raw / "new", download=download)), range(3)))
    assert found == [IDS] * 3 and site.asked == [(f"/{where}/{Path(path).name}", None) for path in content]
    assert all((raw / "new" / path).read_bytes() == data for path, data in content.items())


def test_a_file_of_another_md5_is_refused_and_whole_ones_are_kept(site: Site, raw: Path) -> None:
    known = published(site, PTB, files(PTB))
    right, wrong = files(PTB)["ptb/ptb.valid.txt"], b"<html>"
    site.files["/official/ptb.valid.txt"] = wrong
    assert error(lambda: load(known, raw, download=[site.base])) == (
        f"ptb: fetching ptb.valid.txt failed ({site.base}/ptb.valid.txt: HTTP Error 404: Not Found; "
        f"{site.base}/official/ptb.valid.txt: its md5 is {md5(wrong)}, wanted {md5(right)}): "
        f"try again, or place ptb.valid.txt (md5 {md5(right)}) in {raw / 'ptb'} by hand"
    )
    site.files["/official/ptb.valid.txt"] = right
    site.asked.clear()
    assert whole(load(known, raw, download=True)) == IDS
    assert site.asked == [("/official/ptb.valid.txt", None), ("/official/ptb.test.txt", None)]


def test_nothing_is_fetched_without_leave_or_into_a_folder_marked_read_only(site: Site, raw: Path) -> None:
    known = published(site, PTB, files(PTB))
    assert error(lambda: load(known, raw)).startswith(f"ptb is not under {raw} ")
    load(known, raw, source="embedded", download=True)
    raw.chmod(0o555)  # which root could write all the same
    try:
        said = error(lambda: load(known, raw, download=True))
        assert said == f"ptb: nothing can be downloaded into {raw}, which is read-only: point DATA_DIR at another folder"
        assert not site.asked and not list(raw.iterdir())
    finally:
        raw.chmod(0o755)


# Columns and windows.


def made(words: int, bptt: int = 35) -> tuple[Corpus, list[int]]:
    """A text of so many words, all different, and the words."""
    order = torch.randperm(words, generator=Generator().manual_seed(words))
    return Corpus({"train": (order[:-1], order[1:])}, words, lambda x: x, "made up", bptt=bptt), order.tolist()


def check(batches: list[Batch], words: list[int], count: int, bptt: int) -> None:
    """Windows, put one after the other, are the columns: the text in `count` equal parts."""
    sizes = [batch.x.shape[1] for batch in batches]
    assert set(sizes[:-1]) <= {bptt} and 1 <= sizes[-1] <= bptt
    assert all(torch.equal(batch.target, batch.y) and batch.per_class is None for batch in batches)
    x, y = torch.cat([batch.x for batch in batches], dim=1), torch.cat([batch.y for batch in batches], dim=1)
    length = (len(words) - 1) // count
    starts = range(0, count * length, length)
    assert x.tolist() == [words[start : start + length] for start in starts]
    assert y.tolist() == [words[start + 1 : start + 1 + length] for start in starts]
    assert torch.equal(x[:, 1:], y[:, :-1])  # also from a window to the next


@pytest.mark.parametrize("bptt", [1, 5, 35])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 20])
@pytest.mark.parametrize("words", [21, 22, 71, 101, 281, 300])
def test_windows_put_together_are_the_columns(words: int, batch_size: int, bptt: int) -> None:
    corpus, content = made(words, bptt)
    rng = Generator().manual_seed(0)
    for _ in range(2):  # epochs: the order stays
        places = corpus.indices(rng, batch_size, False)
        check([corpus.take(window, rng) for window in places], content, batch_size, bptt)
        seen = sorted(place for window in places for place in window.flatten().tolist())
        assert seen == list(range((words - 1) // batch_size * batch_size))  # each once; the rest is left over
    assert corpus.steps(corpus.epoch_size(False), batch_size, False) == len(places)
    assert corpus.steps(corpus.epoch_size(False), batch_size, True) == max(1, sum(window.shape[1] == bptt for window in places))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 10, 39, 40, 41, 1000])
def test_evaluation_covers_all_that_the_columns_divide(count: int) -> None:
    corpus, words = made(41, 6)
    batches = list(corpus.batches("train", count))
    check(batches, words, min(count, 40), 6)
    pairs = Counter(pair for b in batches for pair in zip(b.x.flatten().tolist(), b.y.flatten().tolist(), strict=True))
    assert pairs <= Counter((words[i], words[i + 1]) for i in range(40)) and pairs.total() == {3: 39, 7: 35, 39: 39}.get(count, 40)


def test_steps_and_what_is_not_allowed() -> None:
    corpus, _ = made(2)
    for known, counts, steps in ((text.ptb, [929_589, 73_760, 82_430], 1_328), (text.wikitext2, [2_088_628, 217_646, 245_569], 2_984)):
        assert list(known.sizes.values()) == counts
        assert [corpus.steps(counts[0] - 1, 20, drop_last) for drop_last in (True, False)] == [steps - 1, steps]
    assert error(lambda: corpus.epoch_size(True)).startswith("balanced: true is not allowed for text, ")
    assert corpus.steps(10, 10, True) == corpus.steps(10, 10, False) == 1
    assert error(lambda: corpus.steps(10, 11, False)) == "batch_size: 11 is not allowed for 10 words; it must be at most that"


# The stand-in, and real data, where the environment has some.


@pytest.mark.parametrize("size", [10, 849, 10_000])
def test_the_stand_in_is_the_documentation_in_its_most_frequent_words(size: int) -> None:
    content: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for place, line in enumerate(EMBEDDED.read_text().splitlines()):  # of every ten sentences eight, one and one
        content[[*["train"] * 8, "valid", "test"][place % 10]] += [*line.split(), "<eos>"]
    times = Counter(content["train"])
    frequent = sorted((word for word in times if times[word] > 1), key=lambda word: -times[word])[: size - 1]
    ids = {word: place for place, word in enumerate(frequent)}
    corpus = load(text.docs, Path(), source="embedded", classes=size)
    assert whole(corpus) == {split: [ids.get(word, len(ids)) for word in words] for split, words in content.items()}
    assert corpus.num_classes == size and max(map(max, whole(corpus).values())) == min(size, 849) - 1
    assert {split: len(words) for split, words in content.items()} == text.docs.sizes


def test_variants_of_the_stand_in_say_what_it_is(raw: Path) -> None:
    docs = text.docs(str(raw), "cpu")
    assert (docs.num_classes, docs.variant, text.docs.num_classes) == (849, "the suite's documentation", 849)
    ptb = load(text.ptb, raw, source="embedded", train=100, test=50)
    assert ptb.num_classes == 10_000 and ptb.variant == "embedded text in place of ptb, 100 training words, 50 valid words, 50 test words"
    assert whole(ptb) == {split: ids[: 100 if split == "train" else 50] for split, ids in whole(docs).items()}
    assert load(text.docs, raw, test=1_640).variant == "the suite's documentation, 1,640 test words"


def test_the_real_penn_treebank() -> None:
    root = Path(os.environ.get("DATA_DIR", "/nonexistent"))
    if not (root / "ptb" / "ptb.train.txt").is_file():
        pytest.skip("no ptb in DATA_DIR")
    ids = whole(load(text.ptb, root, source="files"))
    assert {split: len(words) for split, words in ids.items()} == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert set(ids["train"]) == set(range(10_000)) >= set(ids["valid"]) | set(ids["test"])
    assert all(md5((root / path).read_bytes()) == wanted for _, path, wanted in text.ptb.published)
