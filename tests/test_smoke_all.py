"""Every table and figure of conf/ in the smoke profile: a step of each run, trained once for all of them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from nets import narrowed
from omegaconf import OmegaConf
from tables import Command

from experiments import figure
from experiments.cli import CONF
from experiments.config import options

SMALL = ["profile=smoke", "profile.steps=1", "profile.train=20", "profile.test=30", "batch_size=10"]
ALONE = ["per_1", "per_3", "per_minimiser", "unitization_bounds"]  # figures without runs
FIGURES = [name for name in options("figure") if name not in (*ALONE, "per_timing")]  # which test_per_computed.py draws


def slow_but(quick: str, names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name != quick)) for name in names]


@pytest.fixture(scope="session")
def shared_runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Path]:
    """The runs of all tests of this file, and of all workers of pytest-xdist; the last worker that uses the folder deletes it."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    mark = root / f"smoke-{worker_id}"
    mark.touch()
    yield root / "smoke"
    mark.unlink()
    if not any(root.glob("smoke-*")):
        shutil.rmtree(root / "smoke", ignore_errors=True)


def spec_of(kind: str, name: str) -> Any:
    return OmegaConf.load(CONF / kind / f"{name}.yaml")


def small(base: list[str]) -> list[str]:
    """The words that make a table's runs short, by the table's base."""
    more = {"per_lstm": "++model.width=8", "unitization_resnet110": "model=preact_resnet20"}
    return [*SMALL, *(more[name] for name in more if any(name in word for word in base)), *narrowed(base)]


@pytest.mark.no_cover  # which doubles its time; other tests cover what it goes through
@pytest.mark.usefixtures("few_slices", "one_value", "narrow")
@pytest.mark.parametrize("name", slow_but("demo", options("table")))
def test_table_trains(name: str, command: Command, shared_runs: Path, tmp_path: Path) -> None:
    spec = spec_of("table", name)
    code, out, err = command(f"table={name}", *small([*spec.base]), runs=shared_runs)
    assert (code, err) == (0, "")
    cells = pd.read_csv(next((tmp_path / "out").glob("*.csv")))
    against = {row.label: row.get("against") for row in spec["rows"]}
    none = [spec.columns[cell.column].get("delta", False) and against[cell.row] is None for cell in cells.itertuples()]
    assert ((cells["n"] == 1) != none).all() and (cells["ours"].notna() != none).all() and (cells["wanted"] == 1).all()
    assert out.count("seen once**") == len(spec.get("claims", [])) and "not run" not in out.replace("- not run", "")


@pytest.mark.no_cover
@pytest.mark.usefixtures("few_slices", "one_value", "narrow")
@pytest.mark.parametrize("name", slow_but("demo", FIGURES))
def test_figure_draws_its_runs(name: str, command: Command, shared_runs: Path, tmp_path: Path) -> None:
    """Each number that is plotted, and not computed by the figure, is one that a run has measured."""
    spec = spec_of("figure", name)
    tables = [spec_of("table", each["/table@runs"]).base for each in spec.get("defaults", []) if "/table@runs" in each]
    base = [*(OmegaConf.select(spec, "runs.base") or itertools.chain(*tables))]
    runs = tmp_path / "runs" if "runtime.keep_weights=1" in base else shared_runs  # the table's run, which keeps no weights
    words = [*small(base), *["++probe.layers=[1,10,20]"] * ("probe=covariate_shift" in base)]  # of the shorter network
    code, text, err = command(f"figure={name}", *words, f"out={tmp_path}/out", runs=runs, task=figure.run, root="figures")
    assert (code, err) == (0, "")
    assert "asked for besides: " in text and "profile smoke" in text and "commit" in text and "MISSING" not in text
    png, csv, md = (next((tmp_path / "out").glob(f"*{ending}")) for ending in (".png", ".csv", ".md"))
    assert text.endswith(f"{png} .csv .md\n") and md.read_text() in text
    pixels = imread(png)[..., :3]
    assert 3 * figure.DPI <= pixels.shape[1] <= 9 * figure.DPI and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10

    numbers = pd.read_csv(csv)
    assert len(numbers) and set(numbers["of_profile"]) == {"smoke"} and set(numbers["of_seed"]) == {1}
    logs = [pd.read_csv(path).melt().dropna() for path in runs.glob("*/*/metrics.csv")]
    measured = {pair for log in logs for pair in log.itertuples(index=False, name=None)}
    for row in numbers.to_dict("records"):
        if row.get("source") != "paper" and (row.get("source") != "computed here" or row["metric"] == "test/accuracy"):
            assert row["kind"] in ("point", "silhouette") if "kind" in row else (row["metric"], row["value"]) in measured


@pytest.mark.parametrize("name", slow_but("per_3", ALONE))
def test_figure_without_runs_is_computed(name: str, command: Command, tmp_path: Path) -> None:
    """It is the same each time, whatever `launch` and the profile."""
    spec, csvs = spec_of("figure", name), []
    said = " ".join(f"{key}={value}" for key, value in spec.draw.items() if key != "_target_")
    for words in (["profile=smoke", "launch=false"], ["profile=smoke"]):
        code, text, err = command(f"figure={name}", *words, f"out={tmp_path}/out", task=figure.run, root="figures")
        png, csv = (next((tmp_path / "out").glob(f"*{ending}")) for ending in (".png", ".csv"))
        assert (code, err) == (0, "") and text == f"{png.with_suffix('.md').read_text()}\n{png} .csv .md\n"
        assert f"- asked for besides, without effect: profile.test=100 profile=smoke\n- no runs: computed from {said}\n- commit " in text
        csvs.append(csv.read_bytes())
    assert 3 * figure.DPI <= imread(png).shape[1] <= 9 * figure.DPI and csvs[0] == csvs[1]
    assert len(numbers := pd.read_csv(csv)) > 100 and set(numbers["of_options"]) == {said} and numbers["of_commit"].notna().all()
