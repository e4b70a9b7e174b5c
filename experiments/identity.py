"""A run's identity: what is chosen, and with which options. Where the code of a choice lies is no part of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

VERSION = 1  # of the rule by which an id is made; part of the id and of each run's config.yaml
NOT_IDENTITY = ("hydra", "experiment", "runtime")  # everything else is: a changed default is another run
HYDRAS_OWN = ("_target_", "_partial_", "_recursive_", "_convert_")  # how Hydra makes an object, not what it is


def run_id(cfg: DictConfig) -> str:
    """Ten hex digits of the resolved config: two spellings of one run have one id, and so has its code after a move to another module."""
    return run_ids(cfg, [cfg.get("seed")])[0]


def run_ids(cfg: DictConfig, seeds: Iterable[int | None]) -> list[str]:
    """The ids of this run with each of the seeds."""
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    content = {key: value for key, value in content.items() if key not in NOT_IDENTITY}
    content["method"] = [[name, node] for name, node in content["method"].items()]  # the order of methods counts
    content["profile"] = {key: value for key, value in content["profile"].items() if key != "seeds"}
    content["version"] = VERSION
    texts = (json.dumps(meaning(content if seed is None else content | {"seed": seed}), sort_keys=True) for seed in seeds)
    return [hashlib.sha256(text.encode()).hexdigest()[:10] for text in texts]


def meaning(value: Any) -> Any:
    """A node is the name of its target and its options. Numbers are floats, so that 1 and 1.0 are one run.

    An option that is null counts as not given: a new option whose default is null leaves older runs their ids.
    """
    if isinstance(value, dict):
        options = {str(key): meaning(inner) for key, inner in value.items() if inner is not None and key not in HYDRAS_OWN}
        return {"_is_": target_name(value["_target_"])} | options if "_target_" in value else options
    if isinstance(value, list):
        return [meaning(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def target_name(target: str) -> str:
    """What a `_target_` is called, without the module that it lies in."""
    return str(target).rpartition(".")[2]


def run_dir(cfg: DictConfig) -> str:
    """`<dataset>-<model>-<methods>/<what varies>-<id>`: named for people; only the id at its end decides."""
    dataset, model, norm = (target_name(cfg[group]._target_).lower() for group in ("dataset", "model", "norm"))
    varies = [f"{key}={node[key]:g}" for node in cfg.method.values() for key in ("weight", "smoothing", "prob", "beta") if key in node]
    groups = [f"{key}={cfg.norm[key]}" for key in ("channels_per_group", "num_groups") if cfg.norm.get(key) is not None]
    flags = [str(key) for key, value in cfg.model.items() if value is True and not str(key).startswith("_")]
    varies += [norm, *groups[:1], *flags, f"seed={cfg.seed}"] + ([] if cfg.profile.name == "paper" else [cfg.profile.name])
    texts = ("-".join([dataset, model, "+".join(cfg.method) or "vanilla"]), ",".join(varies))
    folder, run = (re.sub(r"[^\w=.,+-]", "_", text)[:80] for text in texts)
    return f"{folder}/{run}-{run_id(cfg)}"
