"""The rows of the bench's part `methods`: every method and its variants, each over what it is to be compared with."""

from __future__ import annotations

import pytest

from experiments.bench import methods, sides
from experiments.bench.configs import VARIANTS, Asked, split
from experiments.config import ConfigError, options

METHODS = [name for name in options("method") if name != "vanilla"]
PER = ["l1", "l2", "per", "vcl", "per analytic", "per toeplitz", "bn"]  # the rows of its paper
NO_NORM = "torch.nn.Identity"


def test_variants_are_rows_of_their_method():
    assert split([])[0] == [*METHODS, *VARIANTS]
    names, common, own = split(["method=[per analytic, vcl]", "method.per.mode=slices", "method.per.slices=8"])
    assert names == ["per analytic", "vcl"]
    asked = Asked(common, names, own)
    plain, analytic, toeplitz = (asked.method("cnn11", name).method.per for name in ("per", "per analytic", "per toeplitz"))
    assert {(one.slices, one.weight) for one in (plain, analytic, toeplitz)} == {(8, 1e-4)}
    assert [(one.mode, one.directions) for one in (plain, toeplitz)] == [("slices", "gaussian"), ("slices", "toeplitz")]
    assert analytic.mode == "analytic"  # the row has the last word


@pytest.mark.parametrize("common", [[], ["norm=gn", "norm.num_groups=1"]])
@pytest.mark.parametrize("model", ["net5c", "cnn11"])
def test_bn_is_over_no_normalisation(model, common):
    asked = Asked(common)
    on, off = asked.method(model, "bn"), asked.without(model, "bn")
    assert (on.norm._target_, on.norm.eps, on.method) == ("models.norm.BatchNorm", 1e-3, {})
    assert (off.norm._target_, off.method) == (NO_NORM, {})
    assert asked.without(model, "per") == asked.cfg(model)


def test_methods_are_measured_on_their_papers_networks(monkeypatch):
    monkeypatch.setattr(methods, "suite", lambda cfg: cfg)
    monkeypatch.setattr(methods, "matching", lambda cfg, loop: cfg)
    monkeypatch.setattr(methods, "compare", lambda *row: row)
    found = list(methods.method_rows(Asked([], split([])[0])))
    named = [(row[1].split(" ")[0], row[1].partition(", ")[2]) for row in found[:-6]]
    assert named == [*(("net5c", name) for name in (*METHODS, *VARIANTS)), *(("cnn11", name) for name in PER)]
    mixing = [f"preact_resnet18 b64, {name}" for name in ("mixup", "cutmix", "lamix", "label_smoothing")]
    assert [row[1] for row in found[-6:]] == ["resnet18 b64, itdm_c", *mixing, "MMD at once"]
    assert [row[3] for row in found[-5:-1]] == ["<= 1.03"] * 4
    good = {row[1]: row[3] for row in found}
    assert good["cnn11 b125, per"] == "<= 2.5"
    assert good["cnn11 b125, bn"] == "lower"
    for row in found[:-1]:
        cfg, plain = row[4]
        assert not plain.method
        assert (cfg.batch_size, cfg.model) == (plain.batch_size, plain.model if "bn" not in row[1] else cfg.model)
    cfg, plain = next(row[4] for row in found if row[1] == "cnn11 b125, per toeplitz")
    assert cfg.method.per.directions == "toeplitz"
    assert (plain.optim.clip, plain.dataset.source, plain.dataset.standardise, plain.norm._target_) == (1, "embedded", "pixels", NO_NORM)


def test_loops_know_no_normalisation_by_position():
    with pytest.raises(ConfigError, match="pixels is not allowed here"):
        sides.peer(Asked(["runtime.device=cpu"]).cfg("cnn11"))
