"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nets import narrowed

from experiments import pick, table
from experiments.spec import Row
from regularizers.projection import directions


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of torch's, for a module of tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def untraced() -> Iterator[None]:
    """Processes that a module of tests starts are left out of the coverage, which makes them slow: they are killed, or copies, anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that a test caches outlives it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # the data folder "" is this one
    return tmp_path / "home" / "retable"


@pytest.fixture
def few_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """PER draws two directions in place of all: for tests that go through many runs, to whose outcome they are nothing."""
    monkeypatch.setattr("regularizers.per.directions", lambda kind, slices, *more: directions(kind, min(slices, 2), *more))


@pytest.fixture
def one_value(monkeypatch: pytest.MonkeyPatch) -> Callable[[slice], None]:
    """When called, each grid has one value only, the first or the last: those between differ in a number."""

    def cut(which: slice) -> None:
        for module in (pick, table):
            plain = module.choices
            monkeypatch.setattr(module, "choices", lambda *row, plain=plain: plain(*row)[which])

    return cut


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row that names one of the larger models has a narrower one: for tests that go through all rows of tables and figures."""

    plain = table.choices

    def choices(row: Row, column: str = "") -> list[tuple[str, list[str]]]:
        return [(name, [*values, *narrowed(row.overrides)]) for name, values in plain(row, column)]

    monkeypatch.setattr(table, "choices", choices)


@pytest.fixture
def raw(tmp_path: Path, cache_home: Path) -> Path:
    """An empty data folder."""
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder
