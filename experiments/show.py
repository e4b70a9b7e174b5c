"""A filled table as text: console and Markdown, LaTeX, CSV; with the verdicts and where the numbers come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import store
from experiments.claims import Verdict
from experiments.spec import Table

LEGEND = "n/N seeds where some are missing, div. diverged, - not run"
MARKS = "beside the paper's number the gap, = within its ± (or 2 std of ours), ≠ outside"


def show(table: Table, wanted: pd.DataFrame, found: dict[str, store.Run], cells: pd.DataFrame, verdicts: list[Verdict], out: Path) -> str:
    """The table as Markdown, which is also what the console shows. Writes `out`.md, .tex and .csv, each whole or not at all."""
    grid = wide(table, cells)
    facts = [*reading(table, wanted), *provenance(wanted, found)]
    lines = [f"## {table.title}", "", grid.to_markdown(index=False, disable_numparse=True), ""]
    if verdicts:
        lines += ["Claims:", "", *(f"- **{each.verdict}**: {each.says} ({each.why})" for each in verdicts), ""]
    lines += [*(f"- {note}" for note in [*facts, *table.notes]), ""]
    text = "\n".join(lines)

    out.parent.mkdir(parents=True, exist_ok=True)
    tex = grid.style.hide(axis="index").format(lambda text: _latex(str(text)))
    tex = tex.format_index(lambda text: _latex(str(text)), axis="columns").to_latex(hrules=True, caption=_latex(table.title))
    tex += "".join(f"% {line}\n" for line in [*(f"{each.verdict}: {each.says}" for each in verdicts), *facts])
    csv = cells.assign(**{f"of_{key}": text for key, text in columns(wanted, found).items()}).to_csv(index=False)
    for ending, content in ((".md", text), (".tex", tex), (".csv", csv)):
        with store.written(out.with_name(out.name + ending)) as file:
            file.write(content.encode())
    return f"{text}{out}.md .tex .csv"


def wide(table: Table, cells: pd.DataFrame) -> pd.DataFrame:
    """One line per row and shown choice, one column per metric, and beside it the paper's, where it has any."""
    lines = []
    for (row, _), group in cells.groupby(["row", "choice"], sort=False):
        line = {"": f"{row} {_choice(group.iloc[0])}".strip()}
        for cell in group.to_dict("records"):
            digits = table.columns[cell["column"]].digits
            papers = cells[cells["column"] == cell["column"]]["paper"].dropna()
            line[cell["column"]] = _ours(cell, digits)
            if len(papers):
                line[f"{cell['column']} paper"] = _paper(cell, digits, _decimals(papers))
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _choice(cell: Any) -> str:
    if not cell["picked"]:
        return f"λ={cell['choice']}" if cell["choice"] else ""
    paper = f", paper {cell['paper_choice']}" if cell["paper_choice"] != "" else ""
    return f"(λ={cell['choice']}{paper})"


def _ours(cell: dict[str, Any], digits: int) -> str:
    if not cell["n"]:
        return {"failed": "failed", "diverged": "div."}.get(cell["state"], "-")
    spread = f" ± {cell['std']:.{digits}f}" if cell["n"] > 1 else ""
    partial = f" ({cell['n']}/{cell['wanted']})" if cell["n"] < cell["wanted"] else ""
    bad = {"failed": " failed", "diverged": " div."}.get(cell["state"], "") if partial else ""
    return f"{cell['ours']:.{digits}f}{spread}{partial}{bad}"


def _decimals(papers: pd.Series) -> int:
    """As many decimals as the paper prints in this column."""
    return max(len(f"{number:g}".partition(".")[2]) for number in papers)


def _paper(cell: dict[str, Any], digits: int, decimals: int) -> str:
    if math.isnan(cell["paper"]):
        return ""
    spread = "" if math.isnan(cell["paper_std"]) else f" ± {cell['paper_std']:g}"
    text = f"{cell['paper']:.{decimals}f}{spread}"
    if not cell["n"]:
        return text
    room = cell["paper_std"] if spread else 2 * cell["std"]
    mark = "" if math.isnan(room) else (" =" if abs(cell["gap"]) <= room else " ≠")
    return f"{text} ({cell['gap']:+.{digits}f}){mark}"


def reading(table: Table, wanted: pd.DataFrame) -> list[str]:
    """How a cell is to be read, in words."""
    known = {"last": "the last evaluation", "last10": "the mean of a run's last ten evaluations"}
    how = known.get(table.at, f"the evaluation with {table.at}")
    seeds = ", ".join(str(seed) for seed in sorted(wanted["seed"].unique()))
    spread = f"{table.over} ± std over the seeds {seeds}" if wanted["seed"].nunique() > 1 else f"seed {seeds}"
    lines = [f"each number: {how}; {spread}; {LEGEND}"] + ([MARKS] if any(row.paper for row in table.rows) else [])
    if any((row.pick or "").split(" ")[-1].startswith("test/") for row in table.rows):
        lines.append("λ is picked on the test set, as the paper did: the picked numbers are optimistic")
    return lines


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

    commits = sorted({f"{result['commit']}{' with changes' if result['dirty'] else ''}" for result in results})
    mixed = " (MIXED: the cells do not come from one state of the code)" if len(commits) > 1 else ""
    asked = wished("asked")
    return [
        *([f"asked for besides: {asked}"] if asked else []),
        f"profile {wished('profile')}; epochs {each('epochs')}; data: {each('data')}; precision {wished('precision')}; {done}",
        f"commit {', '.join(commits)}{mixed}; {each('device')}, {each('threads')} threads; torch {each('torch')}; "
        f"{sum(result['seconds'] for result in results) / 60:.1f} minutes of training",
    ]


def _results(wanted: pd.DataFrame, found: dict[str, store.Run]) -> list[dict[str, Any]]:
    results = (found[identity].result() for identity in dict.fromkeys(wanted["id"]) if identity in found)
    return [result for result in results if result is not None]


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
