"""PuzzleMix: of each block the image whose part is more salient is shown, or half of each (Kim et al. 2020; LaMix, section 3.2)."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.bundle import Batch
from models.net import Net
from regularizers.base import Pass, Regularizer
from regularizers.mixing import pairing, ratio, soft
from regularizers.puzzle_mask import cell, energy, minimum, shares
from regularizers.puzzle_transport import assignment, moved

FINEST = 16  # blocks a side, for which `mask_iters` is


class PuzzleMix(Regularizer):
    """x -> z T(x_i) + (1 - z) T'(x_j), z in {0, 1/2, 1} for each block, and the target in the ratio of z's mean, each pair's own.

    One ratio lambda ~ Beta(alpha, alpha), for the prior of z, one pairing, and one grid of blocks x blocks for each batch.
    prob: the part of the batches that is mixed. blocks: the grids; of these, those that divide the images.
    beta, gamma, eta, neigh_size: the energy's, see `puzzle_mask.energy`. mask_iters: steps of the solver of its minimum on 16 x 16 blocks,
    on coarser ones in proportion; 200 find it for these settings.
    transport: whether cells of the images are moved, T; t_size: their side in pixels, or a little more (None: whole blocks); t_eps: what
    distance costs.
    clean_lam: 0: saliency is seen in evaluation mode, by the gradient with respect to the images alone; above 0: in training mode,
    and the gradient of the weights on the unmixed batch counts so much in the step, in the scale of a binary cross-entropy.
    Published code where the paper is silent; its int32 graph cut is replaced by the exact one (protocol sheet, 1.6).
    """

    alpha: Tensor

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 1.0,
        blocks: Sequence[int] = (2, 4, 8, 16),
        beta: float = 1.2,
        gamma: float = 0.5,
        eta: float = 0.2,
        neigh_size: int = 4,
        transport: bool = True,
        t_size: int | None = None,
        t_eps: float = 0.8,
        clean_lam: float = 0.0,
        mask_iters: int = 200,
    ) -> None:
        super().__init__(weight=prob)
        for name, value, good, wanted in (
            ("alpha", alpha, alpha > 0, "above 0"),
            ("prob", prob, 0 <= prob <= 1, "between 0 and 1"),
            ("blocks", [*blocks], blocks and min(blocks) >= 2, "a list of numbers of at least 2"),
            ("beta", beta, beta >= 0, "at least 0"),
            ("gamma", gamma, 0 <= gamma < 1, "at least 0 and below 1"),
            ("eta", eta, eta >= 0, "at least 0"),
            ("neigh_size", neigh_size, neigh_size >= 1, "at least 1"),
            ("t_size", t_size, t_size is None or t_size >= 1, "at least 1, or null"),
            ("t_eps", t_eps, t_eps >= 0, "at least 0"),
            ("clean_lam", clean_lam, clean_lam >= 0, "at least 0"),
            ("mask_iters", mask_iters, mask_iters >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"{name}: {value} is not allowed; it must be {wanted}")
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64), persistent=False)
        self.prob, self.blocks, self.clean_lam, self.mask_iters = prob, [*blocks], clean_lam, mask_iters
        self.beta, self.gamma, self.eta, self.neigh_size = beta, gamma, eta, neigh_size
        self.transport, self.t_size, self.t_eps = transport, t_size, t_eps

    def setup(self, example: Pass) -> None:
        """Raises ValueError for images that no grid divides, or whose pixels are not known."""
        height, width = example.batch.x.shape[2:]
        self.blocks = [n for n in self.blocks if height == width and width % n == 0]
        if not self.blocks:
            raise ValueError(f"blocks: none of them divides images of {height}x{width}, which must be square")
        if example.batch.scale is None:
            raise ValueError("it compares pixels, which must be known but for a constant: choose dataset.standardise=channels")
        # The host draws what it must know. It cannot read from the device at every step, so it does once.
        self.key = int(torch.randint(2**62, (), generator=self.rng, device=example.features.device))

    def choose(self, step: int) -> Hashable:
        draw = random.Random(f"{self.key} {step}")
        self.passes = int(draw.random() < self.prob)
        self.n = draw.choice(self.blocks)
        return self.n if self.passes else None

    def transform(self, batch: Batch, net: Net) -> Batch:
        target = soft(batch.target, net.classifier.out_features)
        if not self.passes:
            return replace(batch, target=target)
        partner = pairing(len(batch.x), self.rng, batch.x.device)
        lam = ratio(self.alpha, torch.ones_like(self.alpha), self.rng)
        x, share = self.mix(batch, partner, lam, net)
        return replace(batch, x=x, target=torch.lerp(target[partner], target, share[:, None]))

    def mix(self, batch: Batch, partner: Tensor, lam: Tensor, net: Net) -> tuple[Tensor, Tensor]:
        """The batch's images mixed with their partners [N]; and the share [N] of the first in each. lam, a scalar: the prior's."""
        z, saliency = self.mask(batch, partner, lam, net)
        return self.blend(batch.x, partner, z, saliency), z.mean((1, 2))

    def mask(self, batch: Batch, partner: Tensor, lam: Tensor, net: Net) -> tuple[Tensor, Tensor]:
        """The shares z of the first image in each block, [N, n, n], and the saliency [N, H, H] that they follow from."""
        assert batch.scale is not None
        saliency, pixels = self.saliency(batch, net), batch.x.float() * batch.scale
        costs = energy(saliency, pixels, partner, lam, self.n, self.beta, self.gamma, self.eta, self.neigh_size)
        return minimum(costs, max(1, self.mask_iters * self.n // FINEST)).permute(2, 0, 1) / 2, saliency

    def blend(self, x: Tensor, partner: Tensor, z: Tensor, saliency: Tensor) -> Tensor:
        """Images x mixed with their partners as `mask` says."""
        first, second = x, x[partner]
        if self.transport:
            first, second = self.transported(first, second, z, torch.stack([saliency, saliency[partner]]))
        shown = finer(z, x.shape[2])[:, None].to(x.dtype)
        return shown * first + (1 - shown) * second

    def transported(self, first: Tensor, second: Tensor, z: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
        """Both images of each pair, cells moved to where the mask shows them. saliency: [2, N, H, H], of the first and the second."""
        size, block = first.shape[2], first.shape[2] // self.n
        side = size // (block if self.t_size is None else cell(block, self.t_size))
        mask, each = finer(z, side), shares(saliency.flatten(0, 1), side)
        source, taken = assignment(torch.cat([mask, 1 - mask]), each, self.t_eps)
        moved_first, moved_second = moved(torch.cat([first, second]), source, taken).chunk(2)
        return moved_first, moved_second

    def saliency(self, batch: Batch, net: Net) -> Tensor:
        """The norm over channels of the loss's gradient at each pixel, [N, H, W], of the batch as it is; up to a factor."""
        x, training = batch.x.detach().requires_grad_(), net.training
        net.train(self.clean_lam > 0)
        logits = net(x).float()
        loss = cross_entropy(logits, batch.target)
        if self.clean_lam > 0:
            (2 * self.clean_lam / logits.shape[1] * loss).backward(inputs=[x, *net.parameters()])
            gradient = x.grad
        else:
            (gradient,) = torch.autograd.grad(loss, x)
        net.train(training)
        assert gradient is not None
        return gradient.float().square().mean(1).sqrt()


def finer(z: Tensor, side: int) -> Tensor:
    """Squares [N, n, n] of so many cells a side: each block's value for all of its cells."""
    times = side // z.shape[1]
    return z.repeat_interleave(times, 1).repeat_interleave(times, 2)
