"""Training loss and test accuracy over a long training, and the loss above what its soft targets allow (LaMix, figure 5)."""

from __future__ import annotations

import pandas as pd

from experiments.figure import Drawing, Runs, canvas, label

LOSS, FLOOR, ACCURACY = "train/ce", "train/target_entropy", "test/accuracy"


def draw(runs: Runs) -> Drawing:
    """Of each run: accuracy, thick, and the loss that is trained on, thin, as the paper; beside it that loss minus its target's entropy.

    No cross-entropy can fall below its target's entropy, so losses of methods with different targets do not compare; what is above it,
    the divergence between target and prediction, does.
    """
    picture, axes = canvas(1, 2, height=3.2)
    left, right = axes[0]
    loss = left.twinx()
    parts, texts, ends = [], [], {}
    for place, job in enumerate(runs.wanted.drop_duplicates("id").itertuples()):
        if job.id not in runs.done:
            continue
        rows = pd.DataFrame(runs.done[job.id].metrics()).dropna(subset=[LOSS, ACCURACY])
        rows = rows.assign(floor=rows.get(FLOOR, 0.0))
        rows["divergence"] = rows[LOSS] - rows["floor"]
        name = label(job.row, job.choice) + (f", seed {job.seed}" if runs.wanted["seed"].nunique() > 1 else "")
        mark = "o" if len(rows) == 1 else None
        left.plot(rows["epoch"], rows[ACCURACY], color=f"C{place}", linewidth=1.8, marker=mark, label=name)
        loss.plot(rows["epoch"], rows[LOSS], color=f"C{place}", linewidth=0.7, marker=mark)
        right.plot(rows["epoch"], rows["divergence"].clip(lower=1e-4), color=f"C{place}", linewidth=1, marker=mark)
        known = {"row": job.row, "choice": job.choice, "seed": job.seed}
        parts.append(rows.melt(["epoch"], [LOSS, ACCURACY], "metric").assign(source="run", **known))
        parts.append(rows.melt(["epoch"], ["floor", "divergence"], "metric").assign(source="computed here", **known))
        few = max(1, len(rows) // 20)
        level = rows[ACCURACY].rolling(few).mean()
        ends[name] = last = rows.tail(few)[[LOSS, "floor", "divergence", ACCURACY]].mean()
        texts.append(
            f"{name}, last twentieth of the epochs: training loss {last[LOSS]:.4f}, of it the target's entropy {last['floor']:.4f}; "
            f"accuracy {last[ACCURACY]:.2f} %, {level.max() - last[ACCURACY]:.2f} below its best twentieth"
        )
    left.set(xlabel="epoch", ylabel="test accuracy [%], thick")
    loss.set_ylabel("training loss [nats], thin")
    loss.grid(False)
    right.set(xlabel="epoch", ylabel="loss minus target entropy [nats]", yscale="log")
    picture.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    mine = [name for name in ends if "LaMix" in name.replace(",", " ").split()]
    others = [name for name in ends if name not in mine]
    if mine and others:
        higher = min(ends[name][LOSS] for name in mine) > max(ends[name][LOSS] for name in others)
        texts.append(f"LaMix's training loss stays higher (paper): {'seen' if higher else 'not seen'}; its targets' entropy is higher too")
    return Drawing(picture, pd.concat(parts, ignore_index=True), texts)
