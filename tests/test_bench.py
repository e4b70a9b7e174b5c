"""The bench: what its rows compare, how they are measured, and its command."""

from __future__ import annotations

import csv
import itertools
import sys

import pytest
import torch
from hydra import initialize_config_dir

from experiments.bench import __main__ as command
from experiments.bench import cases, measure
from experiments.bench.measure import Asked, Side, compare
from experiments.cli import CONF, RunFailed
from experiments.config import ConfigError, options
from regularizers.puzzlemix import PuzzleMix

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["model=net2c", "batch_size=20", "dataset.train=100", "profile.test=20", "runtime.threads=1", "runtime.device=cpu"]


@pytest.fixture(autouse=True)
def hydra():
    """Within it a config's groups are composed once for all rows."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    command.main()


# What is compared.


def test_steps_differ_in_what_their_row_says():
    parts = ("step", "methods", "text", "norms", "precision", "puzzle", "gpu")
    rows = {part: list(cases.steps(part, Asked(["runtime.device=cpu"]))) for part in parts}
    every = [case for of_part in rows.values() for case in of_part]
    assert len({(case.what, case.over) for case in every}) == len(every)
    allowed = {"vanilla": {"method"}, "no norm": {"norm", "model"}, "bn": {"norm", "model"}, "minimal loop": set(), "eager": {"step"}}
    for case in every:
        cfg, plain = case.a.args[0], case.b.args[0]
        differing = {key for key in cfg if cfg[key] != plain[key]}
        assert differing <= allowed.get(case.over, {"model", "precision", "channels_last"}), case
        assert not plain.method and cfg.drop_last and f" b{cfg.batch_size}" in case.what
        assert bool(differing) == (case.over != "minimal loop") == (case.b.func is measure.suite), case
    methods = {case.what.split(", ")[1]: case.a.args[0] for case in rows["methods"]}
    assert {*methods} == {*options("method"), *measure.VARIANTS} - {"vanilla", "puzzlemix", "lamix_puzzle"}
    assert (methods["per analytic"].method.per.mode, methods["per toeplitz"].method.per.directions) == ("analytic", "toeplitz")


def test_overrides_hold_for_all_rows_and_a_row_has_the_last_word():
    methods, common = measure.split(["method=[per, l2]", "method.per.slices=8", "model=net5c", "batch_size=7", "precision=bf16"])
    asked = Asked(common, methods)
    names = [case.what.removeprefix("net5c b7 bf16, ") for case in cases.steps("methods", asked)]
    assert names == ["per", "per analytic", "per toeplitz", "l2"] and list(cases.steps("text", asked)) == []
    assert asked.method("net5c", "per toeplitz").method.per.slices == 8 and not asked.cfg("net5c").method
    assert asked.cfg("net5c", "precision=fp32").precision == "fp32"
    assert "kmnist" in Asked(["dataset=kmnist"]).cfg("net2c").dataset._target_ and Asked(["experiment=demo"]).cfg("net2c").batch_size == 50
    for words in (["method=nonsense"], ["method.nonsense.weight=1"]):
        with pytest.raises(ConfigError, match="nonsense is not known; allowed: cutmix, itdm_c, "):
            measure.split(words)


# How it is measured.


def side(now, name, seconds, log):
    def step():
        log.append(name)
        now[0] += seconds

    return Side(step, torch.device("cpu"), close=lambda: log.append(f"{name} closed"))


def test_sides_take_turns_by_a_clock(monkeypatch):
    now, log = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    pair = side(now, "a", 0.4, log), side(now, "b", 0.1, log)
    row = compare("x", "a", "b", "<= 4.1", pair, Asked(rounds=3))
    assert [row[key] for key in ("ratio", "q1", "q3", "ms a", "ms b")] == pytest.approx([4, 4, 4, 400, 100])
    assert (row["note"], row["met"]) == ("", "yes")
    assert log[:4] == ["a", "a", "b", "b"]  # warmed up, then tried
    assert [name for name, _ in itertools.groupby(log[4:])] == ["b", "a", "b", "a", "a closed", "b closed"]  # b a, a b, b a
    assert (log[4:].count("a"), log[4:].count("b")) == (3, 15)  # half a second each, at least a step
    rates = compare("x", "a", "b", ">= 2.1", pair, Asked(rounds=2, steps=1), (8, 1), "images")
    assert (rates["ratio"], rates["note"], rates["met"]) == (pytest.approx(2), "20.0 / 10.0 images/s", "NO")
    pair[1].step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        compare("x", "a", "b", "lower", pair, Asked())
    assert log[-2:] == ["a closed", "b closed"]


def test_what_scatters_and_what_misses_its_target_is_marked(monkeypatch):
    times = iter([1, 1, 1, 1, 1.3, 1, 1, 0.8])
    monkeypatch.setattr(Side, "seconds", lambda self, steps: next(times))
    row = compare("C4", "net, per", "vanilla", "a <= 900", (Side(int, torch.device("cpu")),) * 2, Asked(rounds=3, steps=1))
    assert row["note"] == "noisy" and row["met"] == "NO"
    assert measure.met(row | {"good": "a <= 1300"}) == "yes" and measure.met(row | {"good": "higher"}) == ""
    shown = measure.table([row], {"device": "here"})
    assert "0 of 1 targets met, 1 rows noisy" in shown and shown.endswith("device here")


# The command, in small.


@pytest.mark.parametrize(
    ("parts", "ids"), [(["step", "use"], ["b", "C2"]), pytest.param(["end", "input"], ["C1", "C1", "C3", "C3"], marks=pytest.mark.slow)]
)
def test_command_writes_a_table_that_says_where_it_was_measured(parts, ids, monkeypatch, capsys, tmp_path):
    path = tmp_path / "new" / "x.csv"
    run(monkeypatch, *parts, *TINY, "steps=1", f"csv={path}")
    shown = capsys.readouterr()
    assert [file.name for file in path.parent.iterdir()] == ["x.csv"]
    rows = list(csv.DictReader(path.open()))
    assert [row["id"] for row in rows] == ids and len(shown.err.splitlines()) == len(ids)
    for row in rows:
        assert 0 < float(row["q1"]) <= float(row["ratio"]) <= float(row["q3"]) and float(row["ms a"]) > 0 < float(row["ms b"])
        assert row["what"] in shown.out and row["good"] and ("/s" in row["note"]) == (row["id"] != "b")
    for key, value in {"threads": "1", "rounds": "7", "torch": torch.__version__, "overrides": " ".join(TINY)}.items():
        assert {row[key] for row in rows} == {value} and f"{key} {value}" in shown.out.replace("\n", " ")
    run(monkeypatch, "--help")
    assert {*cases.PARTS} <= {*capsys.readouterr().out.replace(",", " ").split()}
    assert max(map(len, shown.out.splitlines())) <= 140
    path.unlink()
    run(monkeypatch, "gpu", *TINY, f"csv={path}")
    assert capsys.readouterr().out.startswith("nothing was measured") and not path.exists()


def test_puzzlemix_without_masks_and_kernels_in_small(monkeypatch):
    *_, unmasked, whole = cases.puzzle(Asked(["model=puzzle_resnet18", "model.width=16", *TINY[1:]]))
    assert (unmasked.over, unmasked.good, whole.over, whole.good) == ("vanilla", "<= 1.65", "without masks", "<= 1.33")
    monkeypatch.setattr(PuzzleMix, "mask", None)
    unmasked.a().step()
    monkeypatch.setattr(cases, "device", lambda runtime: "cuda:0")
    kernels = [case for case in cases.gpu(Asked(TINY)) if case.id == "G0"]
    assert len(kernels) == 5 and kernels[1].work == (cases.gflop(150, 16, 32), cases.gflop(150, 256, 32))


@pytest.mark.slow
def test_processes_get_to_their_end_or_fail_in_their_own_words():
    for case in (*cases.start(Asked(TINY)), *cases.sweep(Asked(TINY))):
        (case.b if case.id == "C11" else case.a)().step()
    with pytest.raises(RunFailed, match="train: there is no nonsense"):
        cases.process("-c", "import sys; sys.exit('retable: train: there is no nonsense')").step()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "run is not allowed; parts: end, use"),
        (["step", "model=nonsense"], "nonsense"),
        (["step", "rounds=3"], "at least 7"),
        (["methods", "method.itdm_c.wieght=1"], "wieght"),
        (["input", *TINY, "csv=/dev/null/x.csv"], "/dev/null"),
        (["input", "model=cnn11", "runtime.threads=1"], "has no images normalised by channel"),
    ],
)
def test_bad_input_gives_a_line_and_code_2(arguments, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and not shown.out and said in shown.err
    assert shown.err.startswith("retable: ") and len(shown.err.splitlines()) == 1
