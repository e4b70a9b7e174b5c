"""The texts: words and their ids, what cannot be read, downloads; the stand-in."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_download import Site, site

from data import text
from data.text import EMBEDDED, Corpus, Text, tokens
from tests.datafiles import error, md5, write_files, zipped

__all__ = ["site"]  # a fixture

# Spaces as in the official files; the validation text has no newline at its end, and the test text an empty line.
SMALL = {"train": " the cat <unk> sat \n the mat \n", "valid": "<unk> cat sat", "test": " \n mat the \n"}
IDS = {"train": [0, 1, 2, 3, 4, 0, 5, 4], "valid": [2, 1, 3, 4], "test": [4, 5, 0, 4]}  # the cat <unk> sat <eos> mat
PTB, WIKI = (replace(official, sizes={"train": 8, "valid": 4, "test": 4}, num_classes=6) for official in (text.ptb, text.wikitext2))
ZIP = "wikitext-2-v1.zip"


def files(dataset: Text, **changed: str) -> dict[str, bytes]:
    """The small text as files of the data set."""
    return {dataset.file.format(split=split): content.encode() for split, content in (SMALL | changed).items()}


def load(dataset: Text, root: Path, **options: Any) -> Corpus:
    return dataset(str(root), "cpu", **options)


def refused(dataset: Text, root: Path) -> str:
    """Why the text is refused; the message also says what to do about it."""
    remedy = f", so it is truncated or not {dataset.title}'s: delete it and add runtime.download=true to fetch it again"
    message = error(partial(load, dataset, root))
    assert message.endswith(remedy)
    return message.removesuffix(remedy)


def whole(corpus: Corpus) -> dict[str, list[int]]:
    """The words of each split; what follows a word must be the next word."""
    words = {}
    for split, (x, y) in corpus.splits.items():
        assert x.dtype == y.dtype == torch.int64 and x.tolist()[1:] == y.tolist()[:-1]
        words[split] = [*x.tolist(), int(y[-1])]
    return words


def test_the_words_of_each_line_are_followed_by_eos() -> None:
    assert tokens("a b\r\n\nc") == tokens(" a  b \n\r\n\tc\n") == ["a", "b", "<eos>", "<eos>", "c", "<eos>"]
    draw = random.Random(0)
    for length in range(200):
        content, words = "".join(draw.choices(["a", "bc", "<unk>", " ", "\n", "\r\n"], k=length)), []
        for line in io.StringIO(content, newline=None):  # as the PyTorch example reads a file
            words += [*line.split(), "<eos>"]
        assert tokens(content) == words


def test_ids_are_numbered_by_first_appearance(raw: Path) -> None:
    for dataset, title, content in (
        (PTB, "Penn Treebank", files(PTB)),
        (WIKI, "WikiText-2", files(WIKI) | {ZIP: zipped(files(WIKI, valid="mat mat mat"))}),  # files come before the zip
    ):
        write_files(raw, content)
        corpus, variant = load(dataset, raw, source="files", bptt=3), f"{title}, official text"
        assert whole(corpus) == IDS and list(corpus.splits) == ["train", "valid", "test"] and corpus.variant == variant
        assert (corpus.num_classes, corpus.bptt, corpus.epoch_size(False)) == (6, 3, 7)
        cut = load(dataset, raw, train=5, test=3)  # the vocabulary is that of the whole text
        assert whole(cut) == {split: ids[: 5 if split == "train" else 3] for split, ids in IDS.items()} and cut.num_classes == 6
        assert cut.variant == f"{variant}, 5 training words, 3 valid words, 3 test words"
    (raw / "wikitext-2" / "wiki.test.tokens").unlink()
    assert whole(load(WIKI, raw)) == IDS | {"valid": [5, 5, 5, 4]}
    # The vocabulary is that of all three parts.
    write_files(raw, files(PTB, train="the cat the cat \n the cat \n", valid="a cat the", test="dog cat sat"))
    assert whole(load(PTB, raw)) == {"train": [0, 1, 0, 1, 2, 0, 1, 2], "valid": [3, 1, 0, 2], "test": [4, 1, 5, 2]}


def test_what_is_said_of_a_missing_text(raw: Path) -> None:
    assert error(lambda: load(text.wikitext2, raw, source="files")) == (
        f"wikitext2 is not under {raw} (looked for wikitext-2/wiki.train.tokens, {ZIP}): "
        f"add runtime.download=true to fetch it, or place {ZIP} there by hand, or point DATA_DIR at it"
    )
    assert " and ptb/ptb.test.txt there by hand" in error(lambda: load(text.ptb, raw)) and not list(raw.iterdir())


def test_another_text_is_refused(raw: Path) -> None:
    path = raw / "ptb" / "ptb.train.txt"
    for change, fault in (
        ({"valid": "<unk> cat"}, "has 3 words, wanted 4"),
        ({"train": SMALL["train"].replace("mat", "cat"), "test": "\n cat the"}, "and its like have 5 different words, wanted 6"),
        ({"train": SMALL["train"].replace("mat", "dog")}, "and its like have 7 different words, wanted 6"),
    ):
        write_files(raw, files(PTB, **change))
        assert refused(PTB, raw) == f"{str(path).replace('train', next(iter(change)))} {fault}"


def test_another_zip_is_refused(raw: Path) -> None:
    train, _, test = members = files(WIKI)
    stored, packed = zipped(members, zipfile.ZIP_STORED), zipped(members)
    data = packed.index(b"tokens") + len(b"tokens")  # where the first member's begins
    for content, fault in (
        (zipped(files(WIKI, test="mat")), "has 2 words, wanted 4"),
        (zipped(members | {test: b"the \xff cat"}), "cannot be read ('utf-8' codec can't decode byte 0xff in position 4"),
        (stored[:-30], "cannot be read (File is not a zip file)"),
        (stored.replace(b"the mat", b"the hat"), f"cannot be read (Bad CRC-32 for file '{train}')"),
        (packed[:data] + b"\xff\xff" + packed[data + 2 :], "cannot be read (Error -3 while decompressing"),  # zlib's error
        (zipped(dict(list(members.items())[:2])), f"cannot be read (\"There is no item named '{test}' in the archive"),
    ):
        write_files(raw, {ZIP: content})
        assert refused(WIKI, raw).startswith(f"{raw / ZIP} {fault}")


def test_options_that_are_not_allowed(raw: Path) -> None:
    for dataset, source, known in ((PTB, "zip", "auto, files, embedded"), (text.docs, "files", "auto, embedded")):
        assert error(partial(load, dataset, raw, source=source)) == f"dataset.source={source}: choose one of {known}"
    for option, least in (("train", 2), ("test", 2), ("bptt", 1), ("classes", 3)):
        below = error(partial(load, PTB, raw, source="embedded", **{option: least - 1}))
        assert below == f"dataset.{option}={least - 1}: choose a whole number of at least {least}"
        load(PTB, raw, source="embedded", **{option: least})


def published(site: Site, dataset: Text, content: dict[str, bytes], where: str = "official") -> Text:
    """The text, with official urls on the site; the site has its files in the folder `where`."""
    site.files |= {f"/{where}/{Path(path).name}": data for path, data in content.items()}
    return replace(dataset, published=tuple((f"{site.base}/official/{Path(path).name}", path, md5(data)) for path, data in content.items()))


def test_what_is_missing_is_fetched_once(site: Site, raw: Path) -> None:
    for content, dataset, where, download in (
        (files(PTB), PTB, "official", True),
        ({ZIP: zipped(files(WIKI))}, WIKI, "mirror", [f"{site.base}/mirror/"]),
    ):
        site.asked.clear()
        job = partial(load, published(site, dataset, content, where), raw / where, download=download)
        with ThreadPoolExecutor(3) as threads:
            assert [whole(thread.result()) for thread in [threads.submit(job) for _ in range(3)]] == [IDS] * 3
        assert site.asked == [(f"/{where}/{Path(path).name}", None) for path in content]
        assert all((raw / where / path).read_bytes() == data for path, data in content.items())


def test_a_download_of_another_md5_is_refused_and_whole_files_are_kept(site: Site, raw: Path) -> None:
    dataset, right = published(site, PTB, files(PTB)), files(PTB)["ptb/ptb.valid.txt"]
    raw.chmod(0o555)  # root could write all the same
    assert "read-only" in error(lambda: load(dataset, raw, download=True)) and not site.asked
    raw.chmod(0o755)
    site.files["/official/ptb.valid.txt"] = b"<html>"
    wrong = f"/official/ptb.valid.txt: its md5 is {md5(b'<html>')}, wanted {md5(right)}): try again, or place ptb.valid.txt "
    assert wrong in error(lambda: load(dataset, raw, download=[site.base]))
    site.files["/official/ptb.valid.txt"] = right
    site.asked.clear()
    assert whole(load(dataset, raw, download=True)) == IDS
    assert site.asked == [("/official/ptb.valid.txt", None), ("/official/ptb.test.txt", None)]


def test_the_stand_in_is_the_documentation_in_its_most_frequent_words(raw: Path) -> None:
    content: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for place, line in enumerate(EMBEDDED.read_text().splitlines()):  # of every ten sentences eight, one and one
        content[[*["train"] * 8, "valid", "test"][place % 10]] += [*line.split(), "<eos>"]
    times = Counter(content["train"])
    for size in (10, 849, 10_000):
        frequent = sorted((word for word in times if times[word] > 1), key=lambda word: -times[word])[: size - 1]
        ids = {word: place for place, word in enumerate(frequent)}
        corpus = load(text.docs, raw, source="embedded", classes=size)
        assert whole(corpus) == {split: [ids.get(word, len(ids)) for word in words] for split, words in content.items()}
        assert corpus.num_classes == size
    assert {split: len(words) for split, words in content.items()} == text.docs.sizes
    docs = load(text.docs, raw)
    assert docs.num_classes == max(map(max, whole(docs).values())) + 1 == 849 and docs.variant == "the suite's documentation"
    ptb = load(text.ptb, raw, source="embedded", train=100, test=50)
    assert ptb.num_classes == 10_000 and ptb.variant == "embedded text in place of ptb, 100 training words, 50 valid words, 50 test words"


def test_the_real_penn_treebank() -> None:
    root = Path(os.environ.get("DATA_DIR", "/nonexistent"))
    if not (root / "ptb" / "ptb.train.txt").is_file():
        pytest.skip("no ptb in DATA_DIR")
    ids = whole(load(text.ptb, root, source="files"))
    assert {split: len(words) for split, words in ids.items()} == text.ptb.sizes
    assert set(ids["train"]) == set(range(10_000)) >= set(ids["valid"]) | set(ids["test"])
    assert all(md5((root / path).read_bytes()) == wanted for _, path, wanted in text.ptb.published)
