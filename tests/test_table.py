"""Tables: which runs they ask for, how these become cells, verdicts and files, and what happens when runs fail."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from endings import ROOT
from omegaconf import OmegaConf
from tables import CELLS, FAILING, SPEC, Command, grid, results, words

from experiments import store, train
from regularizers.itdm import ITDM


def test_each_cell_is_trained_once(command: Command, tmp_path: Path) -> None:
    """First by hand, then by the table, then again; then after a run's folder is deleted."""
    runs = tmp_path / "runs"
    by_hand = ["dataset.train=100", "epochs=1", "schedule.at=[1]", "method=itdm_c", "method.itdm_c.weight=0.2,0.4"]
    assert command("-m", *by_hand, task=train.train, root="config")[0] == 0
    first = results(runs)
    assert len(first) == 2

    code, out, err = command("table=tiny")
    assert (code, err) == (0, "")
    assert out.startswith(f"4 of {CELLS} runs are to be trained\n") and out.count("runs are to be trained") == 1
    second = results(runs)
    assert len(second) == CELLS and second.items() >= first.items()
    shown = out[out.index("## ") :]
    assert command("table=tiny") == (0, shown, "") and results(runs) == second

    gone = next(path.parent for path in runs.glob("*itdm_c/*/result.json"))
    shutil.rmtree(gone)
    code, out, err = command("table=tiny")
    assert (code, err) == (0, "") and grid(out) == grid(shown) and out.startswith(f"1 of {CELLS} runs are to be trained\n")
    third = results(runs)
    assert {identity for identity in second if second[identity] != third[identity]} == {gone.name[-10:]}

    # a cell is the mean and the standard deviation of the runs' last numbers
    cells = pd.read_csv(next((tmp_path / "out").glob("*.csv")))
    values = [store.Run(path.parent).metrics()[-1]["test/ce"] for path in runs.glob("*itdm_c/weight=0.4*/result.json")]
    (cell,) = cells[(cells["metric"] == "test/ce") & (cells["choice"] == 0.4)].itertuples()
    assert (cell.ours, cell.std) == pytest.approx((statistics.mean(values), statistics.stdev(values)), abs=1e-12)
    assert len(cells) == 6 and set(cells["n"]) == set(cells["wanted"]) == {2} and set(cells["of_seed"]) == {"1; 2"}


def test_common_overrides_reach_every_run(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("table=tiny", "seed=7", "batch_size=20", "profile.seeds=1", "profile.steps=1")
    assert code == 0 and "- asked for besides: profile.test=100 seed=7 batch_size=20 profile.seeds=1 profile.steps=1\n" in out
    asked = set(pd.read_csv(next((tmp_path / "out").glob("*.csv")))["of_asked"])
    assert asked == {"profile.test=100 seed=7 batch_size=20 profile.seeds=1 profile.steps=1"}
    configs = [OmegaConf.load(path) for path in (tmp_path / "runs").glob("*/*/config.yaml")]
    assert [(cfg.seed, cfg.batch_size, cfg.profile.steps) for cfg in configs] == [(1, 20, 1)] * 3  # the seeds are the table's


def test_only(command: Command) -> None:
    code, out, err = command("launch=false")
    assert code == 2 and out == "" and err.startswith("retable: table: nothing is chosen; allowed: demo") and err.count("\n") == 1
    code, out, _ = command("table=tiny", "only=[without,CE]", "launch=false")
    assert code == 0 and list(grid(out)) == ["", "without"] and "it helps" not in out  # a claim about a row that is not there
    code, out, _ = command("table=tiny", "only=[with]", "launch=false")  # and the row that it is compared with
    assert code == 0 and list(grid(out)) == ["", "without", "with λ=0.2", "with λ=0.4"]
    code, out, _ = command("table=demo", "only=[without ITDM,train CE]", "launch=false")  # rows and columns that have all the words
    assert code == 0 and grid(out) == {"": ["train CE"], "without ITDM": ["-"]}
    code, _, err = command("table=tiny", "only=[CE,CE ACC]", "launch=false")
    assert (code, err) == (2, "retable: only: no row or column has ACC CE in its name; allowed: ACC, CE, with, without\n")


def test_one_run_raises_and_one_diverges(command: Command, extra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (extra / "table" / "failing.yaml").write_text(FAILING)
    plain = ITDM.penalty

    def penalty(self: ITDM, *rest: Any) -> Any:
        if self.weight == 0.4:
            raise RuntimeError("a stage\nthat broke")
        return plain(self, *rest)

    monkeypatch.setattr(ITDM, "penalty", penalty)
    code, out, err = command("table=failing")
    cells = {label: line[0] for label, line in grid(out).items()}
    assert (code, cells["wild"], cells["itdm λ=0.4"]) == (1, "div.", "failed")
    assert all(re.fullmatch(r"\d+\.\d\d", cells[label]) for label in ("plain", "smoothed", "itdm λ=0.2", "itdm λ=0.6"))
    assert len(results(tmp_path / "runs")) == 5  # that it diverged is a result
    (broken,) = (tmp_path / "runs").glob("*/*/error.txt")
    assert "RuntimeError: a stage\nthat broke" in broken.read_text()
    assert all(line.startswith("retable: ") for line in err.splitlines()), err
    assert "2 of 6 runs failed or diverged" in err and str(broken.parent) in err and "is nan at epoch" in err

    monkeypatch.undo()  # the bug is fixed: the failed run is trained again, the diverged one is not
    code, out, err = command("table=failing")
    cells = {label: line[0] for label, line in grid(out).items()}
    assert code == 1 and out.startswith("1 of 6 runs are to be trained\n") and "1 of 6 runs failed or diverged" in err
    assert cells["wild"] == "div." and re.fullmatch(r"\d+\.\d\d", cells["itdm λ=0.4"]) and not broken.exists()

    code, out, err = command("table=failing", "table.columns.ACC.chance=10.5")  # where coming to nothing is an outcome
    assert (code, err) == (0, "") and grid(out)["wild"] == ["10.50 div."]


def test_missing_data_leaves_cells_open(command: Command, extra: Path, tmp_path: Path) -> None:
    """Some runs have bad input: the others are trained, the table is printed, and the exit code is that of bad input."""
    text = SPEC.replace("dataset=digits, dataset.train=100, ", "").replace("seeds: [1, 2]", "seeds: [1]")
    text = text.replace("test/accuracy}", "test/accuracy, overrides: [dataset=kmnist]}")
    (extra / "table" / "half.yaml").write_text(text.replace("digits: 4}", "digits: 4, overrides: [dataset=digits]}"))
    code, out, err = command("table=half")
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"retable: dataset: kmnist is not under {tmp_path}")
    assert grid(out)["without"][0] == "-" and re.fullmatch(r"\d\.\d{4}", grid(out)["without"][2])


# several processes


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.usefixtures("extra")
def test_two_processes_ask_at_once(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    asked = [sys.executable, "-m", "experiments.table", *words(tmp_path, runs), "table=tiny", f"out={tmp_path}/out"]
    both = [subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert [len(path.read_text().splitlines()) for path in runs.glob("*/*/train.log")] == [1] * CELLS  # each is trained by one of them
    tables = [text[text.index("## ") :] for text in texts]
    assert tables[0] == tables[1] and not any("-" in line for line in grid(tables[0]).values())


@pytest.mark.no_cover
@pytest.mark.usefixtures("untraced")
def test_every_launcher_gives_the_same_numbers(command: Command, tmp_path: Path) -> None:
    launchers = {  # each with the number of runs that it trains
        "joblib": (2, ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        "submitit_local": (1, ["hydra/launcher=submitit_local"]),
        "side by side": (1, ["runtime.runs_per_device=2"]),
    }
    asked = ["table=tiny", "only=[without]"]
    assert command(*asked)[0] == 0
    for name, (count, more) in launchers.items():
        runs = tmp_path / name
        code, _, err = command(*asked, f"profile.seeds={count}", *more, runs=runs)
        assert (code, len(results(runs))) == (0, count), f"{name}: {err}"
        for path in runs.glob("*/*/metrics.csv"):
            assert path.read_text() == (tmp_path / "runs" / path.relative_to(runs)).read_text(), name
