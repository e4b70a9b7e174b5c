"""Experiments are the protocols that the papers, or their authors' code, print."""

from __future__ import annotations

import hydra
import pytest
from omegaconf import OmegaConf
from test_trainer import config

from experiments.cli import CONF
from experiments.config import build, check


@pytest.mark.parametrize("name", ["itdm_grey_j", "itdm_grey_c"])
def test_experiments_are_the_printed_protocol(name: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [f"experiment={name}"])
    assert (cfg.epochs, cfg.batch_size, cfg.balanced, cfg.seed, cfg.precision) == (50, 150, True, 1, "fp32")
    assert (cfg.optim.lr, cfg.optim.momentum, cfg.optim.weight_decay) == (0.01, 0.5, 0)
    assert (list(cfg.schedule["at"]), cfg.schedule.factor, cfg.evaluate.every, cfg.evaluate.dense) == ([20, 40], 0.2, 50, 10)


@pytest.mark.parametrize(("name", "lr"), [("itdm_color", 0.5), ("itdm_color_code", 0.1)])
def test_colour_experiments_differ_in_the_learning_rate_alone(name: str, lr: float) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [f"experiment={name}", "model=mobilenet", "dataset=stl10"])
        other = hydra.compose("config", ["experiment=itdm_color", "model=mobilenet", "dataset=stl10"])
    assert cfg.optim.lr == lr and OmegaConf.merge(cfg, {"optim": {"lr": other.optim.lr}}) == other
    assert (cfg.epochs, cfg.batch_size, cfg.balanced, cfg.precision) == (150, 150, True, "fp32")
    assert (cfg.optim.momentum, cfg.optim.weight_decay, cfg.dataset.padding, cfg.dataset.flip) == (0.5, 0, 4, True)
    assert (list(cfg.schedule["at"]), cfg.schedule.factor, cfg.evaluate.every, cfg.evaluate.dense) == ([50, 100], 0.1, 50, 10)


def test_per_s_protocols() -> None:
    found = {}
    for name in ("per_cnn11", "per_fixup", "per_resnet_bn"):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("config", [f"experiment={name}"])
        check(cfg)
        lr = [cfg.optim[key] for key in ("lr", "bias_lr", "momentum", "nesterov", "weight_decay", "decay", "clip", "clip_each")]
        schedule = [list(cfg.schedule["at"]), cfg.schedule.factor, cfg.schedule.by]
        found[name] = [cfg.epochs, cfg.iterations, cfg.batch_size, cfg.drop_last, cfg.balanced, cfg.precision, lr, schedule]
        assert (cfg.dataset.padding, cfg.dataset.flip, cfg.evaluate.every) == (4, True, None)
        assert cfg.dataset.standardise == ("pixels" if name == "per_cnn11" else "channels")
    first = [0.05, 0.1, 0.9, True, 1e-4, "weights", 1, True]
    assert found["per_cnn11"] == [200, None, 250, True, False, "fp32", first, [[60, 100, 140], [0.2, 0.1, 0.1], "epoch"]]
    fixup = [0.1, 0.1, 0.9, False, 1e-4, "all", None, False]
    assert found["per_fixup"] == [200, None, 128, False, False, "fp32", fixup, [[100, 150], 0.1, "epoch"]]
    he = [0.1, 1, 0.9, False, 1e-4, "all", None, False]
    assert found["per_resnet_bn"][1:] == [64_000, 128, False, False, "fp32", he, [[32_000, 48_000], 0.1, "iteration"]]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_unitization_s_protocol(name: str) -> None:
    """The rate changes one epoch later than "60, 120, 160" would; a decay of 5e-4 in Keras is one of 1e-3 here."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", ["experiment=unitization_resnet110", f"dataset={name}"])
    check(cfg)
    assert (cfg.epochs, cfg.batch_size, cfg.drop_last, cfg.balanced, cfg.precision) == (200, 128, False, False, "fp32")
    assert dict(cfg.optim) == dict(config().optim) | {
        **{"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "decay": "kernels"},
        **{"bias_lr": 1.0, "clip": None, "clip_each": False},
    }
    assert (cfg.dataset.padding, cfg.dataset.flip, cfg.dataset.standardise, cfg.evaluate.every) == (4, True, "pixels", None)
    assert cfg.norm == {"_target_": "models.unitization.Unitization", "_partial_": True, "eps": 1e-3, "momentum": 0.01, "norm_scale": "hw2"}
    schedule = build(cfg.schedule, "schedule")
    rates = [0.05 * schedule(epoch, 391 * epoch, None) for epoch in range(200)]
    assert rates == pytest.approx([0.05] * 61 + [0.01] * 60 + [0.002] * 40 + [0.0004] * 39)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist32", "fmnist32", "tiny_imagenet"])
def test_lamix_s_protocol(name: str) -> None:
    """P-A2: Facebook's code changes the rate after the epochs 100 and 150: 101 epochs at 0.1, 50 at 0.01, 249 at 0.001."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", ["experiment=lamix_random", f"dataset={name}"])
    check(cfg)
    assert (cfg.epochs, cfg.batch_size, cfg.drop_last, cfg.balanced, cfg.precision) == (400, 128, False, False, "fp32")
    assert dict(cfg.optim) == dict(config().optim) | {
        **{"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "decay": "all"},
        **{"bias_lr": 1.0, "clip": None, "clip_each": False},
    }
    assert (cfg.dataset.padding, cfg.dataset.flip, cfg.evaluate.every, cfg.dataset.valid) == (4, True, None, 0)
    assert (cfg.dataset.get("size"), cfg.dataset.get("channels")) == ((32, 3) if name.endswith("32") else (None, None))
    schedule = build(cfg.schedule, "schedule")
    rates = [0.1 * schedule(epoch, 391 * epoch, None) for epoch in range(400)]
    assert rates == pytest.approx([0.1] * 101 + [0.01] * 50 + [0.001] * 249)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist32", "fmnist32", "tiny_imagenet"])
def test_puzzlemix_s_protocol(name: str) -> None:
    """P-A2: 350 epochs at 0.2, 150 at 0.02, 100 at 0.002; Tiny-ImageNet's rows (table 4) change earlier, with other crops."""
    tiny = ["dataset.padding=4", "dataset.standardise=channels", "schedule.at=[300,450]"] if name == "tiny_imagenet" else []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", ["experiment=lamix_puzzle", f"dataset={name}", *tiny, "method=[puzzlemix]"])
        table = hydra.compose("tables", ["table=lamix_4"]).table
    check(cfg)
    assert {*tiny, "dataset=tiny_imagenet", "model.stem_stride=2"} <= {*table.base} or not tiny
    assert (cfg.epochs, cfg.batch_size, cfg.drop_last, cfg.balanced, cfg.precision, cfg.loss) == (600, 100, False, False, "fp32", "bce")
    assert dict(cfg.optim) == dict(config().optim) | {
        **{"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "decay": "all"},
        **{"bias_lr": 1.0, "clip": None, "clip_each": False},
    }
    assert (cfg.dataset.padding, cfg.dataset.flip) == (4 if tiny else 2, True)
    assert cfg.dataset.standardise == ("channels" if tiny else "channels_own")
    schedule = build(cfg.schedule, "schedule")
    rates = [0.2 * schedule(epoch, 500 * epoch, None) for epoch in range(600)]
    assert rates == pytest.approx([0.2] * (300 if tiny else 350) + [0.02] * 150 + [0.002] * (150 if tiny else 100))
    printed = {"alpha": 1, "beta": 1.2, "gamma": 0.5, "eta": 0.2, "neigh_size": 4, "transport": True, "t_size": 4, "t_eps": 0.8}
    assert {key: cfg.method.puzzlemix[key] for key in printed} == printed and cfg.method.puzzlemix.clean_lam == 0


def test_both_forms_of_puzzlemix_have_the_same_options() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", ["method=[puzzlemix,lamix_puzzle]"])
    own = {key: value for key, value in cfg.method.puzzlemix.items() if key not in ("alpha", "prob")}
    assert own == dict(cfg.method.lamix_puzzle.puzzle) and cfg.method.lamix_puzzle.beta == 1
