"""The root schema of a run: every key, its type, its default; what values are allowed; how config nodes become objects."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.identity import target_name

GROUPS = ("dataset", "model", "norm", "schedule", "method", "probe")  # whose files name what a run is made of, by `_target_`
ALLOWED_TARGETS = ("data.", "models.", "regularizers.", "experiments.", "torch.nn.", "torch.optim.")


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line: the key, what was given, what is allowed."""


@dataclass
class Optim:
    lr: float = 0.05
    momentum: float = 0.5
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: str = "all"  # all | weights | kernels: what decays: all; not biases and Fixup's scales; only what has two dimensions or more
    bias_lr: float = 1.0  # factor on the learning rate of biases and Fixup's scales
    clip: float | None = None  # gradients are scaled down to this norm; null: never
    clip_each: bool = False  # each parameter's by its own norm; false: all by the norm of them all


@dataclass
class Evaluate:
    every: int | None = None  # steps between evaluations; null: at the end of each epoch only
    dense: int = 10  # so many of those at the end of training are kept: a table averages the last ten
    batch_size: int = 1000


@dataclass
class Profile:
    """How much of the printed protocol is run; one file each in conf/profile."""

    name: str = "paper"
    epochs: float = 1.0  # factor on the epochs; milestones move along
    train: int | None = None  # so many class-balanced training images; null: all
    test: int | None = None
    steps: int | None = None  # at most so many steps per epoch, and of what a probe trains
    embedded: bool = False  # embedded digits stand in for the data set: a check of the code path, not of numbers
    seeds: int | None = None  # a table's first so many seeds; not part of a run's identity


@dataclass
class Runtime:
    """What must not change a number; not part of a run's identity."""

    device: str = "auto"  # auto | cpu | cuda | cuda:0 ...
    devices: Any = None  # several GPUs, [0,1,...]: each run takes one that has a place free; null: the one that `device` says
    runs_per_device: int = 1  # places of a GPU: more where one run leaves it idle; on a CPU so many runs share the cores
    threads: int | None = None  # CPU threads of a run; null: all cores, shared by the runs that a launcher starts side by side
    data_dir: str = "${oc.env:DATA_DIR,data/raw}"
    download: Any = False  # true: fetch a missing data set from its official source; [URL,...]: from these mirrors first
    runs: str = "runs"
    checkpoint_every: int = 1  # epochs
    time_limit: float | None = None  # seconds from the command's start: runs not expected to end by then are not started; null: no limit
    keep_weights: int | None = None  # epochs of the printed protocol: at the start and so often a run keeps its network; null: never
    dry_run: bool = False  # train nothing, print what the run is


@dataclass
class Config:
    dataset: Any = None
    model: Any = None
    norm: Any = None
    schedule: Any = None
    method: dict[str, Any] = field(default_factory=dict)
    probe: Any = None  # what is measured at each epoch's end besides, for a figure
    experiment: Any = None
    profile: Profile = field(default_factory=Profile)
    seed: int = 1
    epochs: int = 20
    iterations: int | None = None  # so many steps instead of so many epochs; the last epoch may be a part of one
    batch_size: int = 50
    drop_last: bool = False  # leave out an epoch's last batch where it is smaller
    loss: str = "ce"  # ce: cross-entropy; bce: binary cross-entropy of the softmax in every class, averaged (PuzzleMix's code)
    balanced: bool = True  # class-balanced batches, as ITDM's sampler; false: plain shuffling
    precision: str = "fp32"  # fp32 | tf32 | bf16: of the network; the methods' maths is always fp32
    channels_last: bool = True  # memory layout of images and weights
    compile: bool = False  # torch.compile on the network's training forward and backward
    step: str = "eager"  # eager | graph: the whole step recorded as one CUDA graph
    deterministic: bool = False  # deterministic kernels, where torch has them
    cudnn_benchmark: bool = True
    optim: Optim = field(default_factory=Optim)
    evaluate: Evaluate = field(default_factory=Evaluate)
    runtime: Runtime = field(default_factory=Runtime)


ConfigStore.instance().store("schema", Config)


def _number(low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Callable[[Any], bool]:
    def inside(value: float) -> bool:
        return math.isfinite(value) and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    return inside


def _download(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, ListConfig) and all(re.match(r"(https?|ftp)://", str(url)) for url in value))


def _devices(value: Any) -> bool:
    return isinstance(value, ListConfig) and len(value) > 0 and all(type(index) is int and index >= 0 for index in value)


_POSITIVE = (_number(0, open_low=True), "a number above 0")
_COUNT = (_number(1), "a whole number of at least 1")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_number(0, 2**31), "a whole number from 0 to 2147483648"),
    "epochs": _COUNT,
    "iterations": _COUNT,
    "batch_size": _COUNT,
    "loss": (lambda value: value in ("ce", "bce"), "ce, bce"),
    "precision": (lambda value: value in ("fp32", "tf32", "bf16"), "fp32, tf32, bf16"),
    "step": (lambda value: value in ("eager", "graph"), "eager, graph"),
    "optim.lr": _POSITIVE,
    "optim.momentum": (_number(0, 1, open_high=True), "a number from 0 to below 1"),
    "optim.weight_decay": (_number(0), "a number of at least 0"),
    "optim.decay": (lambda value: value in ("all", "weights", "kernels"), "all, weights, kernels"),
    "optim.bias_lr": _POSITIVE,
    "optim.clip": _POSITIVE,
    "evaluate.every": _COUNT,
    "evaluate.dense": (_number(0), "a whole number of at least 0"),
    "evaluate.batch_size": _COUNT,
    "profile.epochs": (_number(0), "a number of at least 0"),
    "profile.train": _COUNT,
    "profile.test": _COUNT,
    "profile.steps": _COUNT,
    "profile.seeds": _COUNT,
    "runtime.threads": _COUNT,
    "runtime.time_limit": _POSITIVE,
    "runtime.devices": (_devices, "null, or a list of GPUs' numbers, [0,1,...]"),
    "runtime.runs_per_device": _COUNT,
    "runtime.checkpoint_every": _COUNT,
    "runtime.keep_weights": _COUNT,
    "runtime.download": (_download, "true, false, or a list of mirrors' URLs, [http...,...]"),
    "runtime.device": (lambda value: value in ("auto", "cpu") or value.split(":")[0] == "cuda", "auto, cpu, cuda, cuda:N"),
}


def wanted(error: OmegaConfBaseException) -> str:
    """In words, what the key of OmegaConf's type error takes."""
    if error.full_key in _RULES:
        return _RULES[error.full_key][1]
    kinds = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "not Optional": "set", "subclass": "a mapping"}
    return next((text for word, text in kinds.items() if word in str(error)), "of another type")


def check(cfg: DictConfig, targets: bool = True) -> None:
    """Raises ConfigError on the first value that cannot be run. `targets`: that the code takes its options too, which imports it."""
    for path, kind in (("", Config), ("optim", Optim), ("evaluate", Evaluate), ("profile", Profile), ("runtime", Runtime)):
        known = [field.name for field in fields(kind)]
        for key in {*known, *(cfg[path] if path else cfg)} - {"hydra"}:  # +key=value adds any key, ~key deletes one
            if key not in known:
                raise ConfigError(f"{path}{'.' if path else ''}{key}: there is no such key; allowed: {', '.join(known)}")
            if key not in (cfg[path] if path else cfg):
                raise ConfigError(f"{path}{'.' if path else ''}{key}: it is missing")
    for key, (allowed, text) in _RULES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not allowed(value):
            raise ConfigError(f"{key}: {value} is not allowed; it must be {text}")
    if cfg.optim.nesterov and not cfg.optim.momentum:
        raise ConfigError("optim.nesterov: true goes with a momentum above 0, and optim.momentum is 0")
    for group in ("dataset", "model", "norm", "schedule"):
        if not (isinstance(cfg[group], DictConfig) and "_target_" in cfg[group]):
            raise ConfigError(f"{group}: nothing is chosen; name a file of conf/{group}")
    for name, node in cfg.method.items():
        if not (isinstance(node, DictConfig) and "_target_" in node):
            raise ConfigError(f"method.{name}: it has options but is not chosen; add method={name}")
    names = _names(_folders())
    for path, node in nodes(cfg):
        if targets:
            resolve(node, path)
        if others := names.get(target_name(node._target_), set()) - {node._target_}:
            both = f"{node._target_} and {min(others)}"
            raise ConfigError(f"{path}._target_: {both} have the same name, which identifies their runs; rename one of the two")
        for key, value in node.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{path}.{key}: {value} is not allowed; it must be a finite number")
        if isinstance(weight := node.get("weight"), int | float) and weight < 0:
            raise ConfigError(f"{path}.weight: {weight} is not allowed; it must be a number of at least 0")


def _folders() -> tuple[Path, ...]:
    """conf/, and the folders that the command line adds to it."""
    from experiments.cli import CONF

    more = GlobalHydra.instance().config_loader().get_search_path().get_path() if GlobalHydra.instance().is_initialized() else []
    return CONF, *(Path(one.path.removeprefix("file://")) for one in more if one.path.startswith("file://"))


@cache
def _names(folders: tuple[Path, ...]) -> dict[str, set[str]]:
    """What the files of a run's groups choose, by its name without the module."""
    found: dict[str, set[str]] = {}
    for file in (file for conf in folders for group in GROUPS for file in (conf / group).glob("*.yaml")):
        for target in re.findall(r"^_target_: [\"']?([\w.]+)", file.read_text(), re.MULTILINE):
            found.setdefault(target_name(target), set()).add(target)
    return found


def nodes(cfg: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every mapping below `cfg` that has a `_target_`, with its dotted path."""
    if "_target_" in cfg:
        yield path, cfg
    for key, value in cfg.items():
        if isinstance(value, DictConfig):
            yield from nodes(value, f"{path}.{key}" if path else str(key))


def resolve(node: DictConfig, path: str) -> Callable[..., Any]:
    """What a node's `_target_` names. Raises ConfigError if that is outside the suite and torch, or does not take the node's options."""
    target = node._target_
    if not str(target).startswith(ALLOWED_TARGETS):
        raise ConfigError(f"{path}._target_: {target} is not allowed; it must start with {', '.join(ALLOWED_TARGETS)}")
    try:
        module, _, name = target.rpartition(".")
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(f"{path}._target_: {target} cannot be imported ({first_line(error)})") from error
    known = inspect.signature(found).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        for key in node:
            if not str(key).startswith("_") and key not in known:
                raise ConfigError(f"{path}.{key}: {target} has no such option; allowed: {', '.join(known)}")
    for key, hint in _hints(found).items():
        if key in node and not _fits(node[key], hint):
            raise ConfigError(f"{path}.{key}: {node[key]} is not allowed; it must be {_words(hint)}")
    return found


_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


def _hints(found: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(found.__init__ if inspect.isclass(found) else found if inspect.isroutine(found) else type(found).__call__)
    except NameError:  # of an import that only type checkers do
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config is what an annotation says, as far as that is about plain values and lists of them."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        return isinstance(value, ListConfig) and all(_fits(each, get_args(hint)[0]) for each in value)
    return hint not in _PLAIN or type(value) is hint or (hint is float and type(value) is int)


def _words(hint: Any) -> str:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_words, get_args(hint)))
    return f"a list, each {_words(get_args(hint)[0])}"


def build(node: DictConfig, path: str, **kwargs: Any) -> Any:
    """The object that a config node describes. The one place that instantiates: only the suite's and torch's own targets.

    Raises ConfigError, with the node's path, when the target refuses its options.
    """
    from hydra.utils import instantiate

    for inner, child in nodes(node, path):
        resolve(child, inner)
    try:
        return instantiate(node, **kwargs, _convert_="all")
    except Exception as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        if isinstance(cause, ValueError | TypeError):
            raise ConfigError(f"{path}: {first_line(cause)}") from error
        raise


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def options(group: str) -> list[str]:
    """The names that a group of conf/ offers."""
    from experiments.cli import CONF

    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
