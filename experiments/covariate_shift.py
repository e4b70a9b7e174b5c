"""The EM distance between the laws of a layer's outputs before and after some training, as a critic sees it (Unitization, algorithm 3)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from data.bundle import Batch
from experiments.config import ConfigError
from experiments.rng import generator
from experiments.trainer import Row, Trainer

MAPS, STRIDES = (64, 64, 128, 128), (2, 1, 2, 1)


def critic(shape: tuple[int, ...], rng: Generator) -> nn.Sequential:
    """f_w before its sigmoid, for outputs [N, C, H, W] of that C, H, W -> [N, 1]: four 3x3 convolutions with ReLU, then one unit.

    Starts as He et al. 2015 from `rng`, a CPU generator, and from no other; biases 0. The padding of 1 is our choice, the paper names none.
    """
    layers: list[nn.Module] = []
    channels, height, width = shape
    for maps, stride in zip(MAPS, STRIDES, strict=True):
        layers += [skip_init(nn.Conv2d, channels, maps, 3, stride, padding=1), nn.ReLU()]
        channels, height, width = maps, -(-height // stride), -(-width // stride)
    net = nn.Sequential(*layers, nn.Flatten(), skip_init(nn.Linear, channels * height * width, 1))
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=rng)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return net


def ascend(net: nn.Sequential, old: Tensor, new: Tensor, chosen: Tensor, clip: float, lr: float) -> None:
    """Trains the critic to tell the outputs `new` from `old`, [N, C, H, W] of the same N samples: a step for each line of `chosen` [T, n].

    Ascends the mean of f_w(new) - f_w(old) over the line's samples, and after each step clips every parameter, biases too, to
    [-clip, clip]. The paper leaves the rule open; it is RMSprop with smoothing 0.9, as in its reference for WGAN. Old and new pass apart:
    of equal ones outputs and gradients then cancel to the last bit.
    """
    optimizer = torch.optim.RMSprop(net.parameters(), lr, alpha=0.9, maximize=True, foreach=True)
    parameters: list[Tensor] = list(net.parameters())
    for some in chosen:
        gain = (torch.sigmoid(net(new[some])) - torch.sigmoid(net(old[some]))).mean()
        optimizer.zero_grad()
        gain.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_clamp_min_(parameters, -clip)
            torch._foreach_clamp_max_(parameters, clip)


@torch.no_grad()
def distance(net: nn.Sequential, old: Tensor, new: Tensor, batch_size: int = 1000) -> tuple[float, float]:
    """d, the mean of f_w(new) - f_w(old) over the samples, below 1 in size; and the same before the sigmoid, which does not saturate."""
    logits = [(net(a), net(b)) for a, b in zip(new.split(batch_size), old.split(batch_size), strict=True)]
    after, before = (torch.cat(some).double() for some in zip(*logits, strict=True))
    return float((after.sigmoid() - before.sigmoid()).mean()), float((after - before).mean())


class CovariateShift:
    """How far each epoch moves the laws of layers' outputs: EM distances by a critic each (Unitization, algorithm 3).

    layers: which norm layers, from 1 on, or in general which points before a non-linearity; None: the last six. steps, batch, clip,
    lr: of the critic's training (T, n, c), which starts from the same weights and draws the same samples in every estimate. images: it
    is trained on the first so many training images, without augmentation; None: all, and both copies of their outputs are held in memory.
    The network is in evaluation mode, with the running statistics of its time. Of each layer, on test images: em, d, and em_logit, the
    mean difference before the critic's sigmoid; of all: shift/em and shift/em_logit, their means. Old and new are those of one epoch.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        steps: int = 1500,
        batch: int = 128,
        clip: float = 0.01,
        lr: float = 5e-5,
        images: int | None = None,
    ) -> None:
        for name, value in {"steps": steps, "batch": batch, "clip": clip, "lr": lr, "images": 1 if images is None else images}.items():
            if value <= 0:
                raise ValueError(f"{name}: {value} is not allowed; it must be above 0")
        self.layers, self.steps, self.batch, self.clip, self.lr, self.images = layers, steps, batch, clip, lr, images
        self.old: dict[str, Any] = {}

    def begin(self, trainer: Trainer) -> Row:
        if trainer.bundle.unit != "images":
            raise ConfigError(f"probe: covariate_shift looks at images, and the data set has {trainer.bundle.unit}")
        self.old = copy.deepcopy(trainer.net.state_dict())
        return {}

    def end(self, trainer: Trainer) -> Row:
        now = copy.deepcopy(trainer.net.state_dict())
        after = self.outputs(trainer)
        trainer.net.load_state_dict(self.old)  # into the same tensors
        before = self.outputs(trainer)
        trainer.net.load_state_dict(now)

        tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # the first gains are of the order of 1e-5
        steps = min(self.steps, trainer.cfg.profile.steps or self.steps)
        row: Row = {}
        for layer in after:
            (old, old_test), (new, new_test) = before[layer], after[layer]
            net = critic(tuple(old.shape[1:]), generator(0, "critic", "cpu")).to(trainer.device).to(memory_format=torch.channels_last)
            rng = generator(0, "critic's samples", trainer.device)
            chosen = torch.randint(len(old), (steps, self.batch), generator=rng, device=trainer.device)
            ascend(net, old, new, chosen, self.clip, self.lr)
            row[f"layer{layer}/em"], row[f"layer{layer}/em_logit"] = distance(net, old_test, new_test)
            before[layer] = after[layer] = ()  # a layer's outputs can be gigabytes
        torch.backends.cudnn.allow_tf32 = tf32
        return row | {f"shift/{name}": fmean(row[f"layer{layer}/{name}"] for layer in after) for name in ("em", "em_logit")}

    @torch.no_grad()
    def outputs(self, trainer: Trainer) -> dict[int, tuple[Tensor, ...]]:
        """Each layer's outputs [N, C, H, W] for the training images and for the test images."""
        parts: dict[int, tuple[list[Tensor], ...]] = {}
        trainer.net.eval()
        for split, (x, y) in enumerate(trainer.bundle.splits[name] for name in ("train", "test")):
            limit = self.images if split == 0 else None
            for images, labels in zip(*(values[:limit].split(trainer.cfg.evaluate.batch_size) for values in (x, y)), strict=True):
                taps = trainer.forward(Batch(trainer.bundle.prepare(images), labels, labels), preactivations=True).preactivations
                for layer in self.layers or range(max(1, len(taps) - 5), len(taps) + 1):
                    if not 1 <= layer <= len(taps):
                        raise ConfigError(f"layers: {layer} is not allowed; the network has layers 1 to {len(taps)}")
                    out = taps[layer - 1].float()
                    parts.setdefault(layer, ([], []))[split].append(out if out.dim() == 4 else out.flatten(1)[:, :, None, None])
        trainer.net.train()
        return {layer: tuple(torch.cat(some) for some in parts.pop(layer)) for layer in list(parts)}  # layer by layer: of gigabytes
