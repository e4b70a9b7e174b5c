"""Published runs: what their file holds, which commands count them, and what a table says of them."""

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
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from test_table import CELLS, Command, command, extra, results  # noqa: F401  fixtures

from experiments import figure, publish, published, store, table
from experiments.cli import CONF, main
from experiments.config import ConfigError, options
from experiments.identity import run_id
from experiments.launch import compose

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / published.FOLDER).glob("*.zip"))


@pytest.fixture
def packed(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The tiny table's runs, in tmp_path/runs and in the file that is returned, where the commands look for published runs."""
    assert command("table=tiny")[0] == 0
    folder = tmp_path / "published"
    code, out, err = command(f"out={folder}", "table=tiny", task=publish.run, root="publish")
    assert (code, err) == (0, "") and out.startswith(f"{folder}/tiny.zip: {CELLS} of {CELLS} runs of table tiny, {CELLS} added; ")
    monkeypatch.setattr(published, "FOLDER", folder)
    return folder / "tiny.zip"


def numbers(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("|")]


def test_what_the_file_holds(packed: Path, tmp_path: Path) -> None:
    """Each run's folder with three files, unpacked a run of the store; nothing of this machine's folders."""
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "unpacked")
        texts = [archive.read(name).decode() for name in archive.namelist()]
    assert not any(str(tmp_path) in text for text in texts)
    runs, unpacked = (
        {Path(path).name: store.Run(Path(path)) for _, path in store.folders(tmp_path / name)} for name in ("runs", "unpacked")
    )
    assert runs.keys() == unpacked.keys() and len(runs) == CELLS
    for name, run in unpacked.items():
        assert sorted(path.name for path in run.path.iterdir()) == sorted(published.FILES)
        assert run.state == "done" and run.result() == runs[name].result() and run_id(run.config()) == name[-10:]
        assert {"dataset", "model", "norm"} <= (run.result() or {})["source"].keys()
        for mine, theirs in zip(run.metrics(), runs[name].metrics(), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-8)


def test_the_same_runs_give_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    runs = {identity: store.Run(Path(path)) for identity, path in store.folders(tmp_path / "runs")}
    one = dict(list(runs.items())[:1])
    assert published.pack(packed, one) == (0, 0) and packed.read_bytes() == before  # it keeps what it has
    packed.unlink()
    assert published.pack(packed, one) == (1, 0) and published.pack(packed, runs) == (CELLS - 1, 0) and packed.read_bytes() == before


def test_a_file_that_would_be_too_large_is_not_written(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "LARGEST", packed.stat().st_size - 1)
    before, runs = packed.read_bytes(), {identity: store.Run(Path(path)) for identity, path in store.folders(tmp_path / "runs")}
    with pytest.raises(ConfigError, match=r"tiny\.zip: it would have [\d,]+ bytes of at most [\d,]+; publish fewer runs"):
        published.pack(packed, runs)
    assert packed.read_bytes() == before and [path.name for path in packed.parent.iterdir()] == ["tiny.zip"]


@pytest.mark.parametrize(
    ("words", "counted", "trained"),
    [
        (["launch=false"], CELLS, 0),
        (["launch=false", "published=false"], 0, 0),
        (["published=true"], CELLS, 0),
        ([], 0, CELLS),
    ],
)
def test_which_commands_count_them(packed: Path, command: Command, tmp_path: Path, words: list[str], counted: int, trained: int) -> None:  # noqa: F811
    """In an empty store: those that train nothing, unless they are told otherwise."""
    own = numbers(command("table=tiny")[1])
    code, out, err = command("table=tiny", *words, runs=tmp_path / "empty")
    assert (code, err) == (0, "") and len(results(tmp_path / "empty")) == trained
    assert (f"published runs: {counted} of {CELLS} ({packed})" in out) == (counted > 0)
    assert (numbers(out) == own) == (counted + trained > 0)


def test_an_own_run_wins_and_a_difference_is_said(packed: Path, command: Command, tmp_path: Path) -> None:  # noqa: F811
    """Of two own runs one has the numbers of the published one, the other has not; a third has not ended, and does not count."""
    changed, same, unfinished = (Path(path) for _, path in list(store.folders(tmp_path / "runs"))[:3])
    for path in (changed, same, unfinished):
        shutil.copytree(path, tmp_path / "few" / path.parent.name / path.name)
    run = store.Run(tmp_path / "few" / changed.parent.name / changed.name)
    run.log([row | {"test/ce": 1.1 * row["test/ce"]} for row in run.metrics()])
    (tmp_path / "few" / unfinished.parent.name / unfinished.name / "result.json").unlink()
    code, out, err = command("table=tiny", "launch=false", runs=tmp_path / "few")
    assert (code, err) == (0, "") and f"published runs: {CELLS - 2} of {CELLS} ({packed})" in out
    assert f"1 of 2 own runs have other numbers than the published ones: by up to 10 % (test/ce of {changed.name})" in out
    assert f"{CELLS} own runs have the numbers of the published ones" in command("table=tiny", "launch=false")[1]
    code, out, err = command(f"out={packed.parent}", "table=tiny", task=publish.run, root="publish", runs=tmp_path / "few")
    assert (code, err) == (0, "") and "1 runs were there before with other numbers, and are replaced" in out


def test_a_run_that_one_of_the_two_diverged_in(packed: Path, command: Command, tmp_path: Path) -> None:  # noqa: F811
    path = next(tmp_path.glob("runs/*/*"))
    run = store.Run(path)
    run.finish((run.result() or {}) | {"diverged": "ce is nan"})
    _, out, _ = command("table=tiny", "launch=false")
    metric = f"(test/ce of {path.name})" if "with" in path.name else f"of {path.name})"
    assert f"1 of {CELLS} own runs have other numbers than the published ones: one of the two has none (" in out and metric in out


def test_two_files_that_share_runs(packed: Path, command: Command, tmp_path: Path) -> None:  # noqa: F811
    """Each keeps all of its own; the first one's are used. What is no run's folder with all three files is passed over."""
    other = packed.with_name("other.zip")
    shutil.copy(packed, other)
    runs = {identity: store.Run(Path(path)) for identity, path in store.folders(tmp_path / "runs")}
    assert published.pack(packed, dict(list(runs.items())[:1])) == published.pack(other, {}) == (0, 0)
    with zipfile.ZipFile(packed.with_name("a.zip"), "w") as archive:
        for name in ("__MACOSX/x", "group/run-0123456789/config.yaml", "group/notes/config.yaml", "group/notes/metrics.csv"):
            archive.writestr(name, "")
    _, out, _ = command("table=tiny", "launch=false", runs=tmp_path / "empty")
    assert f"published runs: {CELLS} of {CELLS} ({other})" in out  # which sorts before tiny.zip


def test_a_figure_of_networks_does_not_use_them(packed: Path, command: Command, extra: Path, tmp_path: Path) -> None:  # noqa: F811
    (extra / "figure").mkdir()
    (extra / "figure" / "tiny.yaml").write_text(
        "defaults: [/table@runs: tiny]\ntitle: Tiny\nnetworks: true\ndraw: {_target_: experiments.figures.weights.draw}\n"
    )
    words = [f"out={tmp_path}/figures", "figure=tiny", "launch=false"]
    code, _, err = command(*words, task=figure.run, root="figures", runs=tmp_path / "empty")
    assert code == 1 and "nothing to draw" in err


@pytest.mark.parametrize("name", options("figure"))
def test_figures_that_read_networks_say_so(name: str) -> None:
    """Those whose drawing makes runs anew, and the one of two drawings of its module that reads kept states."""
    spec = OmegaConf.load(CONF / "figure" / f"{name}.yaml")
    module, _, function = spec.draw._target_.rpartition(".")
    code = Path(importlib.util.find_spec(module).origin).read_text()  # type: ignore[union-attr, arg-type]
    reads = bool(re.search(r"import (trained|remade)\b", code)) and (module, function) != ("experiments.figures.shift", "draw")
    assert spec.get("networks", False) == reads


def test_a_plan_counts_them_when_asked(packed: Path, command: Command, tmp_path: Path) -> None:  # noqa: F811
    out = command("table=tiny", "plan=true", "published=true", runs=tmp_path / "empty")[1]
    assert f"{CELLS} different runs, 0.00 hours" in out


def test_a_figure_counts_them(packed: Path, command: Command, extra: Path, tmp_path: Path) -> None:  # noqa: F811
    (extra / "figure").mkdir()
    (extra / "figure" / "tiny.yaml").write_text(
        "defaults: [/table@runs: tiny]\ntitle: Tiny\ndraw: {_target_: experiments.figures.weights.draw}\n"
    )
    words = [f"out={tmp_path}/figures", "figure=tiny"]
    code, out, err = command(*words, "launch=false", task=figure.run, root="figures", runs=tmp_path / "empty")
    assert (code, err) == (0, "") and f"published runs: {CELLS} of {CELLS} ({packed})" in out and "MISSING" not in out
    code, out, err = command(*words, f"out={tmp_path}/p", task=publish.run, root="publish")
    assert (code, err) == (0, "") and "runs of figure tiny" in out and (tmp_path / "p" / "tiny.zip").read_bytes() == packed.read_bytes()


def swapped(archive: Path, name: str, text: bytes, **zipped: int) -> None:
    """One member of each folder with another text."""
    with zipfile.ZipFile(archive) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as new:
        for member, before in members.items():
            new.writestr(member, text if member.endswith(name) else before, **zipped)


@pytest.mark.parametrize("text", [b"{}", b"[]", b"3", b"{", b'{"id": "0123456789", "commit": "c", "dirty": false, "seconds": 1}'])
def test_a_result_that_is_not_the_runs(packed: Path, command: Command, tmp_path: Path, text: bytes) -> None:  # noqa: F811
    swapped(packed, "result.json", text)
    code, _, err = command("table=tiny", "launch=false", runs=tmp_path / "empty")
    assert code == 2 and re.fullmatch(rf"retable: {packed}: \S+/result\.json is damaged \(it is not this run's\)\n", err)


@pytest.mark.parametrize("text", [b"test/ce,test/accuracy\n1,abc", b"a,a\n1,2,3", b"\xff", b"0" * 10_000_001])
def test_metrics_that_are_none(packed: Path, command: Command, tmp_path: Path, text: bytes) -> None:  # noqa: F811
    swapped(packed, "metrics.csv", text)
    code, _, err = command("table=tiny", "launch=false", runs=tmp_path / "empty")
    assert code == 2 and re.fullmatch(rf"retable: {packed}: \S+/metrics\.csv is damaged \(.+\)\n", err)


def test_an_archive_that_python_cannot_unpack(packed: Path, command: Command, tmp_path: Path) -> None:  # noqa: F811
    """Its members say that they are encrypted."""
    text = bytearray(packed.read_bytes())
    for mark, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = text.find(mark)
        while place >= 0:
            text[place + flag] |= 1
            place = text.find(mark, place + 1)
    packed.write_bytes(text)
    code, _, err = command("table=tiny", "launch=false", runs=tmp_path / "empty")
    assert code == 2 and re.fullmatch(rf"retable: {packed}: \S+ is damaged \(.+encrypted.+\)\n", err)


def test_what_is_not_published(packed: Path, command: Command, tmp_path: Path) -> None:  # noqa: F811
    """A run that has lost its metrics, and one with the result of another; one whose config is another's is refused."""
    lost, other, third = (store.Run(path) for path in sorted(tmp_path.glob("runs/*/*"))[:3])
    (lost.path / "metrics.csv").unlink()
    other.finish((other.result() or {}) | {"id": "0123456789"})
    words = [f"out={tmp_path}/fewer", "table=tiny"]
    code, out, err = command(*words, task=publish.run, root="publish")
    assert (code, err) == (0, "") and out.startswith("2 runs are left out: ") and f": {CELLS - 2} of {CELLS} runs of table" in out
    third.write("config.yaml", other.read("config.yaml"))
    code, _, err = command(*words, task=publish.run, root="publish")
    assert (code, err) == (2, f"retable: {third.path}: its config.yaml is that of another run\n")


def test_two_at_once_lose_nothing(packed: Path, tmp_path: Path) -> None:
    """While another process adds to the folder, this one waits."""
    runs = {identity: store.Run(Path(path)) for identity, path in store.folders(tmp_path / "runs")}
    target, together = tmp_path / "new" / "tiny.zip", ThreadPoolExecutor(CELLS)
    parts = [{identity: run} for identity, run in runs.items()]
    assert sum(added for added, _ in together.map(lambda part: published.pack(target, part), parts)) == CELLS
    assert target.read_bytes() == packed.read_bytes()


def test_bad_input_in_one_line(packed: Path, command: Command, tmp_path: Path) -> None:  # noqa: F811
    def asked(*words: str) -> tuple[int, str]:
        code, _, err = command(*words, task=publish.run, root="publish", runs=tmp_path / "empty")
        return code, err

    assert asked() == (2, "retable: publish: nothing is chosen; add table=NAME or figure=NAME\n")
    assert asked("table=tiny") == (2, f"retable: table: none of the {CELLS} runs of tiny is finished in {tmp_path}/empty\n")
    whole = packed.read_bytes()
    place = whole.index(b"metrics.csv") + 60
    packed.write_bytes(whole[:place] + b"damaged" + whole[place + 7 :])
    code, _, err = command("table=tiny", "launch=false", task=table.run, runs=tmp_path / "empty")
    assert code == 2 and re.fullmatch(rf"retable: {packed}: digits-\S+/\S+ is damaged \(.+\)\n", err)
    packed.write_bytes(whole[:100])
    code, _, err = command("table=tiny", "launch=false", task=table.run)
    assert (code, err) == (2, f"retable: {packed}: this is no file of published runs (File is not a zip file)\n")


# those that the project keeps

TABLES = ["demo", "per_demo", "per_lstm_demo", "lamix_demo", "lamix_puzzle_demo"]
PRINTED = [(name, []) for name in TABLES] + [("unitization_demo", ["profile=short"])]


def test_they_are_there() -> None:
    assert {file.stem for file in FILES} >= {name for name, _ in PRINTED}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_their_ids_are_those_of_their_configs(file: Path) -> None:
    """Under today's code: a changed default or rule would leave them without a table that asks for them."""
    assert file.stat().st_size <= published.LARGEST
    mine = published.published(file.parent, file.name)
    assert mine
    with initialize_config_dir(str(CONF), version_base="1.3"):
        keys = set(compose([]))
    for identity, run in mine.items():
        result, cfg = run.result() or {}, run.config()
        assert run_id(cfg) == result["id"] == identity and set(cfg) | {"runtime"} == keys
        assert result["dirty"] is False and result["source"] and (run.metrics() or "diverged" in result)


@pytest.mark.parametrize(("name", "words"), PRINTED, ids=[name for name, _ in PRINTED])
def test_reference_tables_are_printed_from_them(name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the project's folder, with an empty store: nothing is trained, and the files are those of runs/reference."""
    asked = [f"table={name}", *words, "launch=false", f"runtime.runs={tmp_path}", f"out={tmp_path}"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["retable", *asked])
    main(table.run, "tables")
    file = "-".join([name, *words])
    made, kept = tmp_path / file, ROOT / "runs" / "reference" / file
    for ending in (".md", ".tex"):
        assert Path(f"{made}{ending}").read_text() == Path(f"{kept}{ending}").read_text()
    pd.testing.assert_frame_equal(pd.read_csv(f"{made}.csv"), pd.read_csv(f"{kept}.csv"))
