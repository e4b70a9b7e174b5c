"""The files of conf/: every target takes its keys, every experiment trains, and tables are consistent with themselves."""

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

FILES = sorted(cli.CONF.rglob("*.yaml"))
NAMES = [str(path.relative_to(cli.CONF).with_suffix("")) for path in FILES]
METRICS = {
    "train/ce",
    *(f"{split}/perplexity" for split in ("train", "valid")),
    *(f"test/{name}" for name in ("accuracy", "error", "ce", "perplexity", "feature_rms")),
}
METRICS |= {f"layer{layer}/{name}" for layer in (3, 6, 9) for name in ("rms", "sw1")}  # of probe=activations


def targets(node: Any) -> Iterator[DictConfig]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key])


WITH_TARGET = [(name, node) for name, path in zip(NAMES, FILES, strict=True) for node in targets(OmegaConf.load(path))]


def test_files_are_found() -> None:
    assert {"config", "dataset/digits", "method/itdm_c", "table/demo"} <= set(NAMES)
    assert {"dataset/digits", "model/net2c", "norm/gn", "schedule/steps", "method/itdm_c"} <= {name for name, _ in WITH_TARGET}


@pytest.mark.parametrize(("name", "node"), WITH_TARGET, ids=[name for name, _ in WITH_TARGET])
def test_keys_bind_to_the_target(name: str, node: DictConfig) -> None:
    keys = {str(key) for key in node if not str(key).startswith("_")}
    signature = inspect.signature(get_object(node["_target_"]))
    bound = signature.bind_partial(**dict.fromkeys(keys))
    assert keys <= bound.arguments.keys() or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    if not node.get("_partial_") and not name.startswith(("dataset/", "figure/")):  # nothing is added to what the file says
        signature.bind(**dict.fromkeys(keys))


@pytest.mark.parametrize("group", ["dataset", "model", "norm", "schedule", "method"])
def test_every_option_of_a_group_has_a_target(group: str) -> None:
    for name in options(group):
        if name != "vanilla":
            assert "_target_" in OmegaConf.load(cli.CONF / group / f"{name}.yaml"), name


@pytest.mark.parametrize("name", NAMES)
def test_first_line_says_where_it_goes(name: str) -> None:
    """Hydra reads `# @package` in a file's first line only."""
    lines = (cli.CONF / f"{name}.yaml").read_text().splitlines()
    group, _, option = name.partition("/")
    expected = {"method": f"# @package method.{option}", "experiment": "# @package _global_"}.get(group)
    if name == "method/vanilla":
        expected = "# @package method"
    assert lines[0].startswith("# ")
    assert [line for line in lines if line.startswith("# @package")] == ([expected] if expected else [])
    assert expected is None or lines[0] == expected


@pytest.mark.parametrize("name", ["config", "tables", "figures", "papers", "publish", "status", "groups"])
def test_root_files_hold_no_keys_of_a_run(name: str) -> None:
    """They would silently beat an experiment's: defaults are in the dataclass."""
    assert set(OmegaConf.load(cli.CONF / f"{name}.yaml")) <= {"defaults", "hydra"}


@pytest.mark.parametrize("name", options("experiment"))
def test_experiments_override_groups_in_their_defaults_only(name: str) -> None:
    content = OmegaConf.load(cli.CONF / "experiment" / f"{name}.yaml")
    assert all(str(key).startswith("override /") for line in content.defaults if line != "_self_" for key in line)
    assert not {"profile", "runtime", "seed"} & set(content)  # these are the caller's


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["profile=smoke", "profile.steps=1", "profile.train=20", "profile.test=20", "batch_size=10", "runtime.threads=1"]
    words = [f"experiment={name}", *small, f"runtime.runs={tmp_path}/runs", f"runtime.data_dir={tmp_path}"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["retable", *words])
    cli.main(train.train, "config")
    assert capsys.readouterr().err == ""
    (path,) = (tmp_path / "runs").glob("*/*")
    run = store.Run(path)
    assert run.state == "done" and run.result()["steps"] == 1 and "test/accuracy" in run.metrics()[-1]
    cfg, content = OmegaConf.load(path / "config.yaml"), OmegaConf.load(cli.CONF / "experiment" / f"{name}.yaml")
    for key in set(content) - {"defaults", "batch_size"}:
        node = OmegaConf.to_container(cfg[key]) if isinstance(content[key], DictConfig) else cfg[key]
        wanted = OmegaConf.to_container(content[key]) if isinstance(content[key], DictConfig) else content[key]
        assert node == wanted if not isinstance(wanted, dict) else wanted.items() <= node.items(), key


# tables and figures

TABLES = [("table", name) for name in options("table")] + [("figure", name) for name in options("figure")]


def spec(kind: str, name: str) -> DictConfig:
    content = OmegaConf.load(cli.CONF / kind / f"{name}.yaml")
    return content if kind == "table" else content.runs


def written(kind: str, name: str) -> bool:
    """A figure may take its runs from a table instead of listing them."""
    content = OmegaConf.load(cli.CONF / kind / f"{name}.yaml")
    return kind == "table" or ("runs" in content and "rows" in content.runs)


LISTED = [pair for pair in TABLES if written(*pair)]


@pytest.mark.parametrize(("kind", "name"), LISTED)
def test_labels_are_consistent(kind: str, name: str) -> None:
    content = spec(kind, name)
    labels, columns = [row.label for row in content["rows"]], set(content.columns)
    assert len(set(labels)) == len(labels)
    for claim in content.get("claims", []):
        assert set(claim.of) <= set(labels) and claim.get("against", claim.of[0]) in labels, claim.says
        assert set(claim.get("columns", [])) <= columns, claim.says
        assert claim.metric in METRICS, claim.says
    for row in content["rows"]:
        assert row.get("against", row.label) in labels, row.label
    for column in content.columns.values():
        assert column.metric in METRICS
        assert column.get("better", "max") in ("max", "min")
        assert column.get("better", "max") == ("max" if column.metric.endswith("accuracy") else "min")


@pytest.mark.parametrize(("kind", "name"), LISTED)
def test_papers_numbers_have_a_place(kind: str, name: str) -> None:
    content = spec(kind, name)
    columns = set(content.columns)
    for row in content["rows"]:
        values = {str(value) for grid in row.get("grid", {}).values() for value in grid}
        for key, number in row.get("paper", {}).items():
            if isinstance(number, DictConfig):
                assert str(key) in values and set(number) <= columns, row.label
            elif key == "choice":
                assert "pick" in row and (str(number) in values or "," in str(number)), row.label
            else:
                assert key in columns, row.label
            for cell in number.values() if isinstance(number, DictConfig) else [number]:
                center, _, spread = str(cell).partition("±")
                assert math.isfinite(float(center)) and float(spread or 0) >= 0


@pytest.mark.parametrize(("kind", "name"), LISTED)
def test_overrides_are_the_runs(kind: str, name: str) -> None:
    """A table's overrides go to runs: none is a key of the command, or of what must not change a number.

    But a table whose printed protocol is out of reach starts from a profile, and runs may keep what a figure reads.
    """
    content = spec(kind, name)
    lines = [content.get("base", []), *(row.get("overrides", []) for row in content["rows"])]
    lines += [column.get("overrides", []) for column in content.columns.values()] + [list(row.get("grid", {})) for row in content["rows"]]
    for words in lines:
        for word in words:
            key = word.lstrip("+~").split("=")[0].split(".")[0]
            known = re.fullmatch(r"runtime\.keep_weights=\d+", word) or (kind == "table" and word == "profile=reduced")
            assert known or (key not in OWN_KEYS and key not in ("runtime", "profile", "seed")), word
