"""A paper's figure: ask for its runs as a table does, then draw them; some need none.   python -m experiments.figure --help"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments import store
from experiments.cli import RunFailed, main
from experiments.config import ConfigError, build
from experiments.launching.missing import complete, find, unfinished
from experiments.pick import due
from experiments.published import counted, notes
from experiments.show import choosing, columns, provenance
from experiments.spec import Table
from experiments.table import common_overrides, jobs, narrowed, output_name, raise_failed

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
    """What a drawing returns. numbers: all that is plotted, long form; lines: the numbers behind the picture, in words; table: in Markdown.

    `figure.draw._target_` names a function of experiments.figures: `draw(runs: Runs, **options) -> Drawing`, or of a figure without
    runs `draw(**options) -> Drawing`, the same for the same options; one that takes `overrides`, a run's of the command line, measures
    this machine, and says so itself. The options are the other keys of `figure.draw`. It writes nothing: size and text are its own,
    file names, resolution and title are not.
    """

    picture: Picture
    numbers: pd.DataFrame
    lines: list[str]
    table: str = ""


def canvas(rows: int, columns: int, width: float = 7.5, height: float = 2.9, **shared: Any) -> tuple[Picture, list[list[Axes]]]:
    """An empty picture, `width` inches wide in all and `height` a row of panels; no pyplot, so no display and no global state."""
    from matplotlib.figure import Figure

    picture = Figure((width, height * rows), layout="constrained")
    return picture, picture.subplots(rows, columns, squeeze=False, **shared).tolist()


def label(row: str, choice: str) -> str:
    return f"{row}, λ = {choice}" if choice else row


def spread(values: pd.Series, digits: int) -> str:
    """Mean ± std of a number over its seeds."""
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def run(cfg: DictConfig) -> None:
    """The task that Hydra runs: plan or train, then draw. Raises RunFailed when there is nothing to draw, or runs failed or diverged."""
    if not (cfg.figure.runs.rows or OmegaConf.is_missing(cfg.figure, "title")):
        return alone(cfg)
    table = narrowed(cfg, cfg.figure.runs, cfg.figure.only, cfg.only)
    asked = jobs(table, common_overrides(), targets=cfg.launch and not cfg.plan)
    if cfg.plan:
        from experiments.plan import plan

        print(plan(table, asked, cfg))
        return
    draw = build(cfg.figure.draw, "figure.draw", _partial_=True)  # bad input shows before anything is trained
    shared = {} if cfg.figure.networks else counted(cfg)
    complaints = complete(table, asked, cfg.runtime, cfg.wait, shared) if cfg.launch else []
    found = find(asked, cfg.runtime.runs, shared)
    wanted, trials = due(table, asked, found)
    done = {identity: found[identity] for identity in wanted["id"] if identity in found and found[identity].state == "done"}
    if done:
        facts = [*provenance(wanted, found), *choosing(trials, trials, found), *notes(table, wanted, found, shared)]
        about = columns(wanted, found)
        profile = "" if about["profile"] == "paper" else f"profile {about['profile']}"
        marks = [profile, about["data"], about["asked"]]
        publish(
            cfg, lambda: draw(Runs(table, wanted, done, cfg.runtime)), [*missing(pd.concat([wanted, trials]), found), *facts], about, marks
        )
    if complaints:
        raise ConfigError("; ".join(complaints))
    left = unfinished(table, asked, found, cfg.runtime) if cfg.launch else ""
    if left:
        print(left)
    raise_failed(pd.concat([wanted, trials]), found, {*trials["id"]} - {*wanted["id"]}, ended=cfg.launch and cfg.wait and not left)
    if not done and not left:
        raise RunFailed(f"nothing to draw: none of {wanted['id'].nunique()} runs is done in {cfg.runtime.runs}")


def alone(cfg: DictConfig) -> None:
    """Draws a figure that has no runs, whatever `launch` and the profile: it is the same each time, unless it measures."""
    if cfg.only or cfg.figure.only:
        word = [*cfg.only, *cfg.figure.only][0]
        raise ConfigError(f"only: this figure has no runs, so no row or column with {word} in its name; leave it out")
    if cfg.plan:
        print(f"## {cfg.figure.title}: the plan\n\n- nothing to train: this figure has no runs, it is computed when it is drawn")
        return
    draw = build(cfg.figure.draw, "figure.draw", _partial_=True)
    if "overrides" in inspect.signature(draw).parameters:
        asked = " ".join(common_overrides())
        publish(cfg, partial(draw, overrides=common_overrides()), [f"asked for besides: {asked}"] if asked else [], {"asked": asked})
        return
    import torch

    from experiments.provenance import commit, device_name

    torch.set_num_threads(cfg.runtime.threads or 1)  # its arrays are small
    options = " ".join(f"{key}={value}" for key, value in cfg.figure.draw.items() if key != "_target_")
    device, threads = device_name(torch.device("cpu")), torch.get_num_threads()
    about = {"options": options, **commit(), "device": device, "threads": threads, "torch": torch.__version__}
    idle = " ".join(word for word in common_overrides() if not word.startswith(("runtime.", "hydra")))
    facts = [
        *([f"asked for besides, without effect: {idle}"] if idle else []),
        f"no runs: computed from {options}",
        f"commit {about['commit']}{' with changes' if about['dirty'] else ''}; {device}, {threads} threads; torch {torch.__version__}",
    ]
    publish(cfg, draw, facts, about)


def publish(cfg: DictConfig, draw: Callable[[], Drawing], facts: list[str], about: dict[str, Any], marks: Iterable[str] = ()) -> None:
    """Writes the figure's .png, .csv and .md, each whole or not at all, and prints the last; all say where their numbers come from.

    facts: that in words; about: as columns of the CSV; marks: what of it follows the title.
    """
    from matplotlib import rc_context

    out = output_name(cfg, "figure")
    out.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):  # titles and legends read it when they are made
        drawing = draw()
        marks = "; ".join(filter(None, marks))
        whole = f"{cfg.figure.title} [{marks}]" if marks else cfg.figure.title
        drawing.picture.suptitle(fill(whole, int(13 * drawing.picture.get_figwidth())), fontsize=9)  # about 13 characters an inch
        said = {"Title": cfg.figure.title, "Description": "\n".join([*drawing.lines, *facts])}
        with store.written(out.with_name(out.name + ".png")) as file:
            drawing.picture.savefig(file, format="png", dpi=DPI, metadata=said)
    with store.written(out.with_name(out.name + ".csv")) as file:
        file.write(drawing.numbers.assign(**{f"of_{key}": text for key, text in about.items()}).to_csv(index=False).encode())
    above = [drawing.table, ""] if drawing.table else []
    text = "\n".join([f"## {cfg.figure.title}", "", *above, *(f"- {line}" for line in [*drawing.lines, *facts]), ""])
    with store.written(out.with_name(out.name + ".md")) as file:
        file.write(text.encode())
    print(f"{text}\n{out}.png .csv .md")


def missing(wanted: pd.DataFrame, found: dict[str, store.Run]) -> list[str]:
    """Which runs the picture lacks, those included that choose λ, in one line; none if it lacks none."""
    states = [found[identity].state if identity in found else "missing" for identity in wanted["id"]]
    ended = [state == "done" or (state == "diverged" and trial) for state, trial in zip(states, wanted["trial"], strict=True)]
    left = wanted[[not each for each in ended]].drop_duplicates("id")
    if left.empty:
        return []
    names = [
        f"{label(one.row, one.choice)} seed {one.seed} ({one.column}{', to choose λ' if one.trial else ''})" for one in left.itertuples()
    ]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return [f"MISSING {len(names)} of {wanted['id'].nunique()} runs: {'; '.join(names[:6])}{more}"]


if __name__ == "__main__":
    from experiments.figure import run as task

    main(task, "figures")
