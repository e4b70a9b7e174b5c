"""The labels that LaMix learns, epoch by epoch, for one mini-batch of pairs that never changes: `probe=soft_labels` (LaMix, figure 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from data.bundle import Batch
from experiments.config import ConfigError
from experiments.rng import generator
from experiments.trainer import Row, Trainer
from regularizers.lamix import LaMix
from regularizers.mixing import pairing, soft


class SoftLabels:
    """Histograms over 0 .. 1 of all entries of the target, and of the global label p, of `samples` averaged pairs of training images.

    Images and pairs are the same in all epochs, and not augmented; the forward is a training one, by the batch's statistics, which no
    running ones remember. The ratio of the local labels is drawn anew each epoch, from the epoch's own generator.
    Of pairs of different classes, the means of the largest and the second largest entry of p; of all, the largest of the target.
    """

    def __init__(self, samples: int = 128, bins: int = 100) -> None:
        if samples < 2 or bins < 1:
            raise ValueError(f"samples: {samples}, bins: {bins} are not allowed; at least 2 samples and 1 bin")
        self.samples, self.bins = samples, bins

    def begin(self, trainer: Trainer) -> Row:
        """The untrained network, before the first step."""
        return {} if trainer.step else self.measure(trainer, 0)

    def end(self, trainer: Trainer) -> Row:
        return self.measure(trainer, trainer.epoch + 1)

    def measure(self, trainer: Trainer, epoch: int) -> Row:
        method = next((one for one in trainer.regularizers.values() if isinstance(one, LaMix) and one.head is not None), None)
        if method is None:
            raise ConfigError("probe: soft_labels looks at the label that method lamix learns, and this run has none")
        x, y = trainer.bundle.splits["train"]
        rng = generator(0, "soft labels", x.device)
        chosen = torch.randperm(len(y), generator=rng, device=y.device)[: self.samples]
        partner = pairing(len(chosen), rng, y.device)
        lam = torch.rand((), generator=generator(epoch, "ratio", y.device), device=y.device)
        image, y = trainer.bundle.prepare(x[chosen]), y[chosen]
        with torch.no_grad():
            h = untouched(trainer, Batch(0.5 * (image + image[partner]), y, y))
            local = soft(y, trainer.bundle.num_classes)
            p = method.soft_label(h)
            target = method.joined(torch.lerp(local[partner], local, lam), h)
        different = y != y[partner]
        first, second = p[different].topk(2).values.mean(0).tolist()
        row = {"soft_labels/first": first, "soft_labels/second": second, "soft_labels/target_largest": float(target.max())}
        for name, values in (("target", target), ("global", p)):
            counts = torch.histc(values.float().cpu(), self.bins, 0, 1).tolist()
            row |= {f"histogram/{name}/{place:02d}": count for place, count in enumerate(counts)}
        return row


def untouched(trainer: Trainer, batch: Batch) -> Tensor:
    """The last hidden layer [N, d], float32, of a forward in training mode after which network and random numbers are as before."""
    net, device = trainer.net, trainer.device
    kept = {name: value.clone() for name, value in net.named_buffers()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        h = trainer.forward(batch).features.float()
    for name, value in net.named_buffers():
        value.copy_(kept[name])
    return h
