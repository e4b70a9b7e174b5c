"""Schedules: the factor on the learning rate as a function of time and of what validation has shown so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Schedule = Callable[[float, Sequence[float]], float]  # (epochs of the printed protocol so far, validation history) -> factor


def constant(epoch: float, history: Sequence[float]) -> float:
    """The learning rate as given."""
    return 1.0


def steps(epoch: float, history: Sequence[float], at: Sequence[float], factor: float) -> float:
    """Times `factor` from each epoch in `at` on, in epochs of the printed protocol: a profile that shortens it moves them along."""
    return float(factor ** sum(epoch >= milestone - 1e-9 for milestone in at))
