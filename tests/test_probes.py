"""What a probe measures, by NumPy and SciPy; and that measuring changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from test_trainer import data_home, parameters, same, train, trainer
from torch import nn

from experiments.probes import Activations
from experiments.trainer import Trainer

__all__ = ["data_home"]  # a fixture
PROBE = ["probe=activations", "probe.layers=[1,3]", "probe.images=40", "probe.slices=8", "norm=none"]
NAMES = [f"{pre}{name}" for pre in ("", "pre_") for name in ("q25", "q50", "q75", "mean", "var")] + ["rms", "sw1", "sw1_sampled"]


def probe(made: Trainer) -> Activations:
    assert isinstance(made.probe, Activations)
    return made.probe


def test_rows_at_the_start_and_after_each_epoch() -> None:
    made = train(*PROBE)
    assert [(row["step"], row["epoch"]) for row in made.rows] == [(0, 0), (5, 1), (10, 2)]
    for row in made.rows:
        assert [name for name in row if name.startswith("layer")] == [f"layer{layer}/{name}" for layer in (1, 3) for name in NAMES]
    assert "test/ce" not in made.rows[0] and "test/ce" in made.rows[1]
    assert made.rows[0]["layer3/rms"] != made.rows[1]["layer3/rms"] != made.rows[2]["layer3/rms"]


def test_measuring_changes_nothing() -> None:
    plain, measured = train("norm=none", "method=per"), train(*PROBE, "method=per")
    assert same(parameters(plain), parameters(measured))
    rows = [{name: value for name, value in row.items() if not name.startswith("layer")} for row in measured.rows[1:]]
    assert same(plain.rows, rows)
    assert same(probe(measured).end(measured), probe(measured).end(measured)) and measured.net.training


@pytest.mark.parametrize("size", [7, 1000])
def test_values_by_hand(size: int) -> None:
    made = train(*PROBE, f"evaluate.batch_size={size}", epochs=1)
    x = made.bundle.prepare(made.bundle.splits["train"][0][:40])
    parts: list[np.ndarray] = []
    for module in made.net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(
                lambda module, args, out: parts.extend(one.detach().double().flatten(1).numpy() for one in (args[0], out))
            )
    made.net.eval()(x)
    before, after = {1: parts[0], 3: parts[4]}, {1: parts[1], 3: parts[5]}
    row = made.rows[-1]
    quantiles = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    for layer, h in after.items():
        (unit,) = (i for i in range(h.shape[1]) if np.isclose(h[:, i].mean(), row[f"layer{layer}/mean"], rtol=1e-4, atol=1e-9)
                   and np.isclose(before[layer][:, i].mean(), row[f"layer{layer}/pre_mean"], rtol=1e-4))  # fmt: skip
        for pre, values in (("", h[:, unit]), ("pre_", before[layer][:, unit])):
            wanted = dict(zip(("q25", "q50", "q75"), np.quantile(values, (0.25, 0.5, 0.75)), strict=True)) | {"var": values.var(ddof=1)}
            for name, value in wanted.items():
                assert row[f"layer{layer}/{pre}{name}"] == pytest.approx(value, rel=1e-3, abs=1e-6)
        assert row[f"layer{layer}/rms"] == pytest.approx(np.sqrt((h**2).mean()), rel=1e-4)
        theta = probe(made).directions[layer, h.shape[1]].double().numpy()
        assert theta.shape == (8, h.shape[1]) and np.allclose((theta**2).sum(1), 1, atol=1e-6)
        distances = [stats.wasserstein_distance(line, quantiles) for line in theta @ h.T]
        assert row[f"layer{layer}/sw1"] == pytest.approx(np.mean(distances), rel=1e-3)
        assert row[f"layer{layer}/sw1_sampled"] == pytest.approx(np.mean(distances), abs=3 * 1.8 / 40**0.5 / 8**0.5)


def test_seeds_share_the_unit_and_the_directions() -> None:
    one, other = (train(*PROBE, f"seed={seed}", epochs=1) for seed in (1, 2))
    for key, theta in probe(one).directions.items():
        assert torch.equal(theta, probe(other).directions[key])
    assert one.rows[0]["layer1/mean"] != other.rows[0]["layer1/mean"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe.layers=[4]"], r"^probe.layers: 4 is not allowed; the network has layers 1 to 3$"),
        (["probe.images=1"], r"^probe: images: 1, slices: 8 are not allowed; at least 2 images and 1 slice$"),
    ],
)
def test_refused_options(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made = trainer(*PROBE, *words)
        probe(made).end(made)


def test_held_out_images_are_evaluated() -> None:
    made = train("dataset.valid=0.2", epochs=1)
    assert made.steps_per_epoch == 4 and {"valid/error", "valid/ce", "valid/accuracy"} <= made.rows[0].keys()
    found = made.evaluate("valid")
    assert found["ce"] == made.rows[0]["valid/ce"] != made.rows[0]["test/ce"]
