"""t-SNE maps of the last hidden layer on test samples, and the silhouette score of the features themselves (ITDM, figures 2 and 6)."""

from __future__ import annotations

from textwrap import fill

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import store
from experiments.figure import Drawing, Runs, canvas, label
from experiments.figures.trained import trained
from experiments.pick import chosen
from experiments.spec import Row


def draw(runs: Runs, limit: int = 2000, perplexity: float = 30) -> Drawing:
    """One panel for each row and data set: the first seed's map of at most `limit` test samples, coloured by class.

    With one data set, two rows stand side by side, and of a row with a pick what is picked.

    The paper reads "clearer margins" off such maps. The silhouette score is that as a number: computed on the features, before any
    map, by class, for every seed; -1 to 1, higher is better apart. Perplexity and the rest are ours, the paper gives none (A.3).
    """
    panels = runs.panels()
    cells = [(row, choice, panel, jobs) for row in runs.table.rows for panel, jobs in panels.items() for choice in shown(row, jobs, runs)]
    across = len(panels) if len(panels) > 1 else min(2, len(cells))
    picture, axes = canvas(-(-len(cells) // across), across, width=max(3.4, 2.5 * across), height=2.6)
    flat = [axis for line in axes for axis in line]
    for axis in flat[len(cells) :]:
        axis.set_axis_off()
    parts, texts = [], []
    for axis, (row, choice, panel, jobs) in zip(flat, cells, strict=False):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        known = {"panel": panel, "row": row.label, "choice": choice}
        name = f"{panel + ', ' if panel else ''}{label(row.label, choice)}"
        mine = jobs[(jobs["row"] == row.label) & (jobs["choice"] == choice) & jobs["id"].isin(list(runs.done))]
        scores: list[float] = []
        for job in mine.itertuples():
            h, y = features(runs.done[job.id], runs.runtime, limit)
            scores.append(silhouette(h, y))
            parts.append(pd.DataFrame([known | {"seed": job.seed, "kind": "silhouette", "value": scores[-1]}]))
            if len(scores) == 1:
                at = embed(h, perplexity)
                dots = axis.scatter(at[:, 0], at[:, 1], c=y, cmap="tab10" if y.max() < 10 else "tab20", s=2, linewidths=0)
                parts.append(pd.DataFrame({"x": at[:, 0], "y": at[:, 1], "label": y}).assign(kind="point", seed=job.seed, **known))
        number = "not run" if mine.empty else f"{np.mean(scores):.3f}" + (f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else "")
        axis.set_title(f"{name}\nsilhouette {number}")
        texts.append(f"{name}: silhouette of the features {number}" + (f" over {len(scores)} seeds" if len(scores) > 1 else ""))
    numbers = pd.concat(parts, ignore_index=True)
    about = f"t-SNE coordinates (no unit) of at most {limit} test samples; class:"
    handles, names = dots.legend_elements(num=np.unique(y).tolist())
    fit = int(picture.get_figwidth() / 0.6)
    picture.legend(handles, names, title=fill(about, 9 * fit), loc="outside lower center", ncols=fit, title_fontsize=7, columnspacing=1)
    return Drawing(picture, numbers, texts)


def shown(row: Row, jobs: pd.DataFrame, runs: Runs) -> list[str]:
    """The row's choices that get a map: the one that is picked, if one is to be; "?" while runs are missing for that."""
    mine = jobs[jobs["row"] == row.label]
    if row.pick is None:
        return list(dict.fromkeys(mine["choice"]))
    return [chosen(row, mine, runs.done, runs.table.at)]


def features(run: store.Run, runtime: DictConfig, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """A finished run's last hidden layer h [n, d] in evaluation mode, and the classes [n], of at most `limit` test samples.

    The same number of each class where there are as many; which ones, no run decides.
    """
    import torch

    from data.bundle import Batch

    trainer = trained(run, runtime)
    x, y = trainer.bundle.splits["test"]
    chosen = torch.from_numpy(balanced(y.cpu().numpy(), limit)).to(y.device)
    with torch.inference_mode():
        batches = (Batch(trainer.bundle.prepare(x[some]), y[some], y[some]) for some in chosen.split(trainer.cfg.evaluate.batch_size))
        parts = [trainer.forward(batch).features for batch in batches]
    return torch.cat(parts).float().flatten(1).cpu().numpy(), y[chosen].cpu().numpy()


def balanced(y: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most limit // K samples of each of the K classes, drawn with a seed of its own."""
    shuffled = np.random.default_rng(0).permutation(len(y))
    classes = np.unique(y)
    return np.sort(np.concatenate([shuffled[y[shuffled] == one][: max(1, limit // len(classes))] for one in classes]))


def collapsed(h: np.ndarray) -> bool:
    """Whether all samples have the same features [n, d], up to rounding."""
    return bool(np.ptp(h, axis=0).max() <= 1e-5 * np.abs(h).max())


def silhouette(h: np.ndarray, y: np.ndarray) -> float:
    """Mean over the samples of (b - a) / max(a, b): a, b the mean distances to the own and to the nearest other class (Rousseeuw 1987).

    0 for a collapsed net, as for equal points: what is left of its distances is rounding.
    """
    from sklearn.metrics import silhouette_score

    return 0.0 if collapsed(h) else float(silhouette_score(h, y))


def embed(h: np.ndarray, perplexity: float) -> np.ndarray:
    """The map [n, 2]; of a collapsed net one point, since t-SNE's start divides by the spread and then crashes."""
    from sklearn.manifold import TSNE

    if collapsed(h):
        return np.zeros((len(h), 2))
    return TSNE(2, perplexity=min(perplexity, (len(h) - 1) / 3), init="pca", random_state=0).fit_transform(h)
