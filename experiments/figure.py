"""A paper's figure: ask for its runs as a table does, then draw them.   python -m experiments.figure --help"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from omegaconf import DictConfig

from experiments import store
from experiments.cli import RunFailed, main
from experiments.config import ConfigError, build
from experiments.show import columns, provenance
from experiments.spec import Table
from experiments.table import common_overrides, complete, find, jobs, narrowed, output_name, raise_failed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

DPI = 150
STYLE: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7}


@dataclass(frozen=True)
class Runs:
    """What a drawing reads.

    wanted: the figure's jobs (row, choice, column, seed, id): one line per cell and seed.
    done: id -> run, of those that are finished; at least one. runtime: how to compute here (device, threads, data_dir).
    """

    table: Table
    wanted: pd.DataFrame
    done: dict[str, store.Run]
    runtime: DictConfig

    def panels(self) -> dict[str, pd.DataFrame]:
        """The jobs of each set of columns that differ only in their metric, so hold the same runs; named by the words they share."""
        sets: dict[tuple[str, ...], list[str]] = {}
        for name, group in self.wanted.groupby("column", sort=False):
            sets.setdefault(tuple(group["id"]), []).append(str(name))
        found = {}
        for names in sets.values():
            shared = " ".join(word for word in names[0].split() if all(word in name.split() for name in names))
            found[shared or ("" if len(sets) == 1 else " / ".join(names))] = self.wanted[self.wanted["column"] == names[0]]
        return found

    def same(self, jobs: pd.DataFrame) -> list[str]:
        """The columns that hold the runs of this panel."""
        return [str(name) for name, group in self.wanted.groupby("column", sort=False) if list(group["id"]) == list(jobs["id"])]


class Drawing(NamedTuple):
    """What a drawing returns. numbers: all that is plotted, long form; lines: the numbers behind the picture, in words.

    `figure.draw._target_` names a function `draw(runs: Runs, **options) -> Drawing` of experiments.figures; its options are the
    other keys of `figure.draw`. It writes nothing: size and text are its own, file names, resolution and title are not.
    """

    picture: Picture
    numbers: pd.DataFrame
    lines: list[str]


def canvas(rows: int, columns: int, width: float = 7.5, height: float = 2.9, **shared: Any) -> tuple[Picture, list[list[Axes]]]:
    """An empty picture, `width` inches wide in all and `height` a row of panels; no pyplot, so no display and no global state."""
    from matplotlib.figure import Figure

    picture = Figure((width, height * rows), layout="constrained")
    return picture, picture.subplots(rows, columns, squeeze=False, **shared).tolist()


def label(row: str, choice: str) -> str:
    return f"{row}, λ = {choice}" if choice else row


def run(cfg: DictConfig) -> None:
    """The task that Hydra runs: plan or train, then draw. Raises RunFailed when there is nothing to draw, or runs failed or diverged."""
    table = narrowed(cfg, cfg.figure.runs, cfg.figure.only, cfg.only)
    wanted = jobs(table, common_overrides(), targets=cfg.launch)
    if cfg.plan:
        from experiments.plan import plan

        print(plan(table, wanted, cfg))
        return
    draw = build(cfg.figure.draw, "figure.draw", _partial_=True)  # bad input shows before anything is trained
    complaints = complete(wanted, cfg.runtime.runs) if cfg.launch else []
    found = find(wanted, cfg.runtime.runs)
    done = {identity: one for identity, one in found.items() if one.state == "done"}
    if done:
        from matplotlib import rc_context

        facts = provenance(wanted, found)
        out = output_name(cfg, "figure")
        with rc_context(STYLE):  # titles and legends read it when they are made
            drawing = draw(Runs(table, wanted, done, cfg.runtime))
            about = columns(wanted, found)
            write(drawing, cfg.figure.title, facts, about, out)
        text = "\n".join([f"## {cfg.figure.title}", "", *(f"- {line}" for line in [*drawing.lines, *missing(wanted, found), *facts]), ""])
        with store.written(out.with_name(out.name + ".md")) as file:
            file.write(text.encode())
        print(f"{text}\n{out}.png .csv .md")
    if complaints:
        raise ConfigError("; ".join(complaints))
    raise_failed(wanted, found)
    if not done:
        raise RunFailed(f"nothing to draw: none of {wanted['id'].nunique()} runs is done in {cfg.runtime.runs}")


def write(drawing: Drawing, title: str, facts: list[str], about: dict[str, str], out: Path) -> None:
    """`out`.png and .csv, each whole or not at all; both say where their numbers come from."""
    profile = "" if about["profile"] == "paper" else f"profile {about['profile']}"
    whole = f"{title} [{'; '.join(filter(None, (profile, about['data'], about['asked'])))}]"
    drawing.picture.suptitle(fill(whole, int(13 * drawing.picture.get_figwidth())), fontsize=9)  # about 13 characters an inch
    out.parent.mkdir(parents=True, exist_ok=True)
    with store.written(out.with_name(out.name + ".png")) as file:
        drawing.picture.savefig(file, format="png", dpi=DPI, metadata={"Title": title, "Description": "\n".join([*drawing.lines, *facts])})
    with store.written(out.with_name(out.name + ".csv")) as file:
        file.write(drawing.numbers.assign(**{f"of_{key}": text for key, text in about.items()}).to_csv(index=False).encode())


def missing(wanted: pd.DataFrame, found: dict[str, store.Run]) -> list[str]:
    """Which runs are not in the picture, in one line; none if all are."""
    left = wanted[[identity not in found or found[identity].state != "done" for identity in wanted["id"]]].drop_duplicates("id")
    if left.empty:
        return []
    names = [f"{label(one.row, one.choice)} seed {one.seed} ({one.column})" for one in left.itertuples()]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return [f"MISSING {len(names)} of {wanted['id'].nunique()} runs: {'; '.join(names[:6])}{more}"]


if __name__ == "__main__":
    from experiments.figure import run as task

    main(task, "figures")
