"""What the tests that go through all models train them on: a few images of the shape that each takes."""

from __future__ import annotations

from experiments.config import options

GREY = ("net2c", "net5c")
MODELS = [name for name in options("model") if name != "resnet110"]  # resnet56, longer


def small(model: str) -> list[str]:
    """Overrides: the model, data of its shape, and batches of ten, two an epoch."""
    colour = ["dataset=cifar10", "dataset.source=embedded", f"++dataset.size={32 if model in ('cnn11', 'vgg13') else 16}"]
    return [
        f"model={model}",
        *(["dataset=digits"] if model in GREY else colour),
        *["profile.train=20", "profile.test=20", "batch_size=10"],
    ]
