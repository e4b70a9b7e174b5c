"""What TensorBoard shows of a run, besides its scalars: the HParams tab and the config as text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from experiments.identity import target_name


class _Writer(event_file_writer._AsyncWriterThread):
    """What the disk says is raised by the next call (its `exception`), not printed as well."""

    def run(self) -> None:
        with contextlib.suppress(OSError):
            super().run()


event_file_writer._AsyncWriterThread = _Writer


def open_board(path: Path, cfg: DictConfig, rows: Iterable[dict[str, float]]) -> SummaryWriter:
    """A writer of events in the run's folder, where they begin with the evaluations so far: old files may be torn, or of a wrong clock."""
    for old in path.glob("events.*"):
        old.unlink()
    board = SummaryWriter(str(path))
    # The session's start and end only: the schema that add_hparams writes besides makes TensorBoard show one run's columns for all.
    _, start, end = hparams(settings(cfg), {})
    for summary in (start, end):
        board.file_writer.add_summary(summary)  # type: ignore[attr-defined]
    board.add_text("config", "    " + OmegaConf.to_yaml(cfg).replace("\n", "\n    "))
    for row in rows:
        add(board, row)
    return board


def add(board: SummaryWriter, row: dict[str, float]) -> None:
    """An evaluation: curves, and of the counts `histogram/<name>/<bin>`, whose bins are as wide and fill 0 .. 1, a histogram."""
    counts: dict[str, list[float]] = {}
    for key, value in row.items():
        if key.startswith("histogram/"):
            counts.setdefault(key.rpartition("/")[0], []).append(value)
        elif key not in ("step", "epoch"):  # the axis
            board.add_scalar(key, value, int(row["step"]))
    for name, values in counts.items():
        middles = [(place + 0.5) / len(values) for place in range(len(values))]
        num, total, squares = (sum(value * x**power for value, x in zip(values, middles, strict=True)) for power in (0, 1, 2))
        limits = [(place + 1) / len(values) for place in range(len(values))]
        board.add_histogram_raw(name, 0.0, 1.0, num, total, squares, limits, values, int(row["step"]))


def settings(cfg: DictConfig) -> dict[str, bool | int | float | str]:
    """The config's choices and numbers, flat, as the HParams tab takes them: lists are left out."""
    targets = {group: target_name(cfg[group]._target_) for group in ("dataset", "model", "norm")}
    nodes = {"model": cfg.model, "optim": cfg.optim} | {f"method.{name}": node for name, node in cfg.method.items()}
    pairs = {f"{path}.{key}": value for path, node in nodes.items() for key, value in node.items() if not str(key).startswith("_")}
    numbers = {key: value for key, value in pairs.items() if isinstance(value, bool | int | float)}
    plain = {key: cfg[key] for key in ("seed", "epochs", "batch_size", "precision", "balanced")}
    return {**targets, "method": "+".join(cfg.method) or "vanilla", **numbers, **plain, "profile": cfg.profile.name}
