"""The optimizer, and schedules: the factor on the learning rate as a function of time and of what validation has shown so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import SGD, Optimizer

Schedule = Callable[[float, Sequence[float]], float]  # (epochs of the printed protocol so far, validation history) -> factor


def constant(epoch: float, history: Sequence[float]) -> float:
    """The learning rate as given."""
    return 1.0


def steps(epoch: float, history: Sequence[float], at: Sequence[float], factor: float) -> float:
    """Times `factor` from each epoch in `at` on, in epochs of the printed protocol: a profile that shortens it moves them along."""
    return float(factor ** sum(epoch >= milestone - 1e-9 for milestone in at))


def sgd(parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> SGD:
    """Momentum SGD as one fused kernel over all parameters."""
    # Each of these methods imports torch's compiler when first called, only to exempt itself from it: seconds of every start.
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain
    return SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
