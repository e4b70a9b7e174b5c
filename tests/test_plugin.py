"""Test that a new method is one file and one YAML: it appears, trains, resumes and composes with others."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import regularizers
from experiments import cli, fit, train

METHOD = '''
"""The mean square of the features, times a factor that is learned."""

import torch

from regularizers.base import Regularizer


class Shrink(Regularizer):
    """Adds weight * mean(h^2) * exp(s) of noisy features; it has a parameter and draws random numbers, so that resuming is tested."""

    def __init__(self, weight: float, noise: float = 0.1) -> None:
        super().__init__(weight)
        self.noise = noise

    def setup(self, example):
        self.s = torch.nn.Parameter(torch.zeros(()))

    def penalty(self, out, other):
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
TINY = ["dataset=digits", "dataset.train=100", "profile.test=100", "epochs=4", "schedule.at=[2]", "runtime.threads=1"]


def test_a_method_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shrink.py").write_text(METHOD)
    shutil.copytree(cli.CONF, tmp_path / "conf")
    (tmp_path / "conf" / "method" / "shrink.yaml").write_text(YAML)
    monkeypatch.setattr(cli, "CONF", tmp_path / "conf")
    monkeypatch.setattr(regularizers, "__path__", [*regularizers.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "regularizers.shrink", None)  # restored to none at the end
    del sys.modules["regularizers.shrink"]

    def command(runs: str, *words: str) -> tuple[int, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        words = (*TINY, f"runtime.data_dir={tmp_path}", f"runtime.runs={tmp_path / runs}", *words)
        monkeypatch.setattr(sys, "argv", ["retable", *words])
        code = 0
        try:
            cli.main(train.train, "config")
        except SystemExit as end:
            code = int(end.code or 0)
        return code, "".join(capsys.readouterr())

    def last(runs: str) -> tuple[Any, str]:
        """The checkpoint and the metrics of the only run."""
        (path,) = (tmp_path / runs).glob("*/*/result.json")
        return torch.load(path.parent / "checkpoint.pt", weights_only=True), (path.parent / "metrics.csv").read_text()

    code, text = command("x", "method=nothing")
    assert code == 2 and "allowed: cutmix, itdm_c, " in text and ", per, puzzlemix, shrink, vanilla, vcl" in text
    code, text = command("x", "method=shrink", "method.shrink.nose=1")
    assert code == 2 and text == "retable: method.shrink.nose: there is no such key; allowed: weight, noise\n"

    code, text = command("whole", "method=shrink")
    assert code == 0 and "-shrink/weight=0.1," in text, text
    state, metrics = last("whole")
    assert metrics.splitlines()[0].split(",")[:5] == ["step", "epoch", "lr", "train/ce", "train/shrink"]
    assert state["methods"]["shrink"]["s"] != 0

    plain = fit.checkpoint

    def interrupted(run: Any, trainer: Any, *more: Any) -> None:
        plain(run, trainer, *more)
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "checkpoint", interrupted)
        assert command("half", "method=shrink")[0] == 130
    assert command("half", "method=shrink")[0] == 0
    again, lines = last("half")
    assert lines == metrics and torch.equal(again["methods"]["shrink"]["s"], state["methods"]["shrink"]["s"])
    assert all(torch.equal(again["net"][key], value) for key, value in state["net"].items())

    assert command("both", "method=[itdm_c,shrink]")[0] == 0
    assert {"train/itdm_c", "train/shrink"} <= set(last("both")[1].splitlines()[0].split(","))
    assert command("zero", "method=shrink", "method.shrink.weight=0")[0] == command("vanilla")[0] == 0
    assert last("zero")[1] == last("vanilla")[1]
