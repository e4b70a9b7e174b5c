"""The optimizer, and schedules: the factor on the learning rate as a function of time and of what validation has shown so far."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch

Schedule = Callable[[float, Sequence[float]], float]  # (epochs of the printed protocol so far, validation history) -> factor


class SGD(torch.optim.SGD):
    """torch's momentum SGD, without the wrappers that exempt its methods from compilation.

    Each of them imports torch's compiler when first called, only to switch it off: seconds of every start.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)


def constant(epoch: float, history: Sequence[float]) -> float:
    """The learning rate as given."""
    return 1.0


def steps(epoch: float, history: Sequence[float], at: Sequence[float], factor: float) -> float:
    """Times `factor` from each epoch in `at` on, in epochs of the printed protocol: a profile that shortens it moves them along."""
    return float(factor ** sum(epoch >= milestone - 1e-9 for milestone in at))
