"""The optimizer, and schedules: the factor on the learning rate as a function of time and of what validation has shown so far."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

# (epochs, steps of the printed protocol so far, the validation losses of the epochs so far) -> factor on the learning rate. The losses
# are None where nothing is held out.
History = Sequence[float] | None
Schedule = Callable[[float, float, History], float]
SMALL = ("bias", "scale")  # the last part of the names of parameters that have a learning rate of their own


class SGD(torch.optim.SGD):
    """torch's momentum SGD, without the wrappers that exempt its methods from compilation.

    Each of them imports torch's compiler when first called, only to switch it off: seconds of every start.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)


def groups(modules: Iterable[nn.Module], optim: DictConfig, device: torch.device) -> list[dict[str, Any]]:
    """The parameters as SGD takes them: a group for each learning rate and decay.

    `factor` is a group's own on the learning rate, which is a tensor on the device: a recorded step reads its value anew.
    """
    found: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in (pair for module in modules for pair in module.named_parameters()):
        small = name.rpartition(".")[2] in SMALL
        decays = {"all": True, "weights": not small, "kernels": parameter.dim() > 1}[optim.decay]
        found.setdefault((optim.bias_lr if small else 1.0, optim.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": torch.tensor(factor * optim.lr, device=device), "factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in found.items()
    ]


@torch.no_grad()
def clip(parameters: Iterable[Tensor], most: float, each: bool) -> None:
    """Scale gradients down to the norm `most`: each parameter's by its own norm, or all by their common one; in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if not each:
        norms = torch.linalg.vector_norm(norms).expand_as(norms)
    torch._foreach_mul_(gradients, list((most / (norms + 1e-6)).clamp(max=1).unbind()))


def constant(epoch: float, step: float, history: History) -> float:
    """The learning rate as given."""
    return 1.0


def steps(epoch: float, step: float, history: History, at: Sequence[float], factor: float | Sequence[float], by: str = "epoch") -> float:
    """Times `factor`, or the one of its numbers that belongs to it, from each milestone in `at` on.

    by: "epoch" or "iteration", what milestones count, in the printed protocol: a profile that shortens it moves them along.
    Raises ValueError for an unknown name, or another number of factors than of milestones.
    """
    if by not in ("epoch", "iteration"):
        raise ValueError(f"by: {by!r} is not known; allowed: epoch, iteration")
    factors = [factor] * len(at) if isinstance(factor, int | float) else factor
    if len(factors) != len(at):
        raise ValueError(f"factor: {len(factors)} numbers for {len(at)} milestones")
    now = epoch if by == "epoch" else step
    return math.prod(float(one) for milestone, one in zip(at, factors, strict=True) if now >= milestone - 1e-6)


def plateau(epoch: float, step: float, history: History, factor: float) -> float:
    """Times `factor` after each epoch whose validation loss is not below the best so far (PyTorch's word language model).

    Raises ValueError where nothing is held out.
    """
    if history is None:
        raise ValueError("plateau goes by a split `valid`, which the data set lacks; set dataset.valid, or choose another schedule")
    rate, best = 1.0, math.inf
    for loss in history:
        rate, best = (rate, loss) if loss < best else (rate * factor, best)
    return rate
