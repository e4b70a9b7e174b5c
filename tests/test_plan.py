"""What a run is and what a table costs, said before anything is trained; and whole papers: their plan, order and verdicts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tables import FAILING, SPEC, Command, grid

from experiments import cost, paper, plan, train
from experiments.config import options


def dry_run(command: Command, *words: str) -> dict[str, str]:
    code, out, err = command(*words, "runtime.dry_run=true", task=train.train, root="config")
    assert (code, err) == (0, "")
    pairs = (line.split(":", 1) for line in out.strip().splitlines())
    return {name: value.strip() for name, value in pairs}


def test_dry_run_describes_and_writes_nothing(command: Command, tmp_path: Path) -> None:
    said = dry_run(command, "method=[itdm_c,label_smoothing]", "dataset.train=100", "epochs=2", "schedule.at=[1]")
    assert said["folder"].endswith(f"-{said['run']} (missing)") and not (tmp_path / "runs").exists()
    # net2c's 106,680, and a scale and a shift for each of the 20 + 50 + 100 normalised units
    assert said["parameters"] == "107,020"
    assert (said["taps"], said["norm layers"], said["methods"]) == ("3", "3 (BatchNorm)", "itdm_c, label_smoothing")
    assert said["batches"] == "2 steps of 50 an epoch, 2 epochs, 4 steps"
    assert said["evaluations"] == "2" and "100 train, 100 test" in said["data"] and "timed steps" in said["time"]


def test_dry_run_of_a_language_model(command: Command) -> None:
    said = dry_run(command, "experiment=per_lstm", "dataset=docs", "model.width=10", "norm=rbn", "profile.train=1401", "epochs=3")
    assert said["data"].endswith("1,400 train, 99 valid, 99 test words, 849 classes")
    assert (said["taps"], said["norm layers"]) == ("2", "6 (RecurrentBatchNorm)")
    assert said["batches"] == "2 steps of 20 an epoch, 3 epochs, 6 steps"


def test_plan_counts_states_and_estimates_from_what_is_stored(command: Command, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert command("dataset.train=100", "epochs=1", "schedule.at=[1]", "seed=1", task=train.train, root="config")[0] == 0
    (result,) = runs.glob("*/*/result.json")
    result.write_text(json.dumps(json.loads(result.read_text()) | {"seconds": 7200.0}))  # two hours an epoch

    code, out, _ = command("table=tiny", "plan=true")
    assert code == 0 and len(list(runs.glob("*/*/result.json"))) == 1
    said = {label: dict(zip(grid(out)[""], cells, strict=True)) for label, cells in grid(out).items()}
    assert said["without"].items() >= {"runs": "2", "done": "1", "missing": "1", "hours": "2.00"}.items()
    assert said["with"].items() >= {"runs": "4", "done": "0", "missing": "4"}.items()
    assert float(said["with"]["hours"]) < 1  # another kind of run: timed, not taken from the stored one
    assert "6 different runs, 2.0" in out and "a stored run" in out and "timed steps" in out

    (config,) = runs.glob("*/*/config.yaml")  # of older code, which lacks a key: another kind, but no obstacle
    config.write_text(config.read_text().replace("channels_last: true\n", ""))
    code, out, _ = command("table=tiny", "plan=true", "probe=covariate_shift")
    assert code == 0 and "a stored run" not in out and out.count("timed steps; what the probe takes is not counted") == 1


def test_plan_says_what_it_cannot_know(command: Command, extra: Path) -> None:
    spec = (extra / "table" / "tiny.yaml").read_text().replace("dataset.train=100", "dataset.train=1")
    (extra / "table" / "away.yaml").write_text(spec)
    code, out, _ = command("table=away", "plan=true")
    assert code == 0 and out.count("| ?") == 2 and "at least 0.00 hours" in out and out.count("dataset.train=1: choose 10") == 1


@pytest.mark.parametrize(
    ("words", "minutes", "away"),
    [
        # steps, batches of the evaluation, and a checkpoint
        (('dataset=kmnist, batch_size=100, epochs=1, "schedule.at=[1]"', "itdm_c"), 600 + 50 + 1, "kmnist"),
        # windows of 20 columns, words of the evaluation in windows of 10, and a checkpoint
        pytest.param(("experiment=per_lstm, epochs=1, model.width=4", "per"), 1328 + 156_190 / 350 + 1, "ptb", marks=pytest.mark.slow),
    ],
)
def test_plan_without_the_data(
    command: Command, extra: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str], minutes: float, away: str
) -> None:
    """Each step, batch of the evaluation and checkpoint takes a minute: what counts is how many the official data set asks for."""
    seen = []
    seconds = plan._seconds
    monkeypatch.setattr(plan, "_seconds", lambda trainer, work: (seconds(trainer, work), seen.append(trainer), 60.0)[2])
    spec = (extra / "table" / "tiny.yaml").read_text().replace('dataset=digits, dataset.train=100, epochs=1, "schedule.at=[1]"', words[0])
    (extra / "table" / "away.yaml").write_text(spec.replace("itdm_c", words[1]))
    code, out, _ = command("table=away", "plan=true", "profile.test=null", *["evaluate.batch_size=200"] * (away == "kmnist"))
    assert code == 0 and f"{2 * minutes / 60:.2f}" in out and "unknown" not in out  # two runs of the first row
    assert out.count(f"timed steps on stand-in data: dataset: {away} is not under") == 1
    if away == "ptb":  # timed on windows of the official size, with its vocabulary
        assert {trainer.bundle.num_classes for trainer in seen} == {10_000} and {trainer.length.full for trainer in seen} == {15}


# whole papers


def test_every_table_and_figure_is_of_one_paper(command: Command) -> None:
    papers = paper.papers()
    assert list(papers) == ["itdm", "lamix", "per", "unitization"]
    of = [part for parts in papers.values() for part in parts]
    assert len(of) == len(set(of))
    every = {(kind, name) for kind in ("table", "figure") for name in options(kind)}
    assert all("demo" in name or name == "covariate_shift" for _, name in every - set(of))
    code, _, err = command("paper=nix", task=paper.run, root="papers")
    assert (code, err) == (2, "retable: paper: nix is not known; allowed: itdm, lamix, per, unitization, all\n")


@pytest.fixture
def mine(extra: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A paper of two tables, the first the dearer one, and a figure without runs. An epoch of any run takes six minutes."""
    (extra / "table" / "mine_1.yaml").write_text(SPEC.replace("epochs=1,", "epochs=3,"))
    claim = "claims: [{says: it wins, metric: test/accuracy, of: [plain], against: smoothed, relation: '>'}]"
    (extra / "table" / "mine_2.yaml").write_text(f"{FAILING}{claim}\n")
    names = {"mine": [("table", "mine_1"), ("table", "mine_2"), ("figure", "unitization_bounds")]}
    monkeypatch.setattr(paper, "papers", lambda: names)
    monkeypatch.setattr(plan, "measure", lambda cfg, timed: cost.Estimate(360.0, 1, 0, "made up"))
    return extra


def test_the_plan_is_cheapest_first_and_shared_runs_count_once(command: Command, mine: Path, tmp_path: Path) -> None:
    code, out, err = command("paper=mine", "plan=true", task=paper.run, root="papers")
    assert code == 0, err
    # epochs=3 for each of six runs, and 2 for each of six; not one is stored
    assert list(grid(out).items()) == [
        ("", ["runs", "shared", "missing", "hours"]),
        ("figure unitization_bounds", ["0", "0", "0", "0.00"]),
        ("table mine_2", ["6", "0", "6", "1.20"]),
        ("table mine_1", ["6", "0", "6", "1.80"]),
    ]
    assert "- 3.00 hours one after another\n" in out and not (tmp_path / "runs").exists()
    (mine / "table" / "mine_2.yaml").write_text((mine / "table" / "mine_1.yaml").read_text())
    _, out, _ = command("paper=mine", "plan=true", task=paper.run, root="papers")
    assert grid(out)["table mine_1"] == ["6", "0", "6", "1.80"] and grid(out)["table mine_2"] == ["6", "6", "6", "0.00"]


@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
def test_all_are_asked_for_and_their_verdicts_are_one_list(command: Command, mine: Path, tmp_path: Path) -> None:
    """A run diverges: the other tables are printed all the same, and the exit code is the worst."""
    words = ["profile.steps=1", "profile.seeds=1", "paper=mine", f"out={tmp_path}/out"]
    code, out, _ = command(*words, task=paper.run, root="papers")
    assert code == 1
    order = ["the plan", "[1/3] figure unitization_bounds", "[2/3]", "## A tiny table", "[3/3]", "## Six runs", "the verdicts"]
    assert sorted(order, key=out.index) == order and len(list((tmp_path / "runs").glob("*/*/result.json"))) == 9
    text = (tmp_path / "out" / "mine-verdicts.md").read_text()
    assert out.endswith(f"{text}\n{tmp_path}/out/mine-verdicts.md\n")
    assert re.search(r"^- mine_1: \*\*(not )?seen once\*\*: it helps \(.*\)$", text, re.MULTILINE)
    assert re.search(r"^- mine_2: \*\*(not )?seen once\*\*: it wins \(.*\)$", text, re.MULTILINE)


def test_on_a_cluster_all_are_submitted_first(command: Command, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is the worst of the parts', and their verdicts are counted."""
    asked = []
    ends = {"mine_2": (1, [("not run", "it wins (1 of 1)")]), "mine_1": (0, [("seen once", "it helps (2 of 2)")])}

    def ask(part: paper.Part, words: list[str], quiet: bool = False) -> tuple[int, list[tuple[str, str]]]:
        asked.append((part.name, quiet))
        assert {*given, f"--config-dir={mine}"} <= {*words} and ("wait=false" in words) == quiet
        return ends.get(part.name, (0, []))

    monkeypatch.setattr(paper, "ask", ask)
    given = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "seed=1"]
    code, out, _ = command("paper=mine", *given, f"out={tmp_path}/out", task=paper.run, root="papers")
    first = [("mine_2", True), ("mine_1", True)]
    assert code == 1 and asked == [*first, ("unitization_bounds", False), ("mine_2", False), ("mine_1", False)]
    counts = grid(out[out.index("the verdicts") :])
    assert counts["mine_2"][counts[""].index("not run")] == counts["mine_1"][counts[""].index("seen once")] == "1"
    assert "- mine_2: **not run**: it wins (1 of 1)\n- mine_1: **seen once**: it helps (2 of 2)\n" in out


def test_in_a_time_box_no_steps_are_timed_and_the_rest_is_left(command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(plan, "measure", None)  # which takes minutes
    monkeypatch.setattr(paper, "ask", lambda part, words: asked.append(part.name) or (0, []))
    monkeypatch.setattr(paper.timebox, "left", lambda runtime: runtime.time_limit * (2 - len(asked)))
    code, out, err = command("paper=mine", "runtime.time_limit=60", task=paper.run, root="papers")
    assert (code, err) == (0, "") and asked == ["mine_1", "mine_2"]
    assert out.endswith("\nthe time box has ended before figure unitization_bounds; ask again and it goes on\n")
