"""A paper's table as data: rows x columns of overrides, the paper's numbers and claims; and a figure as a table's runs plus a drawing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from experiments.config import Config


@dataclass
class Column:
    metric: str = MISSING  # as in metrics.csv, e.g. test/accuracy
    overrides: list[str] = field(default_factory=list)
    better: str = "max"  # max | min
    digits: int = 2
    delta: bool = False  # the column shows the change from the row's `against`, paired by seed
    chance: float | None = None  # no better: "div."; a run that left the numbers has this one, and is an outcome, no failure
    at: str | None = None  # in place of the table's `at`; a pick goes by the table's in every column, so columns of the same runs agree

    def idle(self, number: float) -> bool:
        """Whether it is that of networks that have not learned."""
        return self.chance is not None and (number <= self.chance if self.better == "max" else number >= self.chance)


@dataclass
class Row:
    label: str = MISSING
    overrides: list[str] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)  # key -> values; without `pick`, one printed row per value
    extra: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # word -> more values, in columns so named
    against: str | None = None  # the row that this one is compared with
    pick: str | None = None  # "max test/accuracy": the value of the grid that is printed
    select: list[str] = field(default_factory=list)  # overrides of the runs that `pick` reads; what it picks is then trained without them
    paper: dict[str, Any] = field(default_factory=dict)  # column -> number or "3.82±0.18"; `choice` -> the paper's pick; or choice -> such
    quoted: dict[str, float] = field(default_factory=dict)  # column -> number that the paper quotes from other work
    doubted: list[str] = field(default_factory=list)  # columns whose printed number is not to be trusted; the notes say why


@dataclass
class Claim:
    """What the paper says in words.

    check: "compare": `metric` of the rows `of`, for each of their choices, against row `against` (None: the one that each row names):
    `relation` is < or >, by more than -`margin`; "best": the same against that row and every other row with one number that has the same
    `against`, for the printed choice of a row with a pick; with a `margin` it may be that much worse than the best of them; "trend":
    `metric` along the grid of each row, starting with row `against` or the one that the row names, if any: `relation` is "rising" or
    "falling". A row with `select` has one choice, the picked one, so no trend.
    """

    says: str = MISSING
    metric: str = MISSING
    of: list[str] = MISSING
    against: str | None = None
    check: str = "compare"
    relation: str = MISSING
    margin: float = 0.0
    least: int = 0  # so many of the comparisons (of "best": cells, one for each row and column) must hold; 0: all
    picked: bool = False  # of a row with a pick, "compare" the printed choice only
    columns: list[str] = field(default_factory=list)  # default: every column; of columns that share their runs the first counts


@dataclass
class Table:
    title: str = MISSING
    base: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    at: str = "last"  # last | last10 | median10 | "min valid/perplexity" ...: how a run's evaluations become its number
    over: str = "mean"  # mean | median: how seeds become a cell
    columns: dict[str, Column] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # errata of the paper, decisions: printed below

    def rivals(self, label: str, against: str | None = None) -> list[str]:
        """What row `label` must beat to be the best: `against` (None: the row that it names), and every other row that is compared with
        that and prints one number, which was not picked on the test set."""
        base = against or next(row.against for row in self.rows if row.label == label)
        single = [row for row in self.rows if not row.grid or (row.pick is not None and " test/" not in row.pick)]
        others = [row.label for row in single if row.against == base and row.label not in (label, base)]
        return [] if base is None else [base, *others]


@dataclass
class TablesConfig(Config):
    """What `experiments.table` takes: its own keys, and every key of a run, handed to all of the table's runs."""

    table: Table = field(default_factory=Table)
    launch: bool = True  # false: print what there is
    wait: bool = True  # false: submit what is missing to a cluster, print what there is
    published: bool | None = None  # whether published runs count where a run of one's own is missing; null: with launch=false only
    plan: bool = False  # print what is missing and what it would cost; launch nothing
    only: list[str] = field(default_factory=list)  # rows and columns with one of these words (or all of "some words") in their name
    out: str = "runs/tables"  # where the Markdown, LaTeX and CSV files go


@dataclass
class Figure:
    title: str = MISSING
    runs: Table = field(default_factory=Table)  # the runs it reads, asked for exactly as a table asks; without rows it needs none
    only: list[str] = field(default_factory=list)  # rows and columns of `runs`, by words in their names; empty: all
    networks: bool = False  # the drawing reads the runs' networks, which published runs do not have
    draw: Any = MISSING  # _target_: a function of experiments.figures, with its options; see experiments.figure.Drawing


@dataclass
class FiguresConfig(Config):
    figure: Figure = field(default_factory=Figure)
    launch: bool = True
    wait: bool = True
    published: bool | None = None
    plan: bool = False
    only: list[str] = field(default_factory=list)
    out: str = "runs/figures"


# of the commands about tables; every other override goes to the runs
OWN_KEYS = ("table", "figure", "launch", "wait", "published", "plan", "only", "out", "watch", "retry", "prune", "paper")

ConfigStore.instance().store("tables_schema", TablesConfig)
ConfigStore.instance().store("figures_schema", FiguresConfig)
