"""What a run is and what a table costs, said before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_table import Command, command, extra

from experiments import plan, train

__all__ = ["command", "extra"]  # fixtures
SHORT = ["dataset.train=100", "epochs=2", "schedule.at=[1]"]


def lines(text: str) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in text.strip().splitlines())
    return {name: value.strip() for name, value in pairs}


def test_dry_run_describes_and_writes_nothing(command: Command, tmp_path: Path) -> None:
    code, out, err = command("method=[itdm_c,label_smoothing]", *SHORT, "runtime.dry_run=true", task=train.train, root="config")
    assert (code, err) == (0, "")
    said = lines(out)
    assert said["folder"].endswith(f"-{said['run']} (missing)")
    # net2c's 106,680, and a scale and a shift for each of the 20 + 50 + 100 normalised units
    assert said["parameters"] == "107,020"
    assert (said["taps"], said["norm layers"], said["methods"]) == ("3", "3 (BatchNorm)", "itdm_c, label_smoothing")
    assert said["batches"] == "2 steps of 50 an epoch, 2 epochs, 4 steps"
    assert said["evaluations"] == "2" and "100 train, 100 test" in said["data"] and "timed steps" in said["time"]
    assert not (tmp_path / "runs").exists()


def test_dry_run_without_norm(command: Command) -> None:
    out = command("norm=none", *SHORT, "runtime.dry_run=true", task=train.train, root="config")[1]
    assert (lines(out)["parameters"], lines(out)["norm layers"]) == ("106,680", "0")


def test_dry_run_of_a_language_model(command: Command) -> None:
    words = ["experiment=per_lstm", "dataset=docs", "model.width=10", "norm=rbn", "profile.train=1401", "epochs=3"]
    said = lines(command(*words, "runtime.dry_run=true", task=train.train, root="config")[1])
    assert said["data"].endswith("1,400 train, 99 valid, 99 test words, 849 classes")
    # embedding, decoder and its bias; two layers of two weights and two biases; rbn's two weights of four gates, weight and shift
    assert said["parameters"] == f"{2 * 8490 + 849 + 2 * (800 + 80 + 80 + 20):,}"
    assert (said["taps"], said["norm layers"], said["batches"]) == (
        "2",
        "6 (RecurrentBatchNorm)",
        "2 steps of 20 an epoch, 3 epochs, 6 steps",
    )


def test_plan_counts_states_and_estimates_from_what_is_stored(command: Command, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    tiny = ["dataset.train=100", "epochs=1", "schedule.at=[1]"]
    assert command(*tiny, "seed=1", task=train.train, root="config")[0] == 0
    (result,) = runs.glob("*/*/result.json")
    result.write_text(json.dumps(json.loads(result.read_text()) | {"seconds": 7200.0}))  # two hours an epoch

    code, out, _ = command("table=tiny", "plan=true")
    assert code == 0 and len(list(runs.glob("*/*/result.json"))) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert table["without"] | {"runs": "2", "done": "1", "missing": "1", "hours": "2.00"} == table["without"]
    assert table["with"] | {"runs": "4", "done": "0", "missing": "4"} == table["with"]
    assert float(table["with"]["hours"]) < 1  # another kind of run: timed, not taken from the stored one
    assert "6 different runs, 2.0" in out and "a stored run" in out and "timed steps" in out

    (config,) = runs.glob("*/*/config.yaml")  # of older code, which did not know all keys: another kind, but no obstacle
    config.write_text(config.read_text().replace("channels_last: true\n", ""))
    code, out, _ = command("table=tiny", "plan=true")
    assert code == 0 and "a stored run" not in out


def test_plan_says_that_a_probe_is_not_counted(command: Command) -> None:
    for words in ((), ("probe=covariate_shift",)):
        code, out, _ = command("table=tiny", "plan=true", *words)
        assert code == 0 and out.count("timed steps; what the probe takes is not counted") == len(words)


def test_plan_says_what_it_cannot_know(command: Command, extra: Path) -> None:
    spec = (extra / "table" / "tiny.yaml").read_text().replace("dataset.train=100", "dataset.train=1")
    (extra / "table" / "away.yaml").write_text(spec)
    code, out, _ = command("table=away", "plan=true")
    assert code == 0 and out.count("| ?") == 2 and "at least 0.00 hours" in out and out.count("dataset.train=1: choose 10") == 1


def test_plan_without_the_data(command: Command, extra: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step, batch of the evaluation and checkpoint takes a minute: what counts is how many the official data set asks for."""
    seconds = plan._seconds
    monkeypatch.setattr(plan, "_seconds", lambda trainer, work: (seconds(trainer, work), 60.0)[1])
    spec = (extra / "table" / "tiny.yaml").read_text().replace("dataset=digits, dataset.train=100", "dataset=kmnist, batch_size=100")
    (extra / "table" / "away.yaml").write_text(spec)
    code, out, _ = command("table=away", "plan=true", "profile.test=null", "evaluate.batch_size=200")
    # two runs of 600 steps, 50 batches and a checkpoint, in minutes
    assert code == 0 and f"{2 * 651 / 60:.2f}" in out and f"{4 * 651 / 60:.2f}" in out
    assert out.count("timed steps on stand-in data: dataset: kmnist is not under") == 1 and "unknown" not in out


def test_plan_of_a_text_that_is_not_there(command: Command, extra: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above; timed on windows of the official size, with its vocabulary."""
    seen = []
    seconds = plan._seconds
    monkeypatch.setattr(plan, "_seconds", lambda trainer, work: (seconds(trainer, work), seen.append(trainer), 60.0)[2])
    spec = (
        (extra / "table" / "tiny.yaml").read_text().replace("dataset=digits, dataset.train=100, epochs=1", "experiment=per_lstm, epochs=1")
    )
    spec = spec.replace('"schedule.at=[1]"', "model.width=4").replace("itdm_c", "per")
    (extra / "table" / "away.yaml").write_text(spec)
    code, out, _ = command("table=away", "plan=true", "profile.test=null")
    # two runs of 1,328 windows of 20 columns, 156,190 words in windows of 10, and a checkpoint, in minutes
    assert code == 0 and f"{2 * (1328 + 156_190 / 350 + 1) / 60:.2f}" in out and "unknown" not in out
    assert "timed steps on stand-in data: dataset: ptb is not under" in out
    assert {one.bundle.num_classes for one in seen} == {10_000} and {one.length.full for one in seen} == {15}


@pytest.mark.parametrize("option", ["plan=true", "launch=false"])
def test_no_table_is_one_line(command: Command, option: str) -> None:
    code, out, err = command(option)
    assert code == 2 and out == "" and err.startswith("retable: table: nothing is chosen; allowed: demo") and err.count("\n") == 1
