"""Accuracy against an option that is no weight: LaMix's beta, the smoothing of labels (LaMix, figures 4 and 6)."""

from __future__ import annotations

import pandas as pd

from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas
from experiments.table import fill


def draw(runs: Runs, option: str, plateau: tuple[float, float] | None = None) -> Drawing:
    """Bars of the one row with a grid, whiskers of 1 s.d. over the seeds, and a line for each other row.

    option: what the grid's values are called. plateau: between these the paper calls the results similar.
    """
    [swept, *more] = [row for row in runs.table.rows if row.grid]
    if more:
        raise ConfigError(f"figure.runs.rows: {more[0].label!r} has a grid too, and this figure has room for one")
    cells = fill(runs.table, runs.wanted, runs.done)
    panels = runs.panels()
    picture, axes = canvas(1, len(panels), width=max(4.4, 3.7 * len(panels)), height=2.9)
    texts = []
    for axis, (panel, jobs) in zip(axes[0], panels.items(), strict=True):
        column = runs.table.columns[runs.same(jobs)[0]]
        mine = cells[cells["column"] == runs.same(jobs)[0]]
        bars, lines = mine[(mine["row"] == swept.label) & (mine["n"] > 0)], mine[(mine["row"] != swept.label) & (mine["n"] > 0)]
        places = range(len(bars))
        axis.bar(places, bars["ours"], 0.7, yerr=bars["std"].fillna(0), capsize=3, color="C0", label=f"ours, {swept.label}")
        known = bars["paper"].notna().to_numpy()
        if known.any():
            axis.plot(
                [place for place in places if known[place]], bars["paper"][known], "s", color="C3", markerfacecolor="none", label="paper"
            )
        for place, one in enumerate(lines.itertuples(), 1):
            axis.axhline(one.ours, color=f"C{place}", linewidth=1, linestyle="--", label=f"ours, {one.row}")
        whiskers = [bars["ours"] + sign * bars["std"].fillna(0) for sign in (-1, 1)]
        room = [*whiskers[0], *whiskers[1], *lines["ours"], *bars["paper"].dropna()]
        margin = 0.15 * (max(room) - min(room)) or 1  # a bar from 0 on would hide all differences
        axis.set(xticks=list(places), xlabel=option, ylabel=column.metric.replace("test/", "test ") + " [%]")
        axis.set_xticklabels([str(choice) for choice in bars["choice"]])
        axis.set_ylim(min(room) - margin, max(room) + margin)
        axis.set_title(panel if len(panels) > 1 else "")
        texts += said(bars, lines, option, panel if len(panels) > 1 else "", column.better == "max", plateau)
    picture.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    numbers = cells[cells["n"] > 0].rename(columns={"ours": "value"})
    numbers = numbers[["column", "row", "choice", "metric", "value", "std", "n", "paper"]].assign(source="computed here")
    bars_are = (
        f"bars: mean over {runs.wanted['seed'].nunique()} seeds, whiskers 1 s.d." if runs.wanted["seed"].nunique() > 1 else "one seed"
    )
    return Drawing(picture, numbers, [*texts, f"{bars_are}; the axis does not start at 0"])


def said(bars: pd.DataFrame, lines: pd.DataFrame, option: str, panel: str, high: bool, plateau: tuple[float, float] | None) -> list[str]:
    """Every bar's number, which is the best, how that stands to the other rows, and how far a plateau differs within itself."""
    where = f"{panel}: " if panel else ""
    number = [f"{one.choice}: {one.ours:.2f}{'' if one.std != one.std else f' ± {one.std:.2f}'}" for one in bars.itertuples()]
    best = bars.loc[bars["ours"].idxmax() if high else bars["ours"].idxmin()]
    papers = bars.dropna(subset="paper")
    paper = f" (paper: {', '.join(f'{one.choice}, {one.paper:g}' for one in papers.itertuples())})" if len(papers) else ""
    texts = [f"{where}{option} = {', '.join(number)}", f"{where}best at {option} = {best['choice']}{paper}"]
    for one in lines.itertuples():
        gap = best["ours"] - one.ours
        texts.append(f"{where}{one.row} {one.ours:.2f}: the best {option} is {abs(gap):.2f} {'better' if (gap > 0) == high else 'worse'}")
    if plateau is not None:
        inside = bars[bars["choice"].astype(float).between(*plateau)]["ours"]
        if len(inside) > 1:
            apart, whole = inside.max() - inside.min(), bars["ours"].max() - bars["ours"].min()
            text = f"from {plateau[0]:g} to {plateau[1]:g} they differ by {apart:.2f}, in all by {whole:.2f} (paper: similar there)"
            texts.append(where + text)
    return texts
