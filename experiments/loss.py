"""What a run minimises on its targets, besides the methods' penalties: a property of the protocol (config key `loss`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import binary_cross_entropy, cross_entropy

from regularizers.mixing import soft


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """The binary cross-entropy of softmax(logits) [N, K] in every class, mean over the N x K: the loss of PuzzleMix's published code.

    target: labels [N] or class probabilities [N, K]. About 2 / K of the cross-entropy, which its learning rates go with.
    """
    p, q = logits.softmax(1).clamp(max=1), soft(target, logits.shape[1])  # rounding can pass 1
    # binary_cross_entropy raises on NaN, on a GPU by a device assertion that ends the process. The last term is 0, or NaN where p or q is.
    return binary_cross_entropy(p.nan_to_num(), q.nan_to_num()) + 0 * (p + q).sum()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "bce": bce}
