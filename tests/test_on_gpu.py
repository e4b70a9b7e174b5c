"""Tests of on_gpu.sh, the script for a GPU that is there for minutes: its list asks for runs that exist, and it can go on later."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import cli
from experiments.spec import OWN_KEYS
from experiments.table import jobs, narrowed

SCRIPT = Path(__file__).with_name("on_gpu.sh")
LIST = Path(__file__).with_name("on_gpu.yaml")


@pytest.mark.slow
def test_every_entry_asks_for_runs() -> None:
    """`narrowed` raises for a word of `only` that no row or column has, composing for a table, figure or key that is not there."""
    done = subprocess.run([SCRIPT, "list"], capture_output=True, text=True, check=True, env=os.environ | {"LIST": str(LIST)})
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == len(OmegaConf.load(LIST))
    ids: dict[str, set[str]] = {"experiments.table": set(), "experiments.figure": set()}
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        for _, option, module, *words in commands:
            assert option == "-m" and "step=graph" in words and "published=true" in words
            cfg = compose(f"{module.removeprefix('experiments.')}s", words)
            spec = cfg.table if module == "experiments.table" else cfg.figure.runs
            own = [word for word in words if word.split("=")[0].split(".")[0] in OWN_KEYS]
            asked = jobs(narrowed(cfg, spec, cfg.only), [word for word in words if word not in own], targets=False)
            assert asked["id"].nunique() > 0, words
            ids[module] |= {*asked["id"]}
            if "table=itdm_4" in words:  # whose grid is that of a row by its number
                assert {*asked["choice"]} == {"", "0.8", "0.6", "1"}
            if {*words} & {"figure=itdm_1", "figure=itdm_2", "figure=itdm_4"}:
                assert {*asked["id"]} <= ids["experiments.table"], "a figure of the list's own runs"


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- {table: demo, seconds: 60, onyl: [ACC]}")
    asked = [str(SCRIPT), str(tmp_path / "out"), "runtime.device=cpu"]
    done = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"LIST": f"{tmp_path}/list.yaml"})
    assert done.returncode == 2 and "demo: there is no key onyl" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.usefixtures("untraced")
@pytest.mark.skipif(sys.platform != "linux", reason="needs bash 4 and GNU timeout")
def test_asked_again_it_goes_on(tmp_path: Path) -> None:
    """From another folder, on a CPU, with the check and the bench of before."""
    out, runs = tmp_path / "out", tmp_path / "runs"
    out.mkdir()
    (out / "check.json").write_text("{}")
    (out / "bench.txt").write_text("measured before\n")
    entry = "- {table: demo, only: [without], seeds: [1], overrides: [step=graph, runtime.runs_per_device=4], seconds: 60}\n"
    common = ["runtime.device=cpu", "runtime.threads=1", f"runtime.runs={runs}", "profile=smoke", "step=eager", "precision=fp32"]

    def call(entries: str) -> tuple[int, str]:
        (tmp_path / "list.yaml").write_text(entries)
        asked = [str(SCRIPT), "out", "90", *common]
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"LIST": "list.yaml"})
        return done.returncode, done.stdout.splitlines()[-1]

    code, last = call(entry + "- {table: none, seconds: 60}\n")
    assert code == 1 and "s  1 complete, 0 cut, 1 failed, 0 not reached; " in last
    assert "table: 'none' is not known" in (out / "log.txt").read_text()
    results = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")}
    assert len(results) == 1
    assert {path.name for path in out.iterdir()} == {"check.json", "bench.txt", "tables.txt", "log.txt", "kept.tar"}
    assert (out / "bench.txt").read_text() == "measured before\n"
    printed = (out / "tables.txt").read_text()
    assert printed.count("\n## ") == 1 and "without ITDM" in printed
    with tarfile.open(out / "kept.tar") as kept:
        names = kept.getnames()
        packed = kept.extractfile("published/demo.zip")
        assert packed is not None and len(zipfile.ZipFile(packed).namelist()) == 3  # of the run
    assert {Path(name).suffix for name in names if name.startswith("tables/demo")} >= {".md", ".csv"}

    code, last = call(entry)
    assert code == 0 and "s  1 complete, 0 cut, 0 failed, 0 not reached; " in last
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")} == results
    assert "are to be trained" not in (out / "tables.txt").read_text()
    with tarfile.open(out / "kept.tar") as kept:
        assert kept.getnames() == names
