"""A filled table as text: console and Markdown, LaTeX, CSV; with the verdicts and where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import store
from experiments.claims import Verdict
from experiments.spec import Column, Table

LEGEND = "n/N seeds where some are missing, div. diverged, - not run"
MARKS = "beside the paper's number the gap, = within its ± (or 2 std of ours), ≠ outside"


def show(
    table: Table,
    wanted: pd.DataFrame,
    found: dict[str, store.Run],
    cells: pd.DataFrame,
    verdicts: list[Verdict],
    out: Path,
    facts: Sequence[str] = (),
) -> str:
    """The table as Markdown, which is also what the console shows. Writes `out`.md, .tex and .csv, each whole or not at all.

    facts: what is to be said besides about where the numbers come from.
    """
    grid = wide(table, cells)
    facts = [*reading(table, wanted), *provenance(wanted, found), *facts]
    lines = [f"## {table.title}", "", grid.to_markdown(index=False, disable_numparse=True), ""]
    if verdicts:
        lines += ["Claims:", "", *(f"- **{each.verdict}**: {each.says} ({each.why})" for each in verdicts), ""]
    lines += [*(f"- {note}" for note in [*facts, *table.notes]), ""]
    text = "\n".join(lines)

    out.parent.mkdir(parents=True, exist_ok=True)
    tex = grid.style.hide(axis="index").format(lambda text: _latex(str(text)))
    tex = tex.format_index(lambda text: _latex(str(text)), axis="columns").to_latex(hrules=True, caption=_latex(table.title))
    tex += "".join(f"% {line}\n" for line in [*(f"{each.verdict}: {each.says}" for each in verdicts), *facts])
    idle = {"quoted": cells["quoted"].isna(), "doubted": ~cells["doubted"]}
    cells = cells.drop(columns=[key for key, none in idle.items() if none.all()])
    csv = cells.assign(**{f"of_{key}": text for key, text in columns(wanted, found).items()}).to_csv(index=False)
    for ending, content in ((".md", text), (".tex", tex), (".csv", csv)):
        with store.written(out.with_name(out.name + ending)) as file:
            file.write(content.encode())
    return f"{text}{out}.md .tex .csv"


def wide(table: Table, cells: pd.DataFrame) -> pd.DataFrame:
    """One line per row, or choice of a row without a pick; one column per metric, beside it the paper's and what that quotes, if any."""
    lines = []
    for (row, _), group in cells.groupby(["row", cells["choice"].where(cells["picked"] == "", "")], sort=False):
        line = {"": f"{row} {_choice(table, group)}".strip()}
        for cell in group.to_dict("records"):
            column = table.columns[cell["column"]]
            digits = column.digits
            mine = cells[cells["column"] == cell["column"]]
            papers, quotes = mine["paper"].dropna(), mine["quoted"].dropna()
            line[cell["column"]] = _ours(cell, digits)
            if len(papers):
                line[f"{cell['column']} paper"] = _paper(cell, column, _decimals(papers), _decimals(mine["paper_std"].dropna()))
            if len(quotes):
                line[f"{cell['column']} quoted"] = "" if math.isnan(cell["quoted"]) else f"{cell['quoted']:.{_decimals(quotes)}f}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _choice(table: Table, cells: pd.DataFrame) -> str:
    """Of a line's cells: its choice, or what was picked: once if that is the same everywhere, else for each set of columns."""
    first = cells.iloc[0]
    if not first["picked"]:
        return _named(table, first["row"], first["choice"]) if first["choice"] else ""
    text = first["choice"]
    if cells["choice"].nunique() > 1:
        pairs = zip(cells["choice"], cells["column"], strict=True)  # columns with the same overrides hold the same runs
        sets = _groups(((choice, *table.columns[name].overrides), name) for choice, name in pairs)
        text = ", ".join(f"{choice} {_shared(names)}" for (choice, *_), names in sets)
    paper = f", paper {first['paper_choice']}" if first["paper_choice"] != "" else ""
    return f"(λ={text}{paper})"


def _named(table: Table, label: str, choice: str) -> str:
    """What is chosen, and its value: λ for a method's weight, else the last part of the grid's key. Several keys name themselves."""
    keys = next([*row.grid] for row in table.rows if row.label == label)
    name = keys[0].rpartition(".")[2]
    return choice if len(keys) > 1 else f"{'λ' if name == 'weight' else name}={choice}"


def _shared(names: list[str]) -> str:
    """The words that all names have; else all names."""
    return " ".join(word for word in names[0].split() if all(word in name.split() for name in names)) or " / ".join(names)


def _ours(cell: dict[str, Any], digits: int) -> str:
    state = {"failed": "failed", "diverged": "div."}.get(cell["state"], "")
    if not cell["n"]:
        return state or "-"
    spread = f" ± {cell['std']:.{digits}f}" if cell["n"] > 1 else ""
    partial = f" ({cell['n']}/{cell['wanted']})" if cell["n"] < cell["wanted"] else ""
    return f"{cell['ours']:.{digits}f}{spread}{partial} {state}".rstrip()


def _decimals(papers: pd.Series) -> int:
    """As many decimals as the paper prints in this column."""
    return max((len(f"{number:g}".partition(".")[2]) for number in papers), default=0)


def _paper(cell: dict[str, Any], column: Column, decimals: int, of_spread: int) -> str:
    if math.isnan(cell["paper"]):
        return ""
    spread = "" if math.isnan(cell["paper_std"]) else f" ± {cell['paper_std']:.{of_spread}f}"
    text = f"{cell['paper']:.{decimals}f}{spread}{' div.' if column.idle(cell['paper']) else ''}{' ?' * cell['doubted']}"
    if not cell["n"]:
        return text
    room = cell["paper_std"] if spread else 2 * cell["std"]
    mark = "" if math.isnan(room) or cell["doubted"] else (" =" if abs(cell["gap"]) <= room else " ≠")
    return f"{text} ({cell['gap']:+.{column.digits}f}){mark}"


def reading(table: Table, wanted: pd.DataFrame) -> list[str]:
    """How a cell is to be read, in words."""
    seeds = ", ".join(str(seed) for seed in sorted(wanted["seed"].unique()))
    spread = f"{table.over} ± std over the seeds {seeds}" if wanted["seed"].nunique() > 1 else f"seed {seeds}"
    lines = [f"each number: {_at(table.at)}; {spread}; {LEGEND}"] + ([MARKS] if any(row.paper for row in table.rows) else [])
    if any(row.doubted for row in table.rows):
        lines.append("?: a printed number that is not to be trusted, for the reason below; it has neither = nor ≠")
    if any(row.quoted for row in table.rows):
        lines.append("quoted: a number that the paper cites from other work")
    for at, names in _groups((column.at, name) for name, column in table.columns.items() if column.at not in (None, table.at)):
        lines.append(f"{', '.join(names)}: instead, {_at(str(at))}")
    for chance, names in _groups((column.chance, name) for name, column in table.columns.items() if column.chance is not None):
        lines.append(f"{', '.join(names)}: div. at {chance:g} or worse, which is chance; a run whose loss left the numbers counts as that")
    picks = [(row, str(row.pick).partition(" ")[-1]) for row in table.rows if row.pick is not None]
    ways = _groups(((metric if row.select or not metric.startswith("test/") else "", *row.select), row.label) for row, metric in picks)
    for (metric, *select), names in ways:
        of = f" of {', '.join(names)}" if len(ways) > 1 else ""
        if not metric:
            lines.append(f"λ{of} is picked on the test set, as the paper did: {'these' if of else 'the picked'} numbers are optimistic")
            continue
        how = f" of runs with {' '.join(select)}, then trained without {'them' if len(select) > 1 else 'it'}" if select else ""
        test = ": on the test set, so these numbers are optimistic" if metric.startswith("test/") else ""
        lines.append(f"λ{of} is picked by {metric}{how}{test}")
    return lines


def _at(at: str) -> str:
    known = {"last": "the last evaluation", "last10": "the mean of a run's last ten evaluations"}
    known["median10"] = "the median of a run's last ten evaluations"
    optimistic = ", chosen on the test set and so optimistic" if at.partition(" ")[-1].startswith("test/") else ""
    return known.get(at, f"the evaluation with {at}{optimistic}")


def _groups(pairs: Iterable[tuple[Any, str]]) -> list[tuple[Any, list[str]]]:
    """The names that share a key, in the order of the keys."""
    found: dict[Any, list[str]] = {}
    for key, name in pairs:
        found.setdefault(key, []).append(name)
    return list(found.items())


def provenance(wanted: pd.DataFrame, found: dict[str, store.Run]) -> list[str]:
    """Where the numbers come from, in words."""
    results = _results(wanted, found)
    if not results:
        return [f"no run of {wanted['id'].nunique()} is done"]
    done = f"{len(results)} of {wanted['id'].nunique()} runs"

    def wished(key: str) -> str:
        return ", ".join(sorted(wanted[key].unique()))

    def each(key: str) -> str:
        return ", ".join(sorted({str(result.get(key)) for result in results}))

    commits = _commits(results)
    mixed = " (MIXED: the cells do not come from one state of the code)" if len(commits) > 1 else ""
    asked = wished("asked")
    return [
        *([f"asked for besides: {asked}"] if asked else []),
        f"profile {wished('profile')}; epochs {each('epochs')}; data: {each('data')}; precision {wished('precision')}; {done}",
        f"commit {', '.join(commits)}{mixed}; {each('device')}, {each('threads')} threads; torch {each('torch')}; "
        f"{sum(result['seconds'] for result in results) / 60:.1f} minutes of training",
    ]


def choosing(trials: pd.DataFrame, spare: pd.DataFrame, found: dict[str, store.Run]) -> list[str]:
    """In words: how many runs only choose (`trials`), and which of those that are not shown (`spare`) diverged."""
    lines = []
    if len(trials):
        results = _results(trials, found)
        minutes = f"; commit {', '.join(_commits(results))}; {sum(result['seconds'] for result in results) / 60:.1f} minutes of training"
        lines.append(f"to choose λ: {len(results)} of {trials['id'].nunique()} runs{minutes if results else ''}")
    bad = [identity in found and found[identity].state == "diverged" for identity in spare["id"]]
    once = spare[bad].drop_duplicates("id")
    cells = _groups(((one.row, one.choice, one.column), str(one.seed)) for one in once.itertuples())
    names = [f"{row} λ={choice} seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} ({column})" for (row, choice, column), seeds in cells]
    return lines + ([f"diverged while choosing: {'; '.join(names)}"] if names else [])


def _results(wanted: pd.DataFrame, found: dict[str, store.Run]) -> list[dict[str, Any]]:
    results = (found[identity].result() for identity in dict.fromkeys(wanted["id"]) if identity in found)
    return [result for result in results if result is not None]


def _commits(results: list[dict[str, Any]]) -> list[str]:
    return sorted({f"{result['commit']}{' with changes' if result['dirty'] else ''}" for result in results})


def columns(wanted: pd.DataFrame, found: dict[str, store.Run]) -> dict[str, str]:
    """Provenance as columns of a CSV, so that no line of it can be read without."""
    results = _results(wanted, found)
    keys = ("epochs", "data", "commit", "dirty", "device", "threads", "torch")
    facts = {key: "; ".join(sorted({str(result.get(key)) for result in results})) for key in keys}
    return facts | {key: "; ".join(sorted(map(str, wanted[key].unique()))) for key in ("profile", "precision", "asked", "seed")}


def _latex(text: str) -> str:
    for plain, command in (("±", r"$\pm$"), ("λ", r"$\lambda$"), ("≠", r"$\neq$"), ("%", r"\%"), ("_", r"\_"), ("&", r"\&"), ("#", r"\#")):
        text = text.replace(plain, command)
    return text
