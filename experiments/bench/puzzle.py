"""What a step of PuzzleMix costs, and which part of it what: the pass for saliency, the masks, the transport."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.bench.configs import Asked, title
from experiments.bench.sides import Row, Side, compare, suite
from experiments.train import make_trainer
from experiments.trainer import Trainer
from regularizers.mixing import pairing
from regularizers.puzzlemix import PuzzleMix

SHARES = {"saliency": "lower", "masks": "lower", "transport": "lower", "masks and transport": "<= 0.25"}  # of a step's time


def puzzle_rows(asked: Asked) -> Iterator[Row]:
    """On LaMix's network, over vanilla, then each part over the whole step. The four grids, drawn in training, take turns here."""
    for model in asked.models("preact_resnet18"):
        cfg, plain = asked.method(model, "puzzlemix"), asked.without(model, "puzzlemix")
        whole, vanilla = f"{title(model, cfg)}, puzzlemix", four(suite(plain))
        yield compare("C6", whole, "vanilla", "lower", (four(suite(cfg, in_turn)), vanilla), asked)
        yield compare("C6", f"{whole} without masks", "vanilla", "<= 1.65", (four(suite(cfg, unmasked)), vanilla), asked)
        clean = asked.method(model, "puzzlemix", "method.puzzlemix.clean_lam=1")
        yield compare("C6", f"{whole}, clean_lam 1", "vanilla", "lower", (four(suite(clean, in_turn)), vanilla), asked)
        lamix = asked.method(model, "lamix_puzzle")
        yield compare("C6", f"{title(model, lamix)}, lamix_puzzle", "vanilla", "lower", (four(suite(lamix)), vanilla), asked)
        step = four(suite(cfg, in_turn))
        for part, good in SHARES.items():
            yield compare("C6", f"{whole}: {part}", "its step", good, (Side(work(cfg, part), step.device), step), asked)


def four(side: Side) -> Side:
    """Four steps at once."""
    return Side(lambda: [side.step() for _ in range(4)], side.device, side.tf32, side.warm)


def in_turn(trainer: Trainer) -> None:
    """Each step has the next grid."""
    method = trainer.regularizers["puzzlemix"]
    assert isinstance(method, PuzzleMix)
    grids = itertools.cycle(method.blocks)

    def choose(step: int) -> int:
        method.passes, method.n = 1, next(grids)
        return method.n

    method.choose = choose  # type: ignore[method-assign]


def unmasked(trainer: Trainer) -> None:
    """Images are averaged: all of a step but masks and transport."""
    method = trainer.regularizers["puzzlemix"]
    assert isinstance(method, PuzzleMix)

    def mix(batch, partner, lam, net):  # type: ignore[no-untyped-def]
        saliency = method.saliency(batch, net)
        return 0.5 * (batch.x + batch.x[partner]), torch.full_like(saliency[:, 0, 0], 0.5)

    method.mix = mix  # type: ignore[method-assign]


def work(cfg: DictConfig, part: str) -> Callable[[], object]:
    """One part of PuzzleMix's step on a training batch, for each of the grids once."""
    trainer = make_trainer(cfg)
    method, net = trainer.regularizers["puzzlemix"], trainer.net
    assert isinstance(method, PuzzleMix)
    batch, _ = trainer.take(*next(iter(trainer.samples())))
    partner, lam = pairing(len(batch.x), method.rng, trainer.device), torch.full((), 0.5, device=trainer.device)

    def saliency() -> object:
        with trainer.autocast():
            return [method.saliency(batch, net) for _ in method.blocks]

    if part == "saliency":
        return saliency
    seen = method.saliency(batch, net)
    method.saliency = lambda *_: seen  # type: ignore[method-assign]

    def masks() -> list[Tensor]:
        return [at(n).mask(batch, partner, lam, net)[0] for n in method.blocks]

    def transport() -> list[object]:
        return [at(n).transported(batch.x, batch.x[partner], z, pairs) for n, z in zip(method.blocks, known, strict=True)]

    def at(n: int) -> PuzzleMix:
        method.n = n
        return method

    known, pairs = masks(), torch.stack([seen, seen[partner]])
    return {"masks": masks, "transport": transport, "masks and transport": lambda: [masks(), transport()]}[part]
