"""Tests of `python -m experiments.check`: that it sees what is wrong, that nothing stops it, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from trainers import data_home

from experiments.check import __main__ as command
from experiments.check import papers, processes, rates, report, training
from experiments.check.draws import DrawnOnCPU
from experiments.check.training import Result
from experiments.config import ConfigError
from experiments.trainer import Trainer

__all__ = ["data_home"]  # a fixture


def test_draws_are_those_of_the_cpu() -> None:
    """Also in place, from a tensor of parameters, and from torch's own generator; they are copied to the device that asks."""

    def drawn(rng: Generator) -> list[Tensor]:
        made = [torch.rand(3, generator=rng), torch.randperm(5, generator=rng), torch.randint(9, (4,), generator=rng)]
        made += [torch.empty(20).normal_(generator=rng), torch.empty(3).bernoulli_(0.5, generator=rng)]
        return [*made, torch._standard_gamma(torch.full((2,), 0.5), generator=rng)]

    plain, rng = drawn(Generator().manual_seed(3)), Generator().manual_seed(3)
    with DrawnOnCPU():
        assert all(torch.equal(a, b) for a, b in zip(plain, drawn(Generator().manual_seed(3)), strict=True))
        made = [torch.rand(3, generator=rng, device="meta"), torch.empty(3, device="meta").normal_(generator=rng)]
        made += [torch.randperm(4, generator=rng, device="meta"), torch.empty(2, device="meta").bernoulli_(0.5)]
    assert [x.device.type for x in made] == ["meta"] * 4 and [len(x) for x in made] == [3, 3, 4, 2]


# What the checks see


@pytest.mark.parametrize(
    ("check", "case"),
    [
        (training.fp32_as_on_the_cpu, "lstm stepped"),
        (training.last_batch, "puzzlemix"),
        (training.resumes, "per"),
        (training.learns_in_bf16, "itdm_c"),
    ],
)
def test_checks_pass_here(check: Any, case: str) -> None:
    assert check(case, "cpu").ok


def test_a_device_that_computes_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it used TF32 where it must not: the difference is of a thousandth."""
    plain = Trainer.forward

    def rounded(self: Trainer, batch: Any, *taps: bool) -> Any:
        if torch.backends.mkldnn.enabled:  # the side that is tried
            with torch.no_grad():
                for p in self.net.parameters():
                    p.copy_((p.view(torch.int32) & -(1 << 14)).view(torch.float32))
        return plain(self, batch, *taps)

    monkeypatch.setattr(Trainer, "forward", rounded)
    result = training.fp32_as_on_the_cpu("no norm", "cpu")
    assert not result.ok and result.figures["median"] > training.TOLERANCE


def test_a_run_that_forgets_or_does_not_learn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer.state
    monkeypatch.setattr(Trainer, "state", lambda self: plain(self) | {"optimizer": self.optimizer.state_dict() | {"state": {}}})
    result = training.resumes("vanilla", "cpu")
    assert not result.ok and "between weights" in result.text
    monkeypatch.setattr(Trainer, "train_step", lambda self, batch, second: None)
    assert not training.learns_in_bf16("vanilla", "cpu").ok and not training.learns_in_bf16("lstm fused", "cpu").ok


@pytest.mark.parametrize(("error", "ok"), [(torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("device lost"), False)])
def test_what_fails_beside_a_run_must_be_the_memory(monkeypatch: pytest.MonkeyPatch, error: Exception, ok: bool) -> None:
    def apart(task: Any, cfg: Any) -> None:
        if task is training.exhaust:
            raise error

    monkeypatch.setattr(training, "apart", apart)
    monkeypatch.setattr(training, "folder", lambda cfg: SimpleNamespace(metrics=lambda: [{"test/ce": 1.0}]))
    result = training.out_of_memory("", "cpu")
    assert result.ok is ok and type(error).__name__ in result.text


# Processes


def some(case: str, device: str) -> Result:
    """A check that does what its case says."""
    if case == "raise":
        raise ValueError("no such thing\nat all")
    if case == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "hang":
        time.sleep(600)
    print("not for the reader")
    return Result(True, f"{case} in {os.getpid()}", {})


def test_what_fails_stops_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    """A process goes on after an error on a CPU. On a GPU, which may be lost to it, and after a kill, there is another process."""
    for device, count in (("cpu", 2), ("cuda", 3)):
        seen: Any = dict(processes.results(some, ["a", "raise", "b", "die", "c"], device, time.monotonic() + 600))
        assert {case: result.ok for case, result in seen.items()} == {"a": True, "raise": False, "b": True, "die": False, "c": True}
        assert seen["raise"].text.startswith("ValueError: no such thing (") and seen["die"].text == "killed by SIGKILL"
        assert len({seen[case].text.split()[-1] for case in "abc"}) == count
    assert "reader" not in capfd.readouterr().out


def test_what_takes_longer_than_the_budget_is_ended() -> None:
    assert list(processes.results(some, ["hang", "a"], "cpu", time.monotonic() + 2)) == [("hang", None), ("a", None)]


# The command


def test_bad_words_are_refused(tmp_path: Path) -> None:
    asked = {"fp23": "check: fp23", "budget=soon": "budget: soon", "out=": "out: nothing", "out=/dev/null": "out: /dev/null"}
    for word, key in (asked | {"device=tpu": "runtime.device: tpu"}).items():
        with pytest.raises(ConfigError, match=f"^{key} is not allowed"):
            command.check([f"out={tmp_path / 'check.json'}", word])
    with pytest.raises(ConfigError, match=r"^steps: there is no such key; allowed: budget, device, out"):
        command.check(["steps=3"])
    assert not (tmp_path / "check.json").exists()


def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of checks that pass, one that fails, one without time; then none is reached; then the command is interrupted."""
    out, count = tmp_path / "check.json", len(training.cases("cpu"))

    def results(check: Any, cases: list[str], device: str, until: float) -> Iterator[tuple[str, Result | None]]:
        for case in cases:
            if check is rates.rate:
                yield case, Result(None, "1 s", {"seconds": 1e-5, "flops": 1e12})
            else:
                yield case, None if case == "vcl" else Result(case != "mixup", f"text of {case}", {"gap": 0.5})

    monkeypatch.setattr(command, "results", results)
    assert not command.check(["fp32", "graph", "rates", "device=cpu", f"out={out}"])
    shown = capsys.readouterr()
    assert f"fp32 as the reference {count - 2} of {count - 1} Twenty updates" in " ".join(shown.out.split())
    assert "fp32 as the reference, mixup  FAILED    text of mixup" in shown.out and f"no time was left for 1 of {count}: vcl" in shown.out
    assert "needs a GPU" in shown.out and f"1 of {count - 1} checks FAILED" in shown.out and "launches" in shown.out
    kept = json.loads(out.read_text())
    assert {"device", "torch", "commit"} <= {*kept["machine"]} and len(kept["checks"]) == count + 1 + len(rates.cases("cpu"))
    failed = {"part": "fp32 as the reference", "case": "mixup", "ok": False, "text": "text of mixup", "figures": {"gap": 0.5}}
    assert failed in kept["checks"]

    monkeypatch.setattr(command, "results", lambda check, cases, *more: [(case, None) for case in cases])
    assert not command.check(["last", "budget=1", "device=cpu", f"out={out}"])
    assert f"0 checks passed, {count} not reached in 1 s (budget=...)" in capsys.readouterr().out

    def interrupted(check: Any, cases: list[str], *more: object) -> Iterator[tuple[str, Result]]:
        yield cases[0], Result(True, "well", {})
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.check(["fp32", "device=cpu", f"out={out}"])
    assert [each["text"] for each in json.loads(out.read_text())["checks"]] == ["well"]


def test_the_tables_hours_follow_from_the_rates(capsys: pytest.CaptureFixture[str]) -> None:
    """The rates, and the one table of the one paper, are made up."""
    load = papers.Load(10_000, 1e12, 10, 0, 0)
    runs: dict[str, dict[Any, Any]] = {"mine": {seed: (load, "fp32", False) for seed in range(3)}}
    counting: Any = SimpleNamespace(get=lambda timeout: papers.Counted({"mine": 2}, {"mine": ["b"]}, runs))
    lines = [report.Line("rates", case, None, "", {"seconds": 1e-5, "flops": 1e12}) for case in rates.cases("cpu")]
    shown = report.table(lines, command.estimates(lines, counting), {})
    assert "tables of mine" in shown and "1 of 2 tables, 3 runs, 30,000 steps" in shown
    assert "more than 8.3 hours; not counted: b" in " ".join(shown.split())
    assert command.estimates(lines[1:], counting) == [] and "rates are missing" in capsys.readouterr().out
    for hours, said in {0.123: "0.12 hours", 30: "30 hours", 49: "2 days", 9000: "380 days", 838_376.6: "96 years"}.items():
        assert report.span(hours) == said


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "experiments.check"]
    done = subprocess.run([*words, "last", "side", "budget=3000", f"out={tmp_path}/deep/check.json"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(training.cases('cpu')) + 1} checks passed" in done.stdout, done.stderr
    assert (tmp_path / "deep/check.json").exists()
    refused = subprocess.run([*words, "budget=x"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("retable: budget: x") and not refused.stdout
    assert "Without a PART" in subprocess.run([*words, "--help"], capture_output=True, text=True).stdout
