"""LaMix: pairs are averaged whatever the ratio, and the network learns part of the target (LaMix, eqs. 4 to 11)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from data.bundle import Batch
from models.net import Net
from regularizers.base import Pass, Regularizer
from regularizers.mixing import pairing, soft

GLOBAL, SCHEDULES = ("learned", "uniform", "none"), ("alternate", "double", "mixed_only")
TOP = 5  # so many of the largest entries of the target are logged, as in figure 2


class LaMix(Regularizer):
    """target = beta * local + (1 - beta) * p on batches of averaged pairs and, in turn with them, of single images (j = i).

    local_label: "lambda" y_i + (1 - lambda) y_j, lambda ~ U(0, 1), one for each batch (eq. 2 in eq. 10); "half": their average.
    global_label: "learned" p = softmax(sigmoid(W_t h)) (eq. 9); "uniform" 1 / K; "none": the target is the local label alone.
    detach_global: stop the gradient that the loss sends into p. Without it W_t learns nothing, and p stays near uniform.
    schedule: "alternate": even steps single images, odd ones pairs; "double": both of each batch, in two steps; "mixed_only": pairs.
    Decisions where the paper is silent: protocol sheet, section 0.
    """

    LOCAL: ClassVar[tuple[str, ...]] = ("lambda", "half")
    beta: Tensor

    def __init__(
        self,
        beta: float = 0.5,
        local_label: str = "lambda",
        global_label: str = "learned",
        detach_global: bool = False,
        schedule: str = "alternate",
    ) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: {beta} is not between 0 and 1")
        options = ("local_label", local_label, self.LOCAL), ("global_label", global_label, GLOBAL), ("schedule", schedule, SCHEDULES)
        for key, value, allowed in options:
            if value not in allowed:
                raise ValueError(f"{key}: {value!r} is not known; allowed: {', '.join(allowed)}")
        self.register_buffer("beta", torch.tensor(float(beta)), persistent=False)
        self.local_label, self.global_label, self.detach_global, self.schedule = local_label, global_label, detach_global, schedule
        if beta == 1:  # nothing is left for it (table 8)
            self.global_label = "none"
        self.steps_per_batch = 2 if schedule == "double" else 1
        self.head: nn.Linear | None = None
        self.mixed, self.target = True, torch.zeros(1, TOP)  # of the last step: whether it was of pairs, and its targets

    def setup(self, example: Pass) -> None:
        """W_t, as the classifier, with torch's start for a linear layer."""
        if self.global_label == "learned":
            (_, units), classes, device = example.features.shape, example.logits.shape[1], example.features.device
            # Its start is drawn below; what Linear itself draws is given back. (torch's skip_init imports SymPy: two seconds.)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self.head = nn.Linear(units, classes, device=device)
            for parameter in self.head.parameters():
                nn.init.uniform_(parameter, -(units**-0.5), units**-0.5, generator=self.rng)

    def choose(self, step: int) -> Hashable:
        self.mixed = self.schedule == "mixed_only" or step % 2 == 1
        return self.mixed

    def transform(self, batch: Batch, net: Net) -> Batch:
        device = batch.x.device
        lam = torch.full((), 0.5, device=device)
        if self.local_label == "lambda":
            lam.uniform_(generator=self.rng)
        partner = pairing(len(batch.x), self.rng, device)
        target = soft(batch.target, net.classifier.out_features)
        if not self.mixed:
            return replace(batch, target=target)
        x, share = self.mix(batch, partner, lam, net)
        return replace(batch, x=x, target=torch.lerp(target[partner], target, share))

    def mix(self, batch: Batch, partner: Tensor, lam: Tensor, net: Net) -> tuple[Tensor, Tensor]:
        """The images, each mixed with its partner [N], and the share of its own label in the local one: lam, a scalar, or [N, 1]."""
        return 0.5 * (batch.x + batch.x[partner]), lam

    def retarget(self, out: Pass) -> Tensor:
        target = self.joined(soft(out.batch.target, out.logits.shape[1]), out.features.float())
        self.target = target.detach()
        return target

    def joined(self, local: Tensor, h: Tensor) -> Tensor:
        """Eq. 10, [N, K]: the loss sends its gradient into p, by which W_t learns."""
        if self.global_label == "none":
            return local
        p = torch.full_like(local, 1 / local.shape[1]) if self.head is None else self.soft_label(h)
        return self.beta * local + (1 - self.beta) * (p.detach() if self.detach_global else p)

    def soft_label(self, h: Tensor) -> Tensor:
        """p, [N, K] (eq. 9). The sigmoid keeps its entries within a factor e: without it, p and the prediction confirm each other."""
        assert self.head is not None
        return self.head(h).sigmoid().softmax(1)

    def logged(self) -> dict[str, Tensor]:
        """The largest entries of the target, each step's mean over the batch: of pairs, and of single images (figure 2)."""
        top = self.target.topk(min(TOP, self.target.shape[1])).values.mean(0)
        share = top.new_full((), float(self.mixed))
        return {"mixed": share, "target_mixed": share * top, "target_clean": (1 - share) * top}
