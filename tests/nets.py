"""What the tests that go through all models train them on: a few images, or words, of the shape that each takes."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.config import options

GREY = ("net2c", "net5c")
TEXT = ("lstm",)
LONG = ("resnet110", "preact_resnet110")  # resnet56 and preact_resnet20, longer
IMAGE = [name for name in options("model") if name not in (*TEXT, *LONG)]
NORMS = [name for name in options("norm") if name != "rbn"]  # which lstm alone takes
# The whole models take seconds a step.
NARROW = {
    "preact_resnet18": ["model.width=16"],
    "resnet50": ["model.width=8"],
    "puzzle_resnet18": ["model.width=16"],
    "puzzle_resnet50": ["model.width=8"],
    "densenet121": ["model.growth=8", "model.blocks=[2,4,3,2]"],
    "wrn28_10": ["model.depth=16", "model.width=1"],
}


def narrowed(overrides: Iterable[str]) -> list[str]:
    """More overrides: the model that these name, narrowed."""
    return [f"++{word}" for override in overrides for word in NARROW.get(override.removeprefix("model="), [])]


def small(model: str) -> list[str]:
    """Overrides: the model, data of its shape, and batches of ten, two an epoch."""
    if model in TEXT:  # two windows of ten columns
        words = ["dataset=docs", "dataset.bptt=5", "balanced=false", "norm=none", "profile.train=101", "profile.test=60", "batch_size=10"]
        return [f"model={model}", "model.width=8", "model.tie_embeddings=true", "model.variational_dropout=true", *words]
    colour = ["dataset=cifar10", "dataset.source=embedded", f"++dataset.size={32 if model in ('cnn11', 'vgg13', 'lenet') else 16}"]
    return [
        *[f"model={model}", *NARROW.get(model, [])],
        *(["dataset=digits"] if model in GREY else colour),
        *["profile.train=20", "profile.test=20", "batch_size=10"],
    ]


def composed(model: str) -> str:
    """Two methods that go together on the model's data: one that adds a term or edits the backward pass, one that changes the target."""
    return "[per,label_smoothing]" if model in TEXT else "[itdm_c,label_smoothing]"
