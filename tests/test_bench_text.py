"""The rows of the bench's part `text`."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.bench import counts, language
from experiments.bench.configs import Asked
from experiments.bench.sides import full_batches
from experiments.train import make_trainer

SMALL = ["model.width=8", "dataset=docs", "dataset.bptt=5", "runtime.threads=1", "runtime.device=cpu"]


def test_rows_are_measured_on_penn_treebank_s_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "suite", lambda cfg: cfg)
    monkeypatch.setattr(language, "compare", lambda *row: row)
    monkeypatch.setattr(counts, "calls_row", lambda *row: row)
    monkeypatch.setattr(counts, "kept_row", lambda *row: row)
    found = list(language.text_rows(Asked()))
    timed = {row[1].partition(", ")[2]: row for row in found[: len(language.ROWS)]}
    assert [*timed] == [*language.ROWS] and len(found) == 3 * len(language.ROWS)
    assert {name: row[3] for name, row in timed.items() if row[3] != "lower"} == dict.fromkeys(
        ("per", "per analytic", "l1", "l2"), "<= 1.15"
    )
    for name, row in timed.items():
        cfg, plain = row[4]
        assert row[1].startswith("lstm b20, ") and (cfg.batch_size, cfg.dataset.bptt, cfg.model.width) == (20, 35, 650)
        assert not plain.method and cfg != plain, name
    cfg, plain = timed["VD, a mask for each row"][4]
    assert (cfg.model.recurrent_mask, plain.model.recurrent_mask) == ("rows", "shared")
    assert cfg.model.variational_dropout and plain.model.variational_dropout
    assert make_trainer(plain).bundle.num_classes == 10_000
    assert list(language.text_rows(Asked(["model=resnet18"]))) == []


def test_rows_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "ROWS", {name: language.ROWS[name] for name in ("per", "l1", "l2", "rbn")})
    rows: list[dict[str, Any]] = list(language.text_rows(Asked(SMALL, steps=1, rounds=7)))
    assert len(rows) == 3 * len(language.ROWS) and all(row["ratio"] > 0 for row in rows)
    kept = {row["what"]: row for row in rows if row["id"] == "C9"}
    for name in ("per", "l1", "l2"):
        row = kept[f"lstm, {name}"]
        # at each of two taps four numbers, and the activations (five words, eight units), which vanilla does not keep
        assert row["count a"] - row["count b"] <= 2 * 4 * (4 + 5 * 8)
    assert all(row["reads a"] == row["reads b"] == 0 for row in rows if row["id"] == "C8")


def test_every_timed_window_is_a_whole_one() -> None:
    trainer = make_trainer(Asked([*SMALL, "dataset.bptt=35"]).cfg("lstm"))  # 714 words in each column
    assert len(list(trainer.samples())) == trainer.steps_per_epoch == 21
    assert full_batches(trainer.cfg, trainer.bundle) == 714 // 35 == 20
