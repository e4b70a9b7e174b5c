"""A newcomer's method is one file and one YAML: it appears, trains, resumes and composes, and no other file is touched."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("data", "models", "regularizers", "experiments", "conf")

METHOD = '''
"""The mean square of the features, times a factor that is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers.base import Pass, Regularizer


class Shrink(Regularizer):
    """Adds weight * mean(h^2) * exp(s) of noisy features; it has a parameter and draws random numbers, so that resuming is tested."""

    def __init__(self, weight: float, noise: float = 0.1) -> None:
        super().__init__(weight)
        self.noise = noise

    def setup(self, example: Pass) -> None:
        self.s = torch.nn.Parameter(torch.zeros(()))

    def penalty(self, out: Pass, other: Pass | None) -> Tensor | None:
        h = out.features.float()
        noise = self.noise * torch.randn(h.shape, generator=self.rng, device=h.device)
        return self.weight * (h + noise).square().mean() * self.s.exp()
'''
YAML = """# @package method.shrink
# the mean square of the features
_target_: regularizers.shrink.Shrink
weight: 0.1
noise: 0.1
"""

# All in one process, because starting one takes seconds: argv[1] is the folder for what it writes.
DRIVER = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from experiments import cli, fit, store, train

tmp = Path(sys.argv[1])
TINY = ["dataset=digits", "dataset.train=100", "profile.test=100", "epochs=4", "schedule.at=[2]"]
TINY += ["runtime.threads=1", f"runtime.data_dir={tmp}"]


def command(runs, *words):
    sys.argv = ["retable", *TINY, f"runtime.runs={tmp / runs}", *words]
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        try:
            cli.main(train.train, "config")
            code = 0
        except SystemExit as end:
            code = end.code
    return code, text.getvalue()


def last(runs):
    (path,) = (tmp / runs).glob("*/*/result.json")
    state = torch.load(path.parent / "checkpoint.pt", weights_only=True)
    return state, (path.parent / "metrics.csv").read_text()


assert Path(cli.__file__).is_relative_to(Path.cwd()), cli.__file__
code, text = command("x", "method=nothing")
assert code == 2 and "allowed: cutmix, itdm_c, " in text and ", per, puzzlemix, shrink, vanilla, vcl" in text, text

code, text = command("whole", "method=shrink")
assert code == 0 and "-shrink/weight=0.1," in text, text
state, metrics = last("whole")
assert metrics.splitlines()[0].split(",")[:5] == ["step", "epoch", "lr", "train/ce", "train/shrink"], metrics
assert state["methods"]["shrink"]["s"] != 0

plain = fit.checkpoint
def interrupted(run, trainer, *more):
    plain(run, trainer, *more)
    if trainer.epoch == 2:
        raise KeyboardInterrupt
fit.checkpoint = interrupted
assert command("half", "method=shrink")[0] == 130
fit.checkpoint = plain
assert command("half", "method=shrink")[0] == 0
again, lines = last("half")
assert lines == metrics
assert all(torch.equal(again["net"][key], value) for key, value in state["net"].items())
assert torch.equal(again["methods"]["shrink"]["s"], state["methods"]["shrink"]["s"])

code, text = command("both", "method=[itdm_c,shrink]")
assert code == 0 and {"train/itdm_c", "train/shrink"} <= set(last("both")[1].splitlines()[0].split(",")), text
code, text = command("x", "method=shrink", "method.shrink.nose=1")
assert code == 2 and text == "retable: method.shrink.nose: there is no such key; allowed: weight, noise\\n", text

code, text = command("zero", "method=shrink", "method.shrink.weight=0")
assert code == 0, text
assert command("vanilla")[0] == 0
assert last("zero")[1] == last("vanilla")[1]
print("fine")
"""


def digest(root: Path) -> dict[str, str]:
    files = (path for part in PARTS for path in (root / part).rglob("*") if path.suffix in (".py", ".yaml"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / "clone" / part, ignore=shutil.ignore_patterns("__pycache__", "raw"))
    return tmp_path / "clone"


@pytest.mark.usefixtures("untraced")
def test_a_method_is_one_file_and_one_yaml(clone: Path, tmp_path: Path) -> None:
    before = digest(clone)
    (clone / "regularizers" / "shrink.py").write_text(METHOD.lstrip())
    (clone / "conf" / "method" / "shrink.yaml").write_text(YAML)
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    words = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)]
    done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
    after = digest(clone)
    assert {name for name in after if after[name] != before.get(name)} == {"regularizers/shrink.py", "conf/method/shrink.yaml"}
    assert before.keys() <= after.keys()
