"""The check of a machine: that it sees what is wrong, that nothing stops it, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import data_home
from torch import Generator, Tensor

from experiments.check import __main__ as command
from experiments.check import papers, processes, rates, report, training
from experiments.check.draws import DrawnOnCPU
from experiments.check.training import Result
from experiments.config import ConfigError
from experiments.trainer import Trainer
from regularizers.activation import ActivationPenalty
from regularizers.lamix import LaMix

__all__ = ["data_home"]  # a fixture
SOME = ["itdm_c", "puzzlemix", "per", "lstm stepped"]


# The same random numbers on two devices


def test_draws_are_those_of_the_cpu() -> None:
    """Also in place, from a tensor of parameters, into a batch of torch's own, and with a generator given by position."""

    def drawn(rng: Generator) -> list[Tensor]:
        made = [torch.rand(3, generator=rng), torch.randperm(5, generator=rng), torch.randint(9, (4,), generator=rng)]
        made += [torch.empty(20).normal_(generator=rng), torch.empty(3).bernoulli_(0.5, generator=rng)]
        return [*made, torch._standard_gamma(torch.full((2,), 0.5), generator=rng)]

    plain = drawn(Generator().manual_seed(3))
    with DrawnOnCPU():
        found = drawn(Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_draws_are_copied_to_the_device() -> None:
    """Here to torch's device without values."""
    rng = Generator().manual_seed(3)
    with DrawnOnCPU():
        made = [torch.rand(3, generator=rng, device="meta"), torch.empty(3, device="meta").normal_(generator=rng)]
        made += [torch.randperm(4, generator=rng, device="meta"), torch.empty(2, device="meta").bernoulli_(0.5)]
    assert [x.device.type for x in made] == ["meta"] * 4 and [len(x) for x in made] == [3, 3, 4, 2]


# What the checks see


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("check", [training.fp32_as_on_the_cpu, training.last_batch, training.resumes, training.learns_in_bf16])
def test_checks_pass_here(check: Any, case: str) -> None:
    assert check(case, "cpu").ok


def test_every_method_is_a_case_and_trains() -> None:
    for case in training.cases("cpu"):
        made = training.trained(training.config(case, "cpu"), 1)
        assert made.clock == 1 and (case in made.regularizers or case in (*training.MORE, "vanilla"))


def test_a_device_that_computes_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that uses TF32 where it must not would: the difference is of a thousandth."""
    plain = Trainer.forward

    def rounded(self: Trainer, batch: Any, *taps: bool) -> Any:
        if torch.backends.mkldnn.enabled:  # the side that is tried
            with torch.no_grad():
                for p in self.net.parameters():
                    p.copy_((p.view(torch.int32) & -(1 << 14)).view(torch.float32))
        return plain(self, batch, *taps)

    monkeypatch.setattr(Trainer, "forward", rounded)
    found = training.fp32_as_on_the_cpu("no norm", "cpu")
    assert not found.ok and found.figures["median"] > training.TOLERANCE


@pytest.mark.parametrize("case", ["per", "lamix"])
def test_a_method_that_does_nothing_on_a_device_is_seen(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """PER without its edit, and LaMix without pairs, which it has in every second step."""
    edit, mix = ActivationPenalty.edit, LaMix.mix
    plain: Any = torch.backends.mkldnn
    monkeypatch.setattr(ActivationPenalty, "edit", lambda *args: args[3] if plain.enabled else edit(*args))
    monkeypatch.setattr(LaMix, "mix", lambda *args: (args[1].x, args[3]) if plain.enabled else mix(*args))
    found = training.fp32_as_on_the_cpu(case, "cpu")
    assert not found.ok and found.figures["close"] < training.CLOSE


def test_a_resume_that_forgets_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer.state
    monkeypatch.setattr(Trainer, "state", lambda self: plain(self) | {"optimizer": self.optimizer.state_dict() | {"state": {}}})
    found = training.resumes("vanilla", "cpu")
    assert not found.ok and "between weights" in found.text


def test_a_network_that_does_not_learn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train_step", lambda self, batch, second: None)
    assert not training.learns_in_bf16("vanilla", "cpu").ok and not training.learns_in_bf16("lstm fused", "cpu").ok


@pytest.mark.parametrize(("error", "ok"), [(torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("device lost"), False)])
def test_what_fails_beside_a_run_must_be_the_memory(monkeypatch: pytest.MonkeyPatch, error: Exception, ok: bool) -> None:
    def apart(task: Any, cfg: Any) -> None:
        if task is training.exhaust:
            raise error

    class Found:
        def metrics(self) -> list[dict[str, float]]:
            return [{"test/ce": 1.0}]

    monkeypatch.setattr(training, "apart", apart)
    monkeypatch.setattr(training, "folder", lambda cfg: Found())
    found = training.out_of_memory("", "cpu")
    assert found.ok is ok and type(error).__name__ in found.text


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_fails_stops_no_other(device: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A process goes on after an error on a CPU; on a GPU, which may be lost to it, and after a kill, there is another."""
    cases = ["a", "raise", "b", "die", "c"]
    found = dict(processes.results(some, cases, device, time.monotonic() + 600))
    assert list(found) == cases
    assert [one is not None and one.ok for one in found.values()] == [True, False, True, False, True]
    assert found["raise"] is not None and found["raise"].text.startswith("ValueError: no such thing (")
    assert found["die"] is not None and found["die"].text == "killed by SIGKILL"
    pids = [found[case].text.split()[-1] for case in "abc"]  # type: ignore[union-attr]
    assert len({*pids}) == (2 if device == "cpu" else 3)
    assert "reader" not in capfd.readouterr().out


def test_what_takes_longer_than_the_budget_is_ended() -> None:
    assert list(processes.results(some, ["hang", "a"], "cpu", time.monotonic() + 2)) == [("hang", None), ("a", None)]
    assert list(processes.results(some, ["a"], "cpu", time.monotonic())) == [("a", None)]


# The command


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fp23"], "check: fp23 is not allowed; parts: fp32, bf16"),
        (["budget=soon"], "budget: soon is not allowed"),
        (["budget=0"], "budget: 0 is not allowed"),
        (["budget=99999999999"], "budget: 99999999999 is not allowed"),
        (["out="], "out: nothing is not allowed"),
        (["out=/dev/null"], "out: /dev/null is not allowed"),
        (["out=conf"], "out: conf is not allowed"),
        (["steps=3"], "steps: there is no such key; allowed: budget, device, out"),
        (["device=tpu"], "runtime.device: tpu is not allowed"),
        *([] if torch.cuda.is_available() else [(["device=cuda"], "runtime.device: cuda was asked for, and torch finds no GPU")]),
    ],
)
def test_bad_words_are_refused(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        command.check([f"out={tmp_path / 'check.json'}", *words])
    assert not (tmp_path / "check.json").exists() and Path("/dev/null").is_char_device()


def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def found(check: Any, cases: list[str], device: str, until: float) -> Any:
        for case in cases:
            if check is rates.rate:
                yield case, Result(None, "1 s", {"seconds": 1e-5, "flops": 1e12})
            elif case == "vcl":
                yield case, None
            else:
                yield case, Result(case != "mixup", f"text of {case}", {"gap": 0.5})

    monkeypatch.setattr(command, "results", found)
    assert not command.check(["fp32", "graph", "rates", "device=cpu", f"out={tmp_path / 'check.json'}"])
    shown, count = capsys.readouterr(), len(training.cases("cpu"))
    assert f"fp32 as the reference {count - 2} of {count - 1} Twenty updates" in " ".join(shown.out.split())
    assert "fp32 as the reference, mixup  FAILED    text of mixup" in shown.out and f"no time was left for 1 of {count}: vcl" in shown.out
    assert "needs a GPU" in shown.out and f"1 of {count - 1} checks FAILED" in shown.out and "launches" in shown.out
    assert "fp32 as the reference, cutmix: ok, text of cutmix" in shown.err
    kept = json.loads((tmp_path / "check.json").read_text())
    assert {"device", "torch", "commit"} <= {*kept["machine"]} and len(kept["checks"]) == count + 1 + len(rates.cases("cpu"))
    assert {"part": "fp32 as the reference", "case": "mixup", "ok": False, "text": "text of mixup", "figures": {"gap": 0.5}} in kept[
        "checks"
    ]


def test_the_tables_hours_follow_from_the_rates(capsys: pytest.CaptureFixture[str]) -> None:
    """Of one table of one paper; the rates are made up."""
    load = papers.Load(10_000, 1e12, 10, 0, 0)
    runs: dict[str, dict[Any, Any]] = {"mine": {seed: (load, "fp32", False) for seed in range(3)}}
    counting: Any = SimpleNamespace(get=lambda timeout: papers.Counted({"mine": 2}, {"mine": ["b"]}, runs))
    lines = [report.Line("rates", case, None, "", {"seconds": 1e-5, "flops": 1e12}) for case in rates.cases("cpu")]
    shown = report.table(lines, command.estimates(lines, counting), {})
    assert "tables of mine" in shown and "1 of 2 tables, 3 runs, 30,000 steps" in shown
    assert "more than 8.3 hours; not counted: b" in " ".join(shown.split())
    assert command.estimates(lines[1:], counting) == [] and "rates are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hours", "said"), [(0.123, "0.12 hours"), (30, "30 hours"), (49, "2 days"), (9000, "380 days"), (838_376.6, "96 years")]
)
def test_spans_of_time(hours: float, said: str) -> None:
    assert report.span(hours) == said


def test_a_budget_that_reaches_nothing_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not command.check(["last", "budget=1", "device=cpu", f"out={tmp_path / 'check.json'}"])
    count = len(training.cases("cpu"))
    assert f"0 checks passed, {count} not reached in 1 s (budget=...)" in capsys.readouterr().out


def test_what_is_there_is_kept_after_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(check: Any, cases: list[str], *_: object) -> Any:
        yield cases[0], Result(True, "well", {})
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.check(["fp32", "device=cpu", f"out={tmp_path / 'check.json'}"])
    assert [each["text"] for each in json.loads((tmp_path / "check.json").read_text())["checks"]] == ["well"]


def test_the_command_itself(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "experiments.check"]
    done = subprocess.run([*words, "last", "side", "budget=3000", f"out={tmp_path}/deep/check.json"], capture_output=True, text=True)
    assert (
        done.returncode == 0
        and f"{len(training.cases('cpu')) + 1} checks passed" in done.stdout
        and (tmp_path / "deep/check.json").exists()
    ), done.stderr
    refused = subprocess.run([*words, "budget=x"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("retable: budget: x") and not refused.stdout
    assert "Without a PART" in subprocess.run([*words, "--help"], capture_output=True, text=True).stdout
