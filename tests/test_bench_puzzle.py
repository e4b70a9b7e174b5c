"""The rows of the bench's part `puzzle`."""

from __future__ import annotations

import pytest

from experiments.bench import puzzle
from experiments.bench.configs import Asked

SMALL = ["model=preact_resnet18", "model.width=16", "batch_size=10", "runtime.threads=1", "runtime.device=cpu"]


def test_what_is_held_against_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puzzle, "suite", lambda cfg, change=None: cfg)
    monkeypatch.setattr(puzzle, "four", lambda cfg: cfg)
    monkeypatch.setattr(puzzle, "work", lambda cfg, part: part)
    monkeypatch.setattr(puzzle, "Side", lambda part, device: part)
    monkeypatch.setattr(puzzle, "compare", lambda *row: row)
    monkeypatch.setattr("omegaconf.DictConfig.device", "cpu", raising=False)
    found = list(puzzle.puzzle_rows(Asked(SMALL[2:])))
    assert [(row[1].removeprefix("preact_resnet18 b10, "), row[2], row[3]) for row in found] == [
        ("puzzlemix", "vanilla", "lower"),
        ("puzzlemix without masks", "vanilla", "<= 1.65"),
        ("puzzlemix, clean_lam 1", "vanilla", "lower"),
        ("lamix_puzzle", "vanilla", "lower"),
        *((f"puzzlemix: {part}", "its step", good) for part, good in puzzle.SHARES.items()),
    ]
    for row in found[:4]:
        cfg, plain = row[4]
        assert len(cfg.method) == 1 and not plain.method and (cfg.model, cfg.batch_size) == (plain.model, plain.batch_size)


def test_rows_in_small() -> None:
    rows = list(puzzle.puzzle_rows(Asked(SMALL, steps=1, rounds=2)))
    assert len(rows) == 8 and all(row["ratio"] > 0 for row in rows)
    shares = {row["what"].partition(": ")[2]: row["ms a"] for row in rows[4:]}
    assert max(shares["masks"], shares["transport"]) < shares["masks and transport"]


def test_the_grids_take_turns() -> None:
    cfg = Asked(SMALL).method("preact_resnet18", "puzzlemix")
    seen: list[int] = []

    def watched(trainer: puzzle.Trainer) -> None:
        puzzle.in_turn(trainer)
        method = trainer.regularizers["puzzlemix"]
        choose = method.choose
        method.choose = lambda step: seen.append(choose(step))  # type: ignore[method-assign]

    side = puzzle.four(puzzle.suite(cfg, watched))
    side.step()
    side.step()
    assert seen == [2, 4, 8, 16] * 2
