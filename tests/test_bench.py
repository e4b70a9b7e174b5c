"""The benchmark's logic, not its timings: the peer is the same model and step, every row is there, bad input ends in one line."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.bundle import Batch
from experiments import bench, sides
from experiments.cli import RunFailed
from experiments.config import ConfigError, build, options
from experiments.train import make_trainer
from experiments.trainer import generator

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model=net2c", "batch_size=20", "dataset.train=100", "runtime.threads=1", "runtime.device=cpu"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "experiments.bench", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("more", [[], ["optim.momentum=0.9", "optim.weight_decay=0.01", "norm=gn"], ["model=net5c", "optim.lr=0.001"]])
def test_minimal_loop_takes_the_same_steps_as_the_suite(more):
    cfg = bench.composed([*TINY, *more])
    trainer = make_trainer(cfg)
    net = build(cfg.model, "model")(num_classes=10)
    net.load_state_dict(trainer.net.state_dict())
    rng = generator(cfg.seed, "data", "cpu")  # the trainer's: the same epochs
    peer = sides.minimal_loop(net, trainer.bundle, trainer.bundle.order(rng, cfg.balanced).split(cfg.batch_size), rng, cfg)
    losses, sums = [], [0.0]
    for _, batches in zip(range(3), trainer.batches(), strict=False):
        trainer.train_step(*batches)
        sums.append(float(trainer.sums["ce"]))
        losses.append(float(next(peer)))
        if len(losses) == 1:  # later ones differ more: a pooled maximum that rounding moves sends its gradient elsewhere
            for name, value in net.state_dict().items():
                assert torch.allclose(value, trainer.net.state_dict()[name], atol=1e-6), name
    ours = torch.tensor(sums).double().diff()
    assert losses[0] != losses[1]
    assert torch.allclose(ours, torch.tensor(losses).double(), atol=1e-5, rtol=1e-5)


def test_mmd_sides_compute_the_same():
    for size in (20, 7):  # 7: three classes are missing
        cfg = bench.composed([*TINY, f"batch_size={size}"])
        at_once, one_by_one = (sides.matching(cfg, loop).step() for loop in (False, True))
        assert torch.allclose(at_once, one_by_one, atol=1e-5)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "step.csv"
    done = command("step", *TINY, "rounds=7", "steps=1", f"csv={path}")
    assert done.returncode == 0, done.stderr
    with open(path, newline="") as file:
        return done.stdout, list(csv.DictReader(file)), path


def test_table_has_all_rows_with_finite_ratios(table):
    text, rows, _ = table
    methods = [name for name in options("method") if name != "vanilla"]
    assert methods
    names = [row["what"] for row in rows]
    assert names == ["suite", *methods, "bf16", "MMD at once", "optimizer"]
    assert all(name in text for name in names)
    for row in rows:
        assert all(math.isfinite(float(row[key])) and float(row[key]) > 0 for key in ("ratio", "q1", "q3", "ms a", "ms b")), row
        assert float(row["q1"]) <= float(row["ratio"]) <= float(row["q3"])
        assert (row["note"] == "noisy") == (float(row["q3"]) - float(row["q1"]) > 0.1 * float(row["ratio"]))


def test_csv_says_where_it_was_measured(table):
    text, rows, path = table
    assert [file.name for file in path.parent.iterdir()] == ["step.csv"]
    for key, value in {"threads": "1", "precision": "fp32", "batch_size": "20", "rounds": "7", "torch": torch.__version__}.items():
        assert {row[key] for row in rows} == {value}
        assert f"{key} {value}" in text
    assert rows[0]["commit"]
    assert rows[0]["device"]


def test_counts(table):
    rows = {row["what"]: row for row in table[1]}
    assert int(rows["suite"]["calls a"]) <= int(rows["suite"]["calls b"]) + 10
    assert int(rows["suite"]["reads a"]) == int(rows["suite"]["reads b"]) == 0
    assert int(rows["optimizer"]["calls a"]) <= 6
    assert int(rows["itdm_c"]["reads a"]) == int(rows["itdm_j"]["reads a"]) == 0
    assert int(rows["MMD at once"]["calls a"]) * 4 < int(rows["MMD at once"]["calls b"])
    assert int(rows["MMD at once"]["reads b"]) > 0 == int(rows["MMD at once"]["reads a"])


def test_count_sees_operations_and_host_reads():
    x = torch.arange(6.0)
    assert sides.count(lambda: x.view(2, 3).t().add(1).mul(2)) == (2, 0)
    assert sides.count(lambda: float(x.sum())) == (2, 1)
    assert sides.count(lambda: x[x > 2])[1] == 1
    assert sides.count(lambda: x[torch.tensor([0, 1])])[1] == 0
    assert sides.count(lambda: x.nonzero())[1] == 1
    leaf = torch.ones(3, requires_grad=True)
    assert sides.count(lambda: (leaf * 2).sum().backward())[0] >= 3  # the backward is counted too


def test_rows_name_methods_and_pass_their_options_on():
    methods, common, own = bench.split(["method=[itdm_c,label_smoothing]", "method.itdm_c.weight=0.8", "model=net2c"])
    assert (methods, common, own) == (["itdm_c", "label_smoothing"], ["model=net2c"], {"itdm_c": ["method.itdm_c.weight=0.8"]})
    assert bench.split(["method=vanilla"])[0] == []
    with pytest.raises(ConfigError, match="nonsense is not known; allowed: itdm_c, "):
        bench.split(["method=nonsense"])


def test_a_last_smaller_batch_is_left_out(monkeypatch):
    cfg = bench.composed([*TINY, "dataset.train=50"])
    trainer = make_trainer(cfg)
    seen: list[Batch] = []
    monkeypatch.setattr(trainer, "train_step", lambda batch, second: seen.append(batch))
    monkeypatch.setattr(sides, "make_trainer", lambda cfg: trainer)
    side = sides.suite(cfg)
    for _ in range(5):
        side.step()
    assert [len(batch.y) for batch in seen] == [20] * 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "must be step or start"),
        (["run"], "run is not allowed"),
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
    ],
)
def test_bad_input_gives_one_line_and_code_2(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.err.startswith("retable: ")
    assert said in shown.err
    assert not shown.out


def test_help_is_short_and_does_without_torch():
    probe = "import sys; from experiments import bench; sys.argv[1:] = ['--help']; bench.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    *text, imported = done.stdout.splitlines()
    assert imported == "False"
    assert 3 < len(text) < 15
    assert not done.stderr


@pytest.mark.slow
def test_start_reaches_the_first_step(tmp_path):
    done = command("start", *TINY, "rounds=2", f"csv={tmp_path / 'start.csv'}")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "start.csv", newline="") as file:
        seconds = {row["what"]: float(row["seconds"]) for row in csv.DictReader(file)}
    assert list(seconds) == ["import torch", "train --help", "first training step"]
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize(("code", "ended"), [(2, ConfigError), (1, RunFailed), (0, RunFailed)])
def test_start_says_why_there_was_no_step(code, ended, monkeypatch):
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        failed = bench.FIRST_STEP in command
        return subprocess.CompletedProcess(command, code if failed else 0, "", "a warning\nretable: this is why\n" if failed else "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    with pytest.raises(ended, match="this is why"):
        list(bench.start_rows(TINY, 3))
