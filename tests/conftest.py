"""Fixtures that several files of tests use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nets import narrowed
from tables import command, extra  # noqa: F401  fixtures

from experiments import pick, table
from models import cnn11
from regularizers.projection import directions


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts slow tests first, those of SLURM before all: else a worker is busy with a long test when the others have finished."""
    items.sort(key=lambda item: (not item.path.name.startswith("test_slurm"), item.get_closest_marker("slow") is None))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread in this module: its arrays are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def untraced() -> Iterator[None]:
    """Leaves the processes that a module starts out of the coverage, which slows them: they are killed, or do what other tests cover."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the cache in the test's own folder, which is also the data folder ""."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "retable"


@pytest.fixture
def few_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """PER draws two directions in place of all, for tests that train many runs and do not read what they learn."""
    monkeypatch.setattr("regularizers.per.directions", lambda kind, slices, *more: directions(kind, min(slices, 2), *more))


@pytest.fixture
def one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each grid has its first value only: the others differ from it in a number."""
    for module in (pick, table):
        monkeypatch.setattr(module, "choices", lambda *row, plain=module.choices: plain(*row)[:1])


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row that names a large model has a narrow one; CNN-11 has a quarter of its filters."""
    monkeypatch.setattr(cnn11, "LAYERS", [(filters // 4, *more) for filters, *more in cnn11.LAYERS])
    plain = pick.choices
    monkeypatch.setattr(
        pick, "choices", lambda row, *column: [(name, [*values, *narrowed(row.overrides)]) for name, values in plain(row, *column)]
    )


@pytest.fixture
def raw(tmp_path: Path, cache_home: Path) -> Path:
    """An empty data folder."""
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder
