"""The rows of the bench's part `norms`."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.bench import counts, norms
from experiments.bench.configs import Asked

SMALL = ["model=preact_resnet20", "++dataset.size=8", "dataset.padding=0", "batch_size=10", "runtime.threads=1", "runtime.device=cpu"]


def test_what_is_held_against_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "suite", lambda cfg: cfg)
    monkeypatch.setattr(norms, "compare", lambda *row: row)
    monkeypatch.setattr(counts, "calls_row", lambda *row: row)
    monkeypatch.setattr(counts, "kept_row", lambda *row: row)
    found = list(norms.norm_rows(Asked(["runtime.device=cpu"])))
    assert [(row[1], row[3]) for row in found[:4]] == [
        ("preact_resnet20 b128, unitization", "<= 1.35"),
        ("preact_resnet20 b128, gn", "lower"),
        ("preact_resnet20 b2, unitization", "lower"),
        ("preact_resnet110 b2, unitization", "lower"),
    ]
    for row in found[:4]:
        cfg, plain = row[4]
        assert row[2] == "bn" and cfg.norm._target_ != plain.norm._target_ == "models.norm.BatchNorm"
        assert (plain.norm.eps, plain.norm.momentum) == (1e-3, 0.01)
        rest = [{key: value for key, value in one.items() if key not in ("norm", "model")} for one in (cfg, plain)]
        assert (
            rest[0] == rest[1]
            and cfg.model._target_ == plain.model._target_
            and (cfg.optim.decay, cfg.dataset.standardise) == ("kernels", "pixels")
        )
    assert len(found) == 6
    for words in (["model=lstm"], ["norm=gn"]):
        assert list(norms.norm_rows(Asked(words))) == []


def test_rows_in_small() -> None:
    rows: list[dict[str, Any]] = list(norms.norm_rows(Asked(SMALL, steps=1, rounds=7)))
    assert len(rows) == 5 and all(row["ratio"] > 0 for row in rows)
    [calls] = [row for row in rows if row["id"] == "C8"]
    assert calls["reads a"] == calls["reads b"] == 0
    [kept] = [row for row in rows if row["id"] == "C9"]
    # one map for each layer, as batch normalisation keeps, and three numbers for each of its channels, which have as few as four pixels
    assert 1 < kept["ratio"] < 1.3
