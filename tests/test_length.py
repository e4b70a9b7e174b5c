"""How long a run is, when it is evaluated, and what its learning rate is at each step."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from test_trainer import data_home, train, trainer, watch

from experiments.length import Length
from experiments.optim import constant, steps

__all__ = ["data_home"]  # a fixture


def length(full: int, **words: object) -> Length:
    usual = {"epochs": 4, "iterations": None, "profile": {"epochs": 1, "steps": None}}
    return Length(OmegaConf.create(usual | words), full)


def evaluations(epochs: int, steps_per_epoch: int, every: int | None, dense: int) -> list[int]:
    return list(length(steps_per_epoch, epochs=epochs).evaluations(every, dense))


def test_evaluations_without_every() -> None:
    for dense in (0, 10):
        assert evaluations(3, 7, None, dense) == [7, 14, 21]


def test_evaluations_of_the_protocol() -> None:
    found = evaluations(50, 400, 50, 10)
    ends = [400 * epoch for epoch in range(1, 51)]
    last = [19_550, 19_600, 19_650, 19_700, 19_750, 19_800, 19_850, 19_900, 19_950, 20_000]
    assert found[-10:] == last  # every 50 steps: 8 points in the last epoch, 2 in the one before
    assert found == sorted({*ends, *last}) and len(found) == 58


def test_evaluations_by_hand() -> None:
    # 34 steps, every 5: six points and the end of the epoch
    assert evaluations(2, 34, 5, 10) == [25, 30, 34, 39, 44, 49, 54, 59, 64, 68]
    assert evaluations(2, 34, 5, 0) == [34, 68]
    assert evaluations(2, 34, 5, 3) == [34, 59, 64, 68]
    assert evaluations(2, 4, 2, 99) == [2, 4, 6, 8]
    assert evaluations(2, 3, 50, 10) == [3, 6]


def test_iterations_end_within_an_epoch() -> None:
    found = length(10, iterations=25, epochs=99)
    assert (found.epochs, found.steps, found.printed, list(found.evaluations(None, 10))) == (3, 25, 25, [10, 20, 25])
    assert list(found.evaluations(4, 3)) == [10, 20, 24, 25][-4:] and found.shown(10) == 10


@pytest.mark.parametrize(
    ("profile", "steps", "epochs"),
    [({"epochs": 0.2, "steps": None}, 13, 2), ({"epochs": 0, "steps": 2}, 2, 1), ({"epochs": 1, "steps": 2}, 13, 7)],
)
def test_a_profile_shortens_iterations(profile: dict[str, float], steps: int, epochs: int) -> None:
    found = length(10, iterations=65, profile=profile)
    assert (found.steps, found.epochs) == (steps, epochs) and found.shown(steps) == 65
    assert list(found.evaluations(None, 0))[-1] == steps and len(found.evaluations(None, 0)) == epochs


def test_a_run_makes_as_many_steps_as_its_iterations() -> None:
    made = train("iterations=7", epochs=2)  # 100 samples in batches of 20
    assert made.step == 7 == made.length.steps and made.epochs == 2
    assert [(row["step"], row["epoch"]) for row in made.rows] == [(5, 1.0), (7, pytest.approx(1.4))]


def test_a_smaller_last_batch_is_dropped_on_request() -> None:
    for drop, sizes in (("false", [30, 30, 30, 10]), ("true", [30, 30, 30])):
        seen: list[int] = []
        made = watch(trainer("batch_size=30", f"drop_last={drop}"), lambda batch, second, seen=seen: seen.append(len(batch.y)))  # type: ignore[misc]
        made.train_epoch()
        assert seen == sizes


# The schedule


def rates(*overrides: str, group: int = 0) -> list[float]:
    """The learning rate of every step, one step an epoch."""
    made, found = trainer("profile.train=20", "profile.test=10", "profile.steps=1", *overrides), []
    watch(made, lambda batch, second: found.append(float(made.optimizer.param_groups[group]["lr"])))
    while made.epoch < made.epochs:
        made.train_epoch()
    if group == 0:
        assert [row["lr"] for row in made.rows] == pytest.approx(found)
    return found


PROTOCOL = ["epochs=50", "optim.lr=0.01", "schedule.at=[20,40]", "schedule.factor=0.2"]


def test_learning_rate_of_the_printed_protocol() -> None:
    assert rates(*PROTOCOL) == pytest.approx([0.01] * 20 + [0.002] * 20 + [0.0004] * 10)


@pytest.mark.parametrize(("factor", "epochs"), [(0.1, (2, 2, 1)), (0.2, (4, 4, 2)), (0.5, (10, 10, 5)), (0, (1, 0, 0))])
def test_milestones_move_with_the_profile(factor: float, epochs: tuple[int, int, int]) -> None:
    wanted = [lr for lr, count in zip((0.01, 0.002, 0.0004), epochs, strict=True) for _ in range(count)]
    assert rates(*PROTOCOL, f"profile.epochs={factor}") == pytest.approx(wanted)


def test_biases_have_a_rate_of_their_own_at_every_stage() -> None:
    wanted = [0.01] * 20 + [0.002] * 20 + [0.0004] * 10
    assert rates(*PROTOCOL, "optim.bias_lr=0.1") == pytest.approx(wanted)
    assert rates(*PROTOCOL, "optim.bias_lr=0.1", group=1) == pytest.approx([lr / 10 for lr in wanted])


def test_cnn11_s_rates() -> None:
    """0.05, 0.01 from the 61st epoch on, 0.001 from the 101st, 0.0001 from the 141st (protocol sheet, 3.2)."""
    at, factor = [60, 100, 140], [0.2, 0.1, 0.1]
    found = [0.05 * steps(epoch, 0, [], at, factor) for epoch in (0, 59.99, 60, 99.99, 100, 139.99, 140, 199)]
    assert found == pytest.approx([0.05, 0.05, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_resnet110_s_warm_up() -> None:
    """0.01 for 400 iterations, then 0.1, a tenth of that at 32,000 and again at 48,000 (protocol sheet, 3.1)."""
    at, factor = [0, 400, 32_000, 48_000], [0.1, 10, 0.1, 0.1]
    found = [0.1 * steps(0, step, [], at, factor, by="iteration") for step in (0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert found == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_milestones_in_iterations_fall_within_epochs() -> None:
    words = ["epochs=2", "optim.lr=0.1", "schedule.at=[2,6]", "schedule.factor=0.5", "schedule.by=iteration"]
    made, found = trainer(*words), []
    watch(made, lambda batch, second: found.append(float(made.optimizer.param_groups[0]["lr"])))
    for _ in range(2):
        made.train_epoch()  # of five steps
    assert found == pytest.approx([0.1] * 2 + [0.05] * 4 + [0.025] * 4)


def test_a_warm_up_that_ends_with_an_epoch_ends_after_a_resume_too() -> None:
    words = ["epochs=2", "optim.lr=0.1", "schedule.at=[0,5]", "schedule.factor=[0.1,10]", "schedule.by=iteration"]
    whole, resumed = train(*words, epochs=1), trainer(*words)
    resumed.load(whole.state())
    for made in (whole, resumed):
        made.train_epoch()
        assert [row["lr"] for row in made.rows] == pytest.approx([0.01, 0.1])
        assert [float(group["lr"]) for group in made.optimizer.param_groups] == pytest.approx([0.1])


def test_constant_schedule() -> None:
    assert rates("schedule=constant", "epochs=3", "optim.lr=0.03") == pytest.approx([0.03] * 3)
    assert constant(17, 170, []) == 1
    assert [steps(epoch, 0, [], [8, 16], 0.5) for epoch in (0, 7.99, 8, 15.9, 16, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("words", "message"),
    [({"by": "week"}, "by: 'week' is not known; allowed: epoch, iteration"), ({"factor": [0.1]}, "factor: 1 numbers for 2 milestones")],
)
def test_refused_schedules(words: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        steps(0, 0, [], **({"at": [1, 2], "factor": 0.1} | words))  # type: ignore[arg-type]
