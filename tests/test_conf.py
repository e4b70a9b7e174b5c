"""Tests of the files of conf/: every target takes its keys, every experiment trains, and tables are consistent with themselves."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments import cli, store, train
from experiments.config import options
from experiments.spec import OWN_KEYS

FILES = {str(path.relative_to(cli.CONF).with_suffix("")): OmegaConf.load(path) for path in sorted(cli.CONF.rglob("*.yaml"))}
METRICS = {"train/ce", "train/perplexity", "valid/perplexity"}
METRICS |= {f"test/{name}" for name in ("accuracy", "error", "ce", "perplexity", "feature_rms")}
METRICS |= {f"layer{layer}/{name}" for layer in (3, 6, 9) for name in ("rms", "sw1")}  # of probe=activations


def targets(node: Any) -> Iterator[DictConfig]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key])


def test_keys_bind_to_the_targets() -> None:
    with_target = [(name, node) for name, content in FILES.items() for node in targets(content)]
    for name, node in with_target:
        keys = {str(key) for key in node if not str(key).startswith("_")}
        signature = inspect.signature(get_object(node["_target_"]))
        bound = signature.bind_partial(**dict.fromkeys(keys))
        assert keys <= bound.arguments.keys() or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()), name
        if not node.get("_partial_") and not name.startswith(("dataset/", "figure/")):  # nothing is added to what the file says
            signature.bind(**dict.fromkeys(keys))
    for group in ("dataset", "model", "norm", "schedule", "method"):
        assert {f"{group}/{name}" for name in options(group)} - {name for name, _ in with_target} <= {"method/vanilla"}


def test_the_first_lines_say_where_files_go() -> None:
    """Hydra reads `# @package` in the first line of a file only."""
    for name in FILES:
        lines = (cli.CONF / f"{name}.yaml").read_text().splitlines()
        group, _, option = name.partition("/")
        wanted = {"method": f"# @package method.{option}", "experiment": "# @package _global_"}.get(group)
        wanted = "# @package method" if name == "method/vanilla" else wanted
        assert lines[0].startswith("# ") and (wanted is None or lines[0] == wanted), name
        assert [line for line in lines if line.startswith("# @package")] == ([wanted] if wanted else []), name


def test_files_hold_no_keys_that_belong_elsewhere() -> None:
    """A key of a run in a root file would silently beat an experiment's; profile, runtime and seed are the caller's."""
    for name, content in FILES.items():
        if "/" not in name:
            assert set(content) <= {"defaults", "hydra"}, name
        if name.startswith("experiment/"):
            assert all(str(key).startswith("override /") for line in content.defaults if line != "_self_" for key in line), name
            assert not {"profile", "runtime", "seed"} & set(content), name


EXPERIMENTS = options("experiment")


@pytest.mark.parametrize("name", [name if name == "demo" else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS])
def test_every_experiment_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["profile=smoke", "profile.steps=1", "profile.train=20", "profile.test=20", "batch_size=10", "runtime.threads=1"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    words = [f"experiment={name}", *small, f"runtime.runs={tmp_path}/runs", f"runtime.data_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["retable", *words])
    cli.main(train.train, "config")
    assert capsys.readouterr().err == ""
    (path,) = (tmp_path / "runs").glob("*/*")
    run, content = store.Run(path), OmegaConf.to_container(FILES[f"experiment/{name}"])
    assert run.state == "done" and run.result()["steps"] == 1 and "test/accuracy" in run.metrics()[-1]
    cfg = OmegaConf.to_container(run.config())
    for key in set(content) - {"defaults", "batch_size"}:
        assert content[key].items() <= cfg[key].items() if isinstance(content[key], dict) else content[key] == cfg[key], key


# tables and figures

SPECS = {name: content.get("runs", content) for name, content in FILES.items() if name.startswith(("table/", "figure/"))}
SPECS = {name: spec for name, spec in SPECS.items() if "rows" in spec}  # a figure may take its runs from a table


def test_labels_and_metrics_of_tables_are_known() -> None:
    for name, spec in SPECS.items():
        labels, columns = [row.label for row in spec["rows"]], set(spec.columns)
        assert len(set(labels)) == len(labels), name
        assert all(row.get("against", row.label) in labels for row in spec["rows"]), name
        for claim in spec.get("claims", []):
            assert set(claim.of) <= set(labels) and claim.get("against", claim.of[0]) in labels, claim.says
            assert set(claim.get("columns", [])) <= columns and claim.metric in METRICS, claim.says
        for column in spec.columns.values():
            assert column.metric in METRICS, name
            assert column.get("better", "max") == ("max" if column.metric.endswith("accuracy") else "min"), name


def test_the_papers_numbers_have_a_place() -> None:
    for name, spec in SPECS.items():
        for row in spec["rows"]:
            values = {str(value) for grid in row.get("grid", {}).values() for value in grid}
            for key, number in row.get("paper", {}).items():
                if isinstance(number, DictConfig):
                    assert str(key) in values and set(number) <= set(spec.columns), (name, row.label)
                elif key == "choice":
                    assert "pick" in row and (str(number) in values or "," in str(number)), (name, row.label)
                else:
                    assert key in spec.columns, (name, row.label)
                for cell in number.values() if isinstance(number, DictConfig) else [number]:
                    center, _, spread = str(cell).partition("±")
                    assert math.isfinite(float(center)) and float(spread or 0) >= 0


def test_overrides_of_tables_are_keys_of_runs() -> None:
    """But a table whose printed protocol is out of reach starts from a profile, and runs may keep what a figure reads."""
    for name, spec in SPECS.items():
        lines = [spec.get("base", []), *(row.get("overrides", []) for row in spec["rows"])]
        lines += [column.get("overrides", []) for column in spec.columns.values()] + [list(row.get("grid", {})) for row in spec["rows"]]
        for word in (word for words in lines for word in words):
            key = word.lstrip("+~").split("=")[0].split(".")[0]
            known = re.fullmatch(r"runtime\.keep_weights=\d+", word) or (name.startswith("table/") and word == "profile=reduced")
            assert known or (key not in OWN_KEYS and key not in ("runtime", "profile", "seed")), (name, word)
