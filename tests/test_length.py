"""Tests of the length of a run, the steps at which it is evaluated, and its learning rate at each step."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from trainers import data_home, train, trainer, watch

from experiments.length import Length
from experiments.optim import steps

__all__ = ["data_home"]  # a fixture


def length(full: int, **words: object) -> Length:
    usual = {"epochs": 4, "iterations": None, "profile": {"epochs": 1, "steps": None}}
    return Length(OmegaConf.create(usual | words), full)


@pytest.mark.parametrize(
    ("epochs", "full", "every", "dense", "wanted"),
    [
        (3, 7, None, 10, [7, 14, 21]),
        (2, 34, 5, 10, [25, 30, 34, 39, 44, 49, 54, 59, 64, 68]),  # 34 steps, every 5: six points and the end of the epoch
        (2, 34, 5, 0, [34, 68]),
        (2, 34, 5, 3, [34, 59, 64, 68]),
        (2, 4, 2, 99, [2, 4, 6, 8]),
        (2, 3, 50, 10, [3, 6]),
        # ITDM's protocol: of the last ten points 50 steps apart eight lie in the last epoch, two in the epoch before
        (50, 400, 50, 10, sorted({*range(400, 20_001, 400), *range(19_550, 20_001, 50)})),
    ],
)
def test_evaluations(epochs: int, full: int, every: int | None, dense: int, wanted: list[int]) -> None:
    assert list(length(full, epochs=epochs).evaluations(every, dense)) == wanted


def test_iterations_end_within_an_epoch() -> None:
    found = length(10, iterations=25, epochs=99)
    assert (found.epochs, found.steps, found.printed, list(found.evaluations(None, 10))) == (3, 25, 25, [10, 20, 25])
    assert list(found.evaluations(4, 3)) == [10, 20, 24, 25] and found.shown(10) == 10
    made = train("iterations=7", epochs=2)  # 100 samples in batches of 20
    assert made.step == 7 == made.length.steps and made.epochs == 2
    assert [(row["step"], row["epoch"]) for row in made.rows] == [(5, 1.0), (7, pytest.approx(1.4))]


def test_a_profile_shortens_iterations() -> None:
    for factor, most, count, epochs in ((0.2, None, 13, 2), (0, 2, 2, 1), (1, 2, 13, 7)):
        cut = length(10, iterations=65, profile={"epochs": factor, "steps": most})
        assert (cut.steps, cut.epochs) == (count, epochs) and cut.shown(count) == 65
        assert list(cut.evaluations(None, 0))[-1] == count and len(cut.evaluations(None, 0)) == epochs


def test_a_smaller_last_batch_is_dropped_on_request() -> None:
    for drop, sizes in (("false", [30, 30, 30, 10]), ("true", [30, 30, 30])):
        seen: list[int] = []
        made = watch(trainer("batch_size=30", f"drop_last={drop}"), lambda batch, second, seen=seen: seen.append(len(batch.y)))  # type: ignore[misc]
        made.train_epoch()
        assert seen == sizes


# The schedule


def rates(*overrides: str, group: int = 0) -> list[float]:
    """The learning rate of every step."""
    made, found = trainer("profile.test=10", *overrides), []
    watch(made, lambda batch, second: found.append(float(made.optimizer.param_groups[group]["lr"])))
    while made.epoch < made.epochs:
        made.train_epoch()
    return found


PROTOCOL = ["epochs=50", "optim.lr=0.01", "schedule.at=[20,40]", "schedule.factor=0.2", "profile.train=20", "profile.steps=1"]


def test_milestones_in_epochs_move_with_the_profile() -> None:
    """One step an epoch. Biases have a rate of their own at every stage."""
    biases = rates(*PROTOCOL, "optim.bias_lr=0.1", group=1)
    assert biases == pytest.approx([0.001] * 20 + [0.0002] * 20 + [0.00004] * 10)
    for factor, epochs in {1: (20, 20, 10), 0.1: (2, 2, 1), 0: (1, 0, 0)}.items():
        wanted = [lr for lr, count in zip((0.01, 0.002, 0.0004), epochs, strict=True) for _ in range(count)]
        assert rates(*PROTOCOL, f"profile.epochs={factor}") == pytest.approx(wanted)
    assert rates("schedule=constant", "profile.steps=1", "epochs=3", "optim.lr=0.03") == pytest.approx([0.03] * 3)


def test_milestones_in_iterations_fall_within_epochs() -> None:
    words = ["epochs=2", "optim.lr=0.1", "schedule.at=[2,6]", "schedule.factor=0.5", "schedule.by=iteration"]  # five steps an epoch
    assert rates(*words) == pytest.approx([0.1] * 2 + [0.05] * 4 + [0.025] * 4)


def test_rates_of_the_papers_protocols() -> None:
    """CNN11: 0.05, 0.01 from the 61st epoch on, 0.001 from the 101st, 0.0001 from the 141st (protocol sheet, 3.2). ResNet-110: 0.01 for 400
    iterations, then 0.1, a tenth of that at 32,000 and again at 48,000 (3.1)."""
    found = [0.05 * steps(epoch, 0, [], [60, 100, 140], [0.2, 0.1, 0.1]) for epoch in (0, 59.99, 60, 99.99, 100, 139.99, 140, 199)]
    assert found == pytest.approx([0.05, 0.05, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    at, factor, times = [0, 400, 32_000, 48_000], [0.1, 10, 0.1, 0.1], (0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999)
    found = [0.1 * steps(0, step, [], at, factor, by="iteration") for step in times]
    assert found == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_warm_up_that_ends_with_an_epoch_ends_after_a_resume_too() -> None:
    words = ["epochs=2", "optim.lr=0.1", "schedule.at=[0,5]", "schedule.factor=[0.1,10]", "schedule.by=iteration"]
    whole, resumed = train(*words, epochs=1), trainer(*words)
    resumed.load(whole.state())
    for made in (whole, resumed):
        made.train_epoch()
        assert [row["lr"] for row in made.rows] == pytest.approx([0.01, 0.1])
        assert [float(group["lr"]) for group in made.optimizer.param_groups] == pytest.approx([0.1])


def test_refused_schedules() -> None:
    with pytest.raises(ValueError, match=r"^by: 'week' is not known; allowed: epoch, iteration$"):
        steps(0, 0, [], [1, 2], 0.1, by="week")
    with pytest.raises(ValueError, match=r"^factor: 1 numbers for 2 milestones$"):
        steps(0, 0, [], [1, 2], [0.1])
