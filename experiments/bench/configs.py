"""What the command line asks for, and the configs of the rows that follow from it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments.cli import CONF
from experiments.config import ConfigError, check, options

# Each network in its own paper's protocol: net2c without norm layers, net5c with them.
GREY = ("dataset=digits", "dataset.train=1500")
# The paper's learning rate is for its 50,000 images: on a few digits, in colour, the loss could leave the numbers.
COLOUR = ("experiment=itdm_color", "dataset=cifar10", "dataset.source=embedded", "batch_size=64", "optim.lr=0.01")
CNN11 = ("experiment=per_cnn11", "dataset.source=embedded", "batch_size=125")
PREACT = ("experiment=unitization_resnet110", "dataset.source=embedded", "optim.lr=0.01")
MIXED = ("experiment=lamix_random", "dataset.source=embedded", "batch_size=64", "optim.lr=0.01")
LSTM = ("experiment=per_lstm", "dataset.source=embedded")  # with a decoder for Penn Treebank's 10,000 words
OWN = {"cnn11": CNN11, "lstm": LSTM, "preact_resnet20": PREACT, "preact_resnet110": PREACT, "preact_resnet18": MIXED}

# Rows besides those of the methods of conf/method, as `method=[NAME,...]` and the table call them: a method, and what else their configs
# have. BN is what PER compares with: over no normalisation.
VARIANTS = {
    "per analytic": ("per", ("method.per.mode=analytic",)),
    "per toeplitz": ("per", ("method.per.directions=toeplitz",)),
    "bn": ("vanilla", ("norm=bn", "norm.eps=1e-3")),
}


@dataclass(frozen=True)
class Asked:
    """common: the overrides of all rows. methods: those, and variants, that get a row; own: the overrides of one method's rows.

    rounds: paired rounds of a row. steps: steps of a side in a round; None: as many as take half a second, at least one.
    """

    common: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    own: dict[str, list[str]] = field(default_factory=dict)
    rounds: int = 7
    steps: int | None = None

    def given(self, name: str) -> str | None:
        """The value of an override of all rows, if there is one."""
        return next((word.partition("=")[2] for word in reversed(self.common) if key(word) == name), None)

    def models(self, *usual: str) -> list[str]:
        """The one that the command line names, else the usual ones."""
        return [given] if (given := self.given("model")) else [*usual]

    def words(self, model: str, *more: str) -> list[str]:
        """The overrides of a row: a setting that fits the model, what the command line says instead, and the row's own."""
        grey = ("experiment=itdm_grey_j" if model == "net2c" else "experiment=itdm_grey_c", *GREY)
        own = OWN.get(model, COLOUR)
        usual: tuple[str, ...] = grey if _channels(model) == 1 else own
        if self.given("experiment"):
            usual = ()
        elif self.given("dataset"):
            usual = tuple(word for word in usual if not word.startswith("dataset"))
        words = {key(word): word for word in (*usual, f"model={model}", *self.common, *more)}
        if "norm" in map(key, more):  # options given for another norm would not fit the row's
            words = {name: word for name, word in words.items() if not name.startswith("norm.") or word in more}
        # An option that a data set's file in conf/ does not list, such as dataset.train, is taken all the same; one that it lacks is not.
        return ["++" * name.startswith("dataset.") + word for name, word in words.items()]

    def cfg(self, model: str, *more: str) -> DictConfig:
        """The row's config. Raises ConfigError or Hydra's errors for overrides that cannot be composed."""
        return composed(self.words(model, *more))

    def method(self, model: str, name: str, *more: str) -> DictConfig:
        """The config of a row of `methods`. A variant has the last word."""
        method, overrides = VARIANTS.get(name, (name, ()))
        return self.cfg(model, f"method={method}", *self.own.get(method, []), *overrides, *more)

    def without(self, model: str, name: str) -> DictConfig:
        """The config that such a row is held against."""
        return self.cfg(model, *(["norm=none"] if name == "bn" else []))


def key(override: str) -> str:
    return override.partition("=")[0]


def _channels(model: str) -> int:
    """Of the images that a model of conf/ takes unless told otherwise; an unknown model is refused later."""
    file = CONF / "model" / f"{model}.yaml"
    return int(OmegaConf.select(OmegaConf.load(file), "in_channels", default=3)) if file.is_file() else 3


def split(overrides: list[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """The rows of `methods` to measure, the overrides for all rows, and those for one method's rows, its variants' too.

    Raises ConfigError for an unknown name.
    """
    known = [name for name in options("method") if name != "vanilla"]
    rows = [*known, *VARIANTS]
    own: dict[str, list[str]] = {}
    for override in overrides:
        name, _, value = override.partition("=")
        if name == "method":
            rows = [one for one in re.split(r"\s*,\s*", value.strip("[ ]")) if one not in ("", "vanilla")]
        elif name.startswith("method."):
            own.setdefault(name.split(".")[1], []).append(override)
    for given, allowed in ((rows, [*known, *VARIANTS]), (own, known)):
        if unknown := sorted({*given} - {*allowed}):
            raise ConfigError(f"method: {unknown[0]} is not known; allowed: {', '.join(allowed)}")
    return rows, [override for override in overrides if not re.match(r"method[.=]", override)], own


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config that the overrides describe, resolved and checked."""
    inside = GlobalHydra.instance().is_initialized()  # in a task of Hydra's, which has the same folder
    with contextlib.nullcontext() if inside else initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*overrides])
    OmegaConf.resolve(cfg)
    check(cfg)
    return cfg


def on_gpu(cfg: DictConfig) -> bool:
    import torch

    return torch.cuda.is_available() and cfg.runtime.device != "cpu"


def title(model: str, cfg: DictConfig) -> str:
    """A row's setting in words, such as "net5c b150"."""
    return f"{model} b{cfg.batch_size}" + ("" if cfg.precision == "fp32" else f" {cfg.precision}")
