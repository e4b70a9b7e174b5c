"""Penalties on every tapped activation, as backward edits: the forward is left alone, and so is what it keeps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regularizers.base import Pass, Regularizer

REDUCTIONS, SPATIAL = ("sum", "mean"), ("units", "samples")
SEEN = 16  # of a batch's samples are looked at for the log: all of them would cost as much as the penalty itself


class ActivationPenalty(Regularizer):
    """Adds weight * the penalty's gradient to what arrives at each tap in the backward pass; a subclass gives it by `pull`.

    batch_reduction: "sum" adds it to every sample as it is, as PER's algorithm 1 prints; "mean" divides by the samples, as its eq. 6.
    spatial: what a position of a map is: "units", part of its image's activation h_i in R^(C H W); "samples", an h_i in R^C of its own.
    Logged for each tap, of the first 16 samples of each batch: the mean penalty before the weight, the activations' RMS, and the
    share a / (a + g) of what is added, a and g being the lengths of that and of the gradient to which it is added.
    """

    activations = True
    sequences = True
    edits = True

    def __init__(self, weight: float, batch_reduction: str = "sum", spatial: str = "units") -> None:
        super().__init__(weight)
        for key, value, allowed in (("batch_reduction", batch_reduction, REDUCTIONS), ("spatial", spatial, SPATIAL)):
            if value not in allowed:
                raise ValueError(f"{key}: {value!r} is not known; allowed: {', '.join(allowed)}")
        self.batch_reduction, self.spatial = batch_reduction, spatial
        self.measured: list[Tensor] = []  # of each tap: loss, RMS, lengths of what is added and of the gradient

    def pull(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For samples h [n, d] in float32: the penalties of the first SEEN, and the gradient of the penalty as scale * direction.

        scale is a scalar or [n, 1]; direction [n, d] is h itself or a new tensor, which is then written over.
        """
        raise NotImplementedError

    def penalty(self, out: Pass, other: Pass | None) -> Tensor | None:
        self.measured = [out.logits.new_zeros(4, dtype=torch.float32)] * len(out.activations)
        for place, h in enumerate(out.activations):
            h.register_hook(partial(self.edit, h.detach(), place))  # detached: a hook that held h itself would keep it for ever
        return None

    @torch.no_grad()
    def edit(self, h: Tensor, place: int, gradient: Tensor) -> Tensor:
        """The gradient with respect to the tap's h, edited."""
        samples, incoming = (self.rows(one, h).float() for one in (h, gradient))
        loss, scale, direction = self.pull(samples)
        scale = self.weight * scale / (len(samples) if self.batch_reduction == "mean" else 1)
        seen = samples[:SEEN]
        added = (scale[:SEEN] if scale.dim() else scale) * direction[:SEEN]
        rms, *lengths = (torch.linalg.vector_norm(x) for x in (seen, added, incoming[:SEEN]))
        self.measured[place] = torch.stack([loss.mean(), rms / seen.numel() ** 0.5, *lengths])
        edited = torch.addcmul(incoming, direction, scale, out=None if direction is samples else direction)
        return self.unrows(self.rounded(edited, gradient.dtype), h)

    def logged(self) -> dict[str, Tensor]:
        if not self.measured:
            return {}
        loss, rms, added, incoming = torch.stack(self.measured, 1)
        return {"loss": loss, "rms": rms, "share": added / (added + incoming).clamp(min=torch.finfo(torch.float32).tiny)}

    def rows(self, x: Tensor, h: Tensor) -> Tensor:
        """x, of the shape of h [N, d] or [N, C, H, W], as [samples, units]: a view when x lies in memory as h does."""
        if h.dim() == 4 and (self.spatial == "samples" or h.is_contiguous(memory_format=torch.channels_last)):
            x = x.permute(0, 2, 3, 1)
        return x.reshape(-1, h.shape[1]) if self.spatial == "samples" else x.reshape(len(h), -1)

    def unrows(self, x: Tensor, h: Tensor) -> Tensor:
        """The way back of `rows`."""
        if h.dim() == 4 and (self.spatial == "samples" or h.is_contiguous(memory_format=torch.channels_last)):
            return x.view(len(h), *h.shape[2:], h.shape[1]).permute(0, 3, 1, 2)
        return x.view(h.shape)


class Lp(ActivationPenalty):
    """The sum of |h|^p over a sample's units (PER, section 3.1), p = 1 or 2: its gradient is sign(h), or 2 h."""

    def __init__(self, weight: float, p: int, batch_reduction: str = "sum", spatial: str = "units") -> None:
        super().__init__(weight, batch_reduction, spatial)
        if p not in (1, 2):
            raise ValueError(f"p: {p} is not allowed; allowed: 1, 2")
        self.p = p

    def pull(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.p == 1:
            return torch.linalg.vector_norm(h[:SEEN], 1, dim=1), h.new_ones(()), h.sign()
        return h[:SEEN].square().sum(1), h.new_full((), 2.0), h
