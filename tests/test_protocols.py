"""Experiments are the protocols that the papers, or their authors' code, print."""

from __future__ import annotations

import functools

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf
from trainers import config

from experiments.cli import CONF
from experiments.config import build, check


@functools.cache
def composed(*words: str, name: str = "config") -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(name, [*words])
    if name == "config":
        check(cfg)
    return cfg


def test_itdm_s_protocols() -> None:
    grey = [composed(f"experiment=itdm_grey_{kind}") for kind in "jc"]
    stl10 = ("model=mobilenet", "dataset=stl10")
    colour = [composed(f"experiment={name}", *stl10) for name in ("itdm_color", "itdm_color_code")]
    for cfg in (*grey, *colour):
        assert (cfg.batch_size, cfg.balanced, cfg.precision, cfg.evaluate.every, cfg.evaluate.dense) == (150, True, "fp32", 50, 10)
        assert (cfg.optim.momentum, cfg.optim.weight_decay) == (0.5, 0)
        at, factor, epochs = ([20, 40], 0.2, 50) if cfg in grey else ([50, 100], 0.1, 150)
        assert (list(cfg.schedule["at"]), cfg.schedule.factor, cfg.epochs) == (at, factor, epochs)
    assert [(cfg.optim.lr, cfg.seed) for cfg in grey] == [(0.01, 1)] * 2
    assert [(cfg.optim.lr, cfg.dataset.padding, cfg.dataset.flip) for cfg in colour] == [(0.5, 4, True), (0.1, 4, True)]
    assert OmegaConf.merge(colour[1], {"optim": {"lr": 0.5}}) == colour[0]  # they differ in the learning rate alone


def test_per_s_protocols() -> None:
    protocols = {}
    for name in ("per_cnn11", "per_fixup", "per_resnet_bn"):
        cfg = composed(f"experiment={name}")
        lr = [cfg.optim[key] for key in ("lr", "bias_lr", "momentum", "nesterov", "weight_decay", "decay", "clip", "clip_each")]
        schedule = [list(cfg.schedule["at"]), cfg.schedule.factor, cfg.schedule.by]
        protocols[name] = [cfg.epochs, cfg.iterations, cfg.batch_size, cfg.drop_last, cfg.balanced, cfg.precision, lr, schedule]
        assert (cfg.dataset.padding, cfg.dataset.flip, cfg.evaluate.every) == (4, True, None)
        assert cfg.dataset.standardise == ("pixels" if name == "per_cnn11" else "channels")
    first = [0.05, 0.1, 0.9, True, 1e-4, "weights", 1, True]
    assert protocols["per_cnn11"] == [200, None, 250, True, False, "fp32", first, [[60, 100, 140], [0.2, 0.1, 0.1], "epoch"]]
    fixup = [0.1, 0.1, 0.9, False, 1e-4, "all", None, False]
    assert protocols["per_fixup"] == [200, None, 128, False, False, "fp32", fixup, [[100, 150], 0.1, "epoch"]]
    he = [0.1, 1, 0.9, False, 1e-4, "all", None, False]
    assert protocols["per_resnet_bn"][1:] == [64_000, 128, False, False, "fp32", he, [[32_000, 48_000], 0.1, "iteration"]]


def same_optimizer(cfg: DictConfig, lr: float, nesterov: bool, weight_decay: float, decay: str) -> None:
    options = {"lr": lr, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay, "decay": decay}
    assert dict(cfg.optim) == dict(config().optim) | options | {"bias_lr": 1.0, "clip": None, "clip_each": False}


def rates(cfg: DictConfig, steps: int) -> list[float]:
    schedule = build(cfg.schedule, "schedule")
    return [cfg.optim.lr * schedule(epoch, steps * epoch, None) for epoch in range(cfg.epochs)]


def test_unitization_s_protocol() -> None:
    """The rate changes one epoch later than "60, 120, 160" would; a decay of 5e-4 in Keras is one of 1e-3 here."""
    cfg = composed("experiment=unitization_resnet110", "dataset=cifar100")
    assert (cfg.epochs, cfg.batch_size, cfg.drop_last, cfg.balanced, cfg.precision) == (200, 128, False, False, "fp32")
    same_optimizer(cfg, 0.05, True, 1e-3, "kernels")
    assert (cfg.dataset.padding, cfg.dataset.flip, cfg.dataset.standardise, cfg.evaluate.every) == (4, True, "pixels", None)
    assert cfg.norm == {"_target_": "models.unitization.Unitization", "_partial_": True, "eps": 1e-3, "momentum": 0.01, "norm_scale": "hw2"}
    assert rates(cfg, 391) == pytest.approx([0.05] * 61 + [0.01] * 60 + [0.002] * 40 + [0.0004] * 39)


@pytest.mark.parametrize("name", ["cifar10", "mnist32"])
def test_lamix_s_protocol(name: str) -> None:
    """P-A2: Facebook's code changes the rate after the epochs 100 and 150: 101 epochs at 0.1, 50 at 0.01, 249 at 0.001."""
    cfg = composed("experiment=lamix_random", f"dataset={name}")
    assert (cfg.epochs, cfg.batch_size, cfg.drop_last, cfg.balanced, cfg.precision) == (400, 128, False, False, "fp32")
    same_optimizer(cfg, 0.1, False, 1e-4, "all")
    assert (cfg.dataset.padding, cfg.dataset.flip, cfg.evaluate.every, cfg.dataset.valid) == (4, True, None, 0)
    assert (cfg.dataset.get("size"), cfg.dataset.get("channels")) == ((32, 3) if name == "mnist32" else (None, None))
    assert rates(cfg, 391) == pytest.approx([0.1] * 101 + [0.01] * 50 + [0.001] * 249)


@pytest.mark.parametrize("name", ["cifar10", "tiny_imagenet"])
def test_puzzlemix_s_protocol(name: str) -> None:
    """P-A2: 350 epochs at 0.2, 150 at 0.02, 100 at 0.002; Tiny-ImageNet's rows (table 4) change earlier, with other crops."""
    tiny = ["dataset.padding=4", "dataset.standardise=channels", "schedule.at=[300,450]"] if name == "tiny_imagenet" else []
    cfg = composed("experiment=lamix_puzzle", f"dataset={name}", *tiny, "method=[puzzlemix]")
    base = composed("table=lamix_4", name="tables").table.base
    assert {*tiny, "dataset=tiny_imagenet", "model.stem_stride=2"} <= {*base} or not tiny
    assert (cfg.epochs, cfg.batch_size, cfg.drop_last, cfg.balanced, cfg.precision, cfg.loss) == (600, 100, False, False, "fp32", "bce")
    same_optimizer(cfg, 0.2, True, 1e-4, "all")
    assert (cfg.dataset.padding, cfg.dataset.flip) == (4 if tiny else 2, True)
    assert cfg.dataset.standardise == ("channels" if tiny else "channels_own")
    assert rates(cfg, 500) == pytest.approx([0.2] * (300 if tiny else 350) + [0.02] * 150 + [0.002] * (150 if tiny else 100))
    printed = {"alpha": 1, "beta": 1.2, "gamma": 0.5, "eta": 0.2, "neigh_size": 4, "transport": True, "t_size": 4, "t_eps": 0.8}
    assert {key: cfg.method.puzzlemix[key] for key in printed} == printed and cfg.method.puzzlemix.clean_lam == 0


def test_both_forms_of_puzzlemix_have_the_same_options() -> None:
    cfg = composed("method=[puzzlemix,lamix_puzzle]")
    own = {key: value for key, value in cfg.method.puzzlemix.items() if key not in ("alpha", "prob")}
    assert own == dict(cfg.method.lamix_puzzle.puzzle) and cfg.method.lamix_puzzle.beta == 1
