"""The bench's command: every row is there, the table says where it was measured, bad input ends in one line."""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from experiments.bench import gpu, rows, start
from experiments.bench.__main__ import PARTS, main, table
from experiments.bench.configs import VARIANTS, Asked, on_gpu, split
from experiments.bench.sides import suite
from experiments.cli import RunFailed
from experiments.config import ConfigError, options

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model=net2c", "batch_size=20", "dataset.train=100", "runtime.threads=1", "runtime.device=cpu"]
METHODS = [name for name in options("method") if name != "vanilla"]
NUMBERS = ("ratio", "q1", "q3")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "experiments.bench", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def finite(row, *numbers):
    assert all(math.isfinite(float(row[key])) and float(row[key]) > 0 for key in (*NUMBERS, *numbers)), row
    assert float(row["q1"]) <= float(row["ratio"]) <= float(row["q3"])
    assert row["note"].startswith("noisy") == (float(row["q3"]) - float(row["q1"]) > 0.1 * float(row["ratio"]))
    assert row["good"]


# The whole command, on two parts.


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "step.csv"
    done = command("methods", "counts", *TINY, "rounds=7", "steps=1", f"csv={path}")
    assert done.returncode == 0, done.stderr
    with open(path, newline="") as file:
        return done, list(csv.DictReader(file)), path


def test_table_has_all_rows_with_finite_ratios(printed):
    done, found, _ = printed
    assert METHODS
    timed = [row for row in found if row["ms a"]]
    assert [row["what"] for row in timed] == [*(f"net2c b20, {name}" for name in (*METHODS, *VARIANTS)), "MMD at once"]
    assert {row["what"].removeprefix("net2c b20, ") for row in timed if row["id"] == "C4"} == {"per", "per analytic", "per toeplitz"}
    assert {row["what"].removeprefix("net2c b20, ") for row in timed if row["id"] == "C7"} == {"vcl", "l1", "l2", "bn"}
    assert {row["id"] for row in timed} == {"C4", "C5", "C7"}
    assert {row["what"]: row["over"] for row in timed}["net2c b20, bn"] == "no norm"
    counted = [row["what"] for row in found if row["id"] == "C8"]
    assert counted == [f"net2c, {name}" for name in ("suite", *METHODS, "optimizer")] + ["MMD at once"]
    assert [row["what"] for row in found if row["id"] == "C9"] == [f"net2c, {name}" for name in ("suite", *METHODS)]
    assert len(done.stderr.splitlines()) == len(found)  # a line for each, as it is measured
    for row in found:
        assert row["what"] in done.stdout
        finite(row, *(("ms a", "ms b") if row in timed else ("count a", "count b")))
    assert max(map(len, done.stdout.splitlines())) <= 130


def test_counts(printed):
    calls = {row["what"].removeprefix("net2c, "): row for row in printed[1] if row["id"] == "C8"}
    assert int(calls["suite"]["count a"]) <= int(calls["suite"]["count b"]) + 10
    assert int(calls["suite"]["reads a"]) == int(calls["suite"]["reads b"]) == 0
    assert int(calls["optimizer"]["count a"]) <= 6
    assert int(calls["itdm_c"]["reads a"]) == int(calls["itdm_j"]["reads a"]) == 0
    assert int(calls["MMD at once"]["count a"]) * 4 < int(calls["MMD at once"]["count b"])
    assert int(calls["MMD at once"]["reads b"]) > 0 == int(calls["MMD at once"]["reads a"])


def test_csv_says_where_it_was_measured(printed):
    done, found, path = printed
    assert [file.name for file in path.parent.iterdir()] == ["step.csv"]
    about = done.stdout[done.stdout.index("device") :].replace("\n", " ")
    for key, value in {"threads": "1", "rounds": "7", "torch": torch.__version__, "overrides": " ".join(TINY)}.items():
        assert {row[key] for row in found} == {value}
        assert f"{key} {value}" in about
    for key in ("device", "commit", "cores", "load", "bf16 units"):
        assert found[0][key]
        assert f"{key} {found[0][key]}" in about


# Every part, in this process.

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
EXPECTED = {
    "end": ["C1"] * 2,
    "use": ["C2"],
    "input": ["C3"] * 2,
    "step": ["b"],
    "precision": ["d"] * 3,
    "compile": ["d"] * 2,
    "start": ["C10"] * 2,
    "sweep": ["C11"],
}
MARKS = {"compile": [pytest.mark.slow, COMPILER], "start": [pytest.mark.slow], "sweep": [pytest.mark.slow]}


@pytest.mark.parametrize("part", [pytest.param(part, marks=MARKS.get(part, [])) for part in EXPECTED])
def test_part_has_finite_rows(part, monkeypatch):
    monkeypatch.setattr(rows, "SHAPES", ((2, 8, 8), (4, 8, 4)))
    found = list(rows.PARTS[part](Asked(TINY, METHODS, rounds=2, steps=1)))
    assert [row["id"] for row in found] == EXPECTED[part]
    for row in found:
        finite(row, "ms a", "ms b")
        assert row["what"] in table(found)
    assert len({(row["what"], row["over"]) for row in found}) == len(found)


def test_without_a_part_all_that_suit_the_machine(monkeypatch):
    assert tuple(rows.PARTS) == PARTS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {*PARTS} - {*rows.chosen([], with_gpu=False)} == {"compile", "gpu"}
    assert rows.chosen(["compile"], with_gpu=False) == ["compile"]
    assert rows.chosen([], with_gpu=True) == [*PARTS]
    assert list(gpu.gpu_rows(Asked(TINY))) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not on_gpu(Asked(TINY).cfg("net2c"))  # runtime.device=cpu


def test_gpu_rows_in_small(monkeypatch):
    for name, value in {"PRODUCT": 64, "BATCH": 2, "CHANNELS": (8,), "LAUNCHES": 10, "UNITS": 8, "LENGTH": 3}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "recorded", lambda side: side)

    monkeypatch.setattr(gpu, "suite", lambda cfg: suite(OmegaConf.merge(cfg, {"step": "eager"})))
    asked = Asked(TINY, rounds=2, steps=1)
    found = [*gpu.kernels(asked, torch.device("cpu"), 790), *gpu.networks(asked, None)]
    assert [row["id"] for row in found] == ["G0", "G0", "G0", "G2"]
    for row in found:
        finite(row, "ms a", "ms b")
    assert gpu.assumed_peak("NVIDIA H200") == 790
    assert gpu.assumed_peak("NVIDIA A100-SXM4-40GB") == 312
    assert gpu.assumed_peak("another") is None
    assert gpu.rate(1580, 4, 790) == "395 TFLOP/s, 50% of 790"
    assert gpu.rate(1580, 4, None) == "395 TFLOP/s, peak unknown"


@pytest.mark.parametrize(("code", "ended"), [(2, ConfigError), (1, RunFailed), (0, RunFailed)])
def test_start_says_why_there_was_no_step(code, ended, monkeypatch):
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        failed = start.FIRST_STEP in command
        return subprocess.CompletedProcess(command, code if failed else 0, "", "a warning\nretable: this is why\n" if failed else "")

    monkeypatch.setattr(start.subprocess, "run", run)
    with pytest.raises(ended, match="this is why"):
        list(start.start_rows(Asked(TINY, rounds=3)))


# The command line.


def test_rows_name_methods_and_pass_their_options_on():
    names, common, own = split(["method=[itdm_c,label_smoothing]", "method.itdm_c.weight=0.8", "model=net2c"])
    assert (names, common, own) == (["itdm_c", "label_smoothing"], ["model=net2c"], {"itdm_c": ["method.itdm_c.weight=0.8"]})
    assert Asked(common, names, own).method("net2c", "itdm_c").method.itdm_c.weight == 0.8
    assert split(["method=vanilla"])[0] == []
    with pytest.raises(ConfigError, match=r"nonsense is not known; allowed: cutmix, .*per analytic, "):
        split(["method=nonsense"])
    with pytest.raises(ConfigError, match="bn is not known; allowed: cutmix, itdm_c, "):
        split(["method.bn.weight=1"])


def test_overrides_hold_for_all_rows_and_a_row_has_the_last_word():
    assert Asked().models("net2c", "resnet18") == ["net2c", "resnet18"]
    assert Asked(["model=net5c"]).models("net2c", "resnet18") == ["net5c"]
    grey, colour = Asked(["batch_size=7"]).cfg("net5c"), Asked().cfg("resnet18")
    assert (grey.batch_size, grey.dataset.train, grey.model.in_channels, "digits" in grey.dataset._target_) == (7, 1500, 1, True)
    assert (colour.batch_size, colour.dataset.padding, colour.dataset.flip, colour.dataset.source) == (64, 4, True, "embedded")
    chosen = Asked(["dataset=kmnist", "precision=bf16"])
    assert "kmnist" in chosen.cfg("net2c").dataset._target_
    assert (chosen.cfg("net2c").precision, chosen.cfg("net2c", "precision=fp32").precision) == ("bf16", "fp32")
    demo = Asked(["experiment=demo"]).cfg("net2c")
    assert (demo.batch_size, demo.optim.lr) == (50, 0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "run is not allowed; parts: end, use"),
        (["step", "model=nonsense"], "nonsense"),
        (["step", "method=nonsense"], "nonsense is not known"),
        (["step", "batchsize=3"], "batchsize"),
        (["step", "precision=fp8"], "fp32, tf32, bf16"),
        (["step", "rounds=3"], "at least 7"),
        (["step", "steps=many"], "at least 1"),
        (["step", "method.itdm_c.wieght=1"], "wieght"),
        (["step", *TINY, "batch_size=101"], "100 training samples"),
        (["step", "csv=/dev/null/x.csv"], "/dev/null"),
        (["step", "--fast"], "fast"),
        (["compare", "a.csv"], "two files are wanted"),
        (["compare", "a.csv", "b.csv"], "a.csv"),
        (["compare", "README.md", "README.md"], "README.md is no CSV of experiments.bench"),
        (["compare", "/dev/null", "/dev/null"], "/dev/null is no CSV"),
    ],
)
def test_bad_input_gives_one_line_and_code_2(arguments, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.err.startswith("retable: ")
    assert said in shown.err
    assert not shown.out


def test_a_part_that_needs_a_gpu_is_skipped_without_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", *TINY, f"csv={tmp_path / 'x.csv'}"])
    main()
    assert "need a GPU" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_help_is_short_and_does_without_torch():
    probe = "import sys; from experiments.bench.__main__ import main; sys.argv[1:] = ['--help']; main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    *text, imported = done.stdout.splitlines()
    assert imported == "False"
    assert 3 < len(text) < 15
    assert all(part in done.stdout for part in PARTS)
    assert not done.stderr
