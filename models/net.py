"""What every architecture offers to methods: `features`, `classifier` and `Tap`s."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]  # what conf/norm/*.yaml builds: channels -> layer


class Tap(nn.Identity):
    """An activation point: placed where the papers look at or penalise activations; changes nothing.

    What flows through it must not be overwritten afterwards: no in-place operation may follow.
    pre: it is the point before the non-linearity.
    sample_dims: how many leading dimensions count samples: 1 for [N, units...], 2 for a sequence [N, T, units].
    """

    def __init__(self, pre: bool = False, sample_dims: int = 1) -> None:
        super().__init__()
        self.pre, self.sample_dims = pre, sample_dims


def relu() -> list[nn.Module]:
    """A ReLU between its taps."""
    return [Tap(pre=True), nn.ReLU(), Tap()]


class Shift(nn.Module):
    """Adds one learned number, 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Net(nn.Module):
    """features: x [N, ...] -> h [N, d], the last hidden layer; classifier: h -> logits [N, K]; for a sequence [N, T, d] and [N, T, K]."""

    def __init__(self, features: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def reset(self) -> None:
        """Forget recurrent state, of training or of evaluation as the network's mode is; nothing to do unless there is some."""


class Unrecorded(tuple[Tensor, ...]):
    """Stands for activations that were not recorded: reading it raises AttributeError."""

    def _refuse(self, *_: object) -> NoReturn:
        raise AttributeError(
            "(pre)activations were read that no method asks for: add `activations = True` or `preactivations = True` to its class"
        )

    __iter__ = __getitem__ = __len__ = _refuse


class Recording(list[Tensor]):
    """The outputs of a network's taps in one forward, first to last, each [samples, units...]. Nothing is recorded while `on` is False."""

    on = True

    def restart(self, on: bool) -> None:
        """Clear the list, and record the next forwards only if `on`."""
        self.clear()
        self.on = on

    def seen(self) -> tuple[Tensor, ...]:
        """The outputs since the restart."""
        return tuple(self) if self.on else Unrecorded()


def record(net: nn.Module, pre: bool = False) -> Recording:
    """Hook a network's taps: those after the non-linearities or, with `pre`, those before.

    Returns the list that a forward appends to; call `restart` before each forward.
    """
    activations = Recording()

    def see(tap: Tap, _: object, out: Tensor) -> Tensor | None:
        if not activations.on:
            return None
        samples = out.flatten(0, tap.sample_dims - 1) if tap.sample_dims > 1 else out
        activations.append(samples)
        return samples.view_as(out)  # by way of the samples: a hook on their gradient then sees it, and may edit it

    for tap in (module for module in net.modules() if isinstance(module, Tap) and module.pre == pre):
        tap.register_forward_hook(see)
    return activations
