"""What every architecture offers to methods: `features`, `classifier` and `Tap`s."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Norm = Callable[[int], nn.Module]  # what conf/norm/*.yaml builds: channels -> layer


class Tap(nn.Identity):
    """An activation point: placed where the papers look at or penalise activations; changes nothing.

    sample_dims: how many leading dimensions count samples: 1 for [N, units...], 2 for a sequence [N, T, units].
    """

    def __init__(self, sample_dims: int = 1) -> None:
        super().__init__()
        self.sample_dims = sample_dims


class Net(nn.Module):
    """features: x [N, ...] -> h [N, d], the last hidden layer; classifier: h -> logits [N, K]."""

    def __init__(self, features: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def reset(self) -> None:
        """Forget recurrent state; nothing to do unless there is some."""


def record(net: nn.Module) -> list[Tensor]:
    """A list that fills, at each forward, with what flows through the taps, first to last: [samples, units...] each.

    The caller clears it before a forward.
    """
    activations: list[Tensor] = []
    for tap in (module for module in net.modules() if isinstance(module, Tap)):
        tap.register_forward_hook(
            lambda tap, _, out: activations.append(out.flatten(0, tap.sample_dims - 1) if tap.sample_dims > 1 else out)
        )
    return activations
