"""Tests of published runs: what their file holds, which commands count them, and what a table says of them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from tables import CELLS, SPEC, Command, grid, words

from experiments import cli, figure, publish, published, store, table
from experiments.config import Config, ConfigError, options
from experiments.identity import run_id
from experiments.published import pack

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / published.FOLDER).glob("*.zip"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of the tiny table and their published file."""
    root = tmp_path_factory.mktemp("trained")
    (root / "extra" / "table").mkdir(parents=True)
    (root / "extra" / "table" / "tiny.yaml").write_text(SPEC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "0")
        for task, name in ((table.run, "tables"), (publish.run, "publish")):
            patch.setattr(sys, "argv", ["retable", *words(root, root / "runs"), f"out={root}/{name}", "table=tiny"])
            cli.main(task, name)
    return root


@pytest.fixture
def packed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the runs, in tmp_path/runs, and of their file, which is returned, where commands look for published runs."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.copytree(trained / "publish", tmp_path / "published")
    monkeypatch.setattr(published, "FOLDER", tmp_path / "published")
    return tmp_path / "published" / "tiny.zip"


def stored(root: Path) -> dict[str, store.Run]:
    return {identity: store.Run(Path(path)) for identity, path in sorted(store.folders(root))}


# the file


def test_what_the_file_holds(packed: Path, trained: Path, command: Command, tmp_path: Path) -> None:
    """The folder of each run with three files, which unpacked is a run of the store; no names of this machine's folders."""
    packed.unlink()
    code, out, err = command(f"out={packed.parent}", "table=tiny", task=publish.run, root="publish")
    assert (code, err) == (0, "") and out.startswith(f"{packed}: {CELLS} of {CELLS} runs of table tiny, {CELLS} added; ")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "unpacked")
        texts = [archive.read(name).decode() for name in archive.namelist()]
    assert not any(str(folder) in text for text in texts for folder in (tmp_path, trained))
    runs, unpacked = stored(tmp_path / "runs"), stored(tmp_path / "unpacked")
    assert runs.keys() == unpacked.keys() and len(runs) == CELLS
    for identity, run in unpacked.items():
        assert sorted(path.name for path in run.path.iterdir()) == sorted(published.FILES)
        assert run.state == "done" and run.result() == runs[identity].result() and run_id(run.config()) == identity
        assert run.path.name == runs[identity].path.name and {"dataset", "model", "norm"} <= (run.result() or {})["source"].keys()
        for mine, theirs in zip(run.metrics(), runs[identity].metrics(), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-8)


def test_the_same_runs_give_the_same_bytes(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they are added at once, by several who wait for each other. A file that would be too large is not written."""
    before, runs = packed.read_bytes(), stored(tmp_path / "runs")
    parts = [{identity: run} for identity, run in runs.items()]
    assert pack(packed, parts[0]) == (0, 0) and packed.read_bytes() == before  # it keeps what it has
    target = tmp_path / "new" / "tiny.zip"
    assert sum(added for added, _ in ThreadPoolExecutor(CELLS).map(lambda part: pack(target, part), parts)) == CELLS
    assert target.read_bytes() == before
    monkeypatch.setattr(published, "LARGEST", len(before) - 1)
    with pytest.raises(ConfigError, match=r"tiny\.zip: it would have [\d,]+ bytes of at most [\d,]+; publish fewer runs"):
        pack(target, runs)
    assert target.read_bytes() == before and [path.name for path in target.parent.iterdir()] == ["tiny.zip"]


def test_what_is_not_published(packed: Path, command: Command, tmp_path: Path) -> None:
    """A run that has lost its metrics, and one with the result of another; one whose config is another's is refused."""

    def asked(*more: str, runs: str = "runs") -> tuple[int, str, str]:
        return command(f"out={tmp_path}/fewer", *more, task=publish.run, root="publish", runs=tmp_path / runs)

    lost, other, third, *_ = stored(tmp_path / "runs").values()
    (lost.path / "metrics.csv").unlink()
    other.finish((other.result() or {}) | {"id": "0123456789"})
    code, out, err = asked("table=tiny")
    assert (code, err) == (0, "") and out.startswith("2 runs are left out: ") and f": {CELLS - 2} of {CELLS} runs of table" in out
    third.write("config.yaml", other.read("config.yaml"))
    assert asked("table=tiny")[::2] == (2, f"retable: {third.path}: its config.yaml is that of another run\n")
    assert asked()[::2] == (2, "retable: publish: nothing is chosen; add table=NAME or figure=NAME\n")
    empty = f"retable: table: none of the {CELLS} runs of tiny is finished in {tmp_path}/empty\n"
    assert asked("table=tiny", runs="empty")[::2] == (2, empty)


# what commands say


def test_which_commands_count_them(packed: Path, command: Command, tmp_path: Path) -> None:
    """Those that train nothing, unless they are told otherwise; in an empty store they print the table of the own runs."""
    for launch, asked, counts in ((False, None, CELLS), (False, False, 0), (True, None, 0), (True, True, CELLS)):
        assert len(published.counted(OmegaConf.create({"launch": launch, "published": asked}))) == counts
    own = command("table=tiny", "launch=false")[1]
    assert f"{CELLS} own runs have the numbers of the published ones" in own
    code, out, err = command("table=tiny", "launch=false", runs=tmp_path / "empty")
    assert (code, err) == (0, "") and f"published runs: {CELLS} of {CELLS} ({packed})" in out and grid(out) == grid(own)
    assert f"{CELLS} different runs, 0.00 hours" in command("table=tiny", "plan=true", "published=true", runs=tmp_path / "empty")[1]


def test_an_own_run_wins_and_a_difference_is_said(packed: Path, command: Command, tmp_path: Path) -> None:
    """Of two own runs the first has other numbers than the published one, then none; a third has not ended, and does not count."""
    changed, same, unfinished = list(stored(tmp_path / "runs").values())[:3]
    for run in (changed, same, unfinished):
        run.path = Path(shutil.copytree(run.path, tmp_path / "few" / run.path.parent.name / run.path.name))
    changed.log([row | {"test/ce": 1.1 * row["test/ce"]} for row in changed.metrics()])
    (unfinished.path / "result.json").unlink()
    code, out, err = command("table=tiny", "launch=false", runs=tmp_path / "few")
    assert (code, err) == (0, "") and f"published runs: {CELLS - 2} of {CELLS} ({packed})" in out
    assert f"1 of 2 own runs have other numbers than the published ones: by up to 10 % (test/ce of {changed.path.name})" in out
    changed.finish((changed.result() or {}) | {"diverged": "ce is nan"})
    out = command("table=tiny", "launch=false", runs=tmp_path / "few")[1]
    assert "1 of 2 own runs have other numbers than the published ones: one of the two has none (" in out
    assert pack(packed, {changed.path.name[-10:]: changed}) == (0, 1)
    again = command(f"out={packed.parent}", "table=tiny", task=publish.run, root="publish")[1]
    assert "1 runs were there before with other numbers, and are replaced" in again


def test_two_files_that_share_runs(packed: Path) -> None:
    """The first file's are used. What is no folder of a run with all three files is passed over."""
    other = packed.with_name("other.zip")  # which sorts before tiny.zip
    shutil.copy(packed, other)
    with zipfile.ZipFile(packed.with_name("a.zip"), "w") as archive:
        for name in ("__MACOSX/x", "group/run-0123456789/config.yaml", "group/notes/config.yaml", "group/notes/metrics.csv"):
            archive.writestr(name, "")
    found = published.published(packed.parent)
    assert len(found) == CELLS and {run.file for run in found.values()} == {other}
    assert pack(packed, {}) == pack(other, {}) == (0, 0)  # each keeps all of its own


@pytest.mark.slow
def test_figures_count_them_unless_they_need_networks(packed: Path, command: Command, extra: Path, tmp_path: Path) -> None:
    (extra / "figure").mkdir()
    spec = "defaults: [/table@runs: tiny]\ntitle: Tiny\ndraw: {_target_: experiments.figures.weights.draw}\n"
    for name, more in {"tiny": "", "nets": "networks: true\n"}.items():
        (extra / "figure" / f"{name}.yaml").write_text(spec + more)
    asked = [f"out={tmp_path}/figures", "launch=false"]
    code, out, err = command(*asked, "figure=tiny", task=figure.run, root="figures", runs=tmp_path / "empty")
    assert (code, err) == (0, "") and f"published runs: {CELLS} of {CELLS} ({packed})" in out and "MISSING" not in out
    code, _, err = command(*asked, "figure=nets", task=figure.run, root="figures", runs=tmp_path / "empty")
    assert code == 1 and "nothing to draw" in err
    code, out, err = command("figure=tiny", f"out={tmp_path}/p", task=publish.run, root="publish")
    assert (code, err) == (0, "") and "runs of figure tiny" in out and (tmp_path / "p" / "tiny.zip").read_bytes() == packed.read_bytes()


def test_figures_that_read_networks_say_so() -> None:
    """Their drawing makes runs anew; of the two drawings in figures/shift.py one does not."""
    for name in options("figure"):
        spec = OmegaConf.load(cli.CONF / "figure" / f"{name}.yaml")
        module, _, function = spec.draw._target_.rpartition(".")
        code = Path(importlib.util.find_spec(module).origin).read_text()  # type: ignore[union-attr, arg-type]
        reads = bool(re.search(r"import (trained|remade)\b", code)) and (module, function) != ("experiments.figures.shift", "draw")
        assert spec.get("networks", False) == reads, name


# damage


DAMAGED = [
    ("result.json", b"{", "it is not this run's"),
    ("result.json", b'{"id": "0123456789", "commit": "c", "dirty": false, "seconds": 1}', "it is not this run's"),
    ("metrics.csv", b"test/ce,test/accuracy\n1,abc", "could not convert.+"),
    ("metrics.csv", b"a,a\n1,2,3", ".+"),
    ("metrics.csv", b"\xff", ".+decode.+"),
    ("metrics.csv", b"0" * 10_000_001, "it has 10,000,001 bytes"),
]


def test_a_damaged_run(packed: Path) -> None:
    folder = next(iter(published.published(packed.parent).values())).folder
    for name, text, why in DAMAGED:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in published.FILES:
                archive.writestr(f"{folder}/{member}", text if member == name else "")
        (run,) = published.published(packed.parent).values()
        with pytest.raises(ConfigError, match=rf"^{packed}: \S+/{name} is damaged \({why}\)$"):
            (run.result if name == "result.json" else run.metrics)()


def test_a_damaged_file(packed: Path, command: Command, tmp_path: Path) -> None:
    """Members that say that they are encrypted, and a file that ends early."""
    whole = bytearray(packed.read_bytes())
    for mark, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for place in [match.start() for match in re.finditer(re.escape(mark), whole)]:
            whole[place + flag] |= 1
    damaged = {
        bytes(whole): r"digits-\S+/\S+ is damaged \(.+encrypted.+\)",
        bytes(whole[:100]): r"this is no file of published runs \(.+\)",
    }
    for content, says in damaged.items():
        packed.write_bytes(content)
        code, _, err = command("table=tiny", "launch=false", runs=tmp_path / "empty")
        assert code == 2 and re.fullmatch(rf"retable: {packed}: {says}\n", err), err


# those that the project keeps

SLOW = [pytest.param(f"{name}_demo", marks=pytest.mark.slow) for name in ("per", "per_lstm", "lamix", "lamix_puzzle", "unitization")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_ids_of_kept_runs_are_those_of_their_configs(file: Path) -> None:
    """A changed default or rule would leave them without a table that asks for them."""
    assert file.stat().st_size <= published.LARGEST
    mine = published.published(file.parent, file.name)
    assert mine
    for identity, run in mine.items():
        result, cfg = run.result() or {}, run.config()
        assert run_id(cfg) == result["id"] == identity and set(cfg) | {"runtime"} == {*Config.__dataclass_fields__}
        assert result["dirty"] is False and result["source"] and (run.metrics() or "diverged" in result)


@pytest.mark.parametrize("name", ["demo", *SLOW])
def test_reference_tables_are_printed_from_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty store: nothing is trained, and the files are those of runs/reference."""
    more = ["profile=short"] if name == "unitization_demo" else []
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["retable", f"table={name}", *more, "launch=false", f"runtime.runs={tmp_path}", f"out={tmp_path}"])
    cli.main(table.run, "tables")
    file = "-".join([name, *more])
    made, kept = tmp_path / file, ROOT / "runs" / "reference" / file
    for ending in (".md", ".tex"):
        assert Path(f"{made}{ending}").read_text() == Path(f"{kept}{ending}").read_text()
    pd.testing.assert_frame_equal(pd.read_csv(f"{made}.csv"), pd.read_csv(f"{kept}.csv"))
