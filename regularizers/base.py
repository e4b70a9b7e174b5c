"""What a method is: a module that acts in up to four stages of the training step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from data.bundle import Batch
from models.net import Net, Unrecorded

LOW_BITS = 1 << 16  # a bfloat16 is the upper half of a float32


@dataclass(frozen=True)
class Pass:
    """One batch after its forward: h = features [N, d], logits [N, K], and what flowed through the taps, first to last.

    preactivations: the activations before their non-linearity. Reading either raises AttributeError unless a method asks for it.
    """

    batch: Batch
    features: Tensor
    logits: Tensor
    activations: tuple[Tensor, ...] = Unrecorded()
    preactivations: tuple[Tensor, ...] = Unrecorded()


class Regularizer(nn.Module):
    """A method. The defaults of the four stages change nothing: override what the paper's method does.

    weight: the paper's lambda, a tensor on the device: a recorded step then reads it, like all that a sweep changes.
    active: False at weight 0: the method is left out of the run, which is then vanilla bit for bit.
    rng: the method's own generator, set by the trainer; drawing from any other would change the batches other methods see.
    second_batch: True asks the trainer for an independent second mini-batch, handed to `penalty` as `other`.
    activations, preactivations: True asks for those of each pass.
    sequences: True says that the method takes those too: h [N, T, d], logits [N, T, K], and a label for each of the T.
    edits: True says that `penalty` puts hooks on activations, which a compiled network would not call.
    steps_per_batch: so many steps are taken on each batch of an epoch, one after the other, augmented anew.
    passes: forward-backward passes over a batch that the method makes itself in this step, besides the trainer's; for what a run cost.
    """

    second_batch: ClassVar[bool] = False
    activations: ClassVar[bool] = False
    preactivations: ClassVar[bool] = False
    sequences: ClassVar[bool] = False
    edits: ClassVar[bool] = False
    steps_per_batch: int = 1
    passes: int = 0
    weight: Tensor
    rng: Generator

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(float(weight)), persistent=False)
        self.active = weight != 0

    def setup(self, example: Pass) -> None:
        """Once, before training: create extra parameters, now that shapes are known."""

    def choose(self, step: int) -> Hashable:
        """Before the step, on the host: what it branches on, such as the kind of the batch; None where all steps are alike.

        step: how many the run has made before this one. A recorded step is recorded for each value that is returned; the step itself
        reads what the method has kept of the choice.
        """
        return None

    def transform(self, batch: Batch, net: Net) -> Batch:
        """Before the forward, in its precision (autocast): what the batch becomes. Gradients that it leaves on weights are kept."""
        return batch

    def retarget(self, out: Pass) -> Tensor:
        """After the forward: the target that the loss will see."""
        return out.batch.target

    def penalty(self, out: Pass, other: Pass | None) -> Tensor | None:
        """What is added to the loss (a scalar, times `weight`), logged under the method's name."""
        return None

    def rounded(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """`gradient` [n, ...], float32, as `dtype`. To bfloat16 it is rounded stochastically, so that the expected value is exact.

        Rounding to nearest would drop every addition to a bfloat16 gradient that is below half a unit in its last place. The random bits
        of an element are a draw for its sample XOR a draw for its unit: n + d draws instead of n * d, independent between any two
        elements, so the variance of a sum is as with a draw for each element. NaN and infinities become NaN.
        """
        if dtype != torch.bfloat16:
            return gradient.to(dtype)
        flat = gradient.reshape(len(gradient), -1)
        sizes = (len(flat), 1), (1, flat.shape[1])
        of_sample, of_unit = (torch.randint(LOW_BITS, size, generator=self.rng, device=flat.device, dtype=torch.int32) for size in sizes)
        bits = (of_sample ^ of_unit).add_(flat.view(torch.int32)).bitwise_and_(-LOW_BITS)
        # The added random bits can carry a NaN's over to those of a number; adding 0 times the gradient makes it NaN again.
        return bits.view(torch.float32).add_(flat, alpha=0).to(dtype).view_as(gradient)

    def logged(self) -> dict[str, Tensor]:
        """After the backward: what else there is to see of this step, scalars or one value for each tap, on the device."""
        return {}
