"""How long a run is, and when it is evaluated: in steps, from what its config prints and its profile makes of that."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig


class Length:
    """Of a run whose data makes `full` steps an epoch.

    steps_per_epoch: those that the profile allows. printed: steps of the whole run as its config prints it; steps: those that are
    made, in so many `epochs`, of which the last can be a part of one when `iterations` are given.
    """

    def __init__(self, cfg: DictConfig, full: int) -> None:
        self.full = full
        self.steps_per_epoch = min(self.full, cfg.profile.steps or self.full)
        if cfg.iterations is None:
            self.printed = cfg.epochs * self.full
            self.epochs = max(1, round(cfg.epochs * cfg.profile.epochs))
            self.steps = self.epochs * self.steps_per_epoch
        else:
            self.printed = cfg.iterations
            wanted = round(cfg.iterations * cfg.profile.epochs)
            self.steps = wanted * self.steps_per_epoch // self.full if wanted > 0 else self.steps_per_epoch
            self.steps = max(1, self.steps)
            self.epochs = -(-self.steps // self.steps_per_epoch)

    def shown(self, step: int) -> float:
        """Which step of the printed protocol this one stands for."""
        return step * self.printed / self.steps

    def evaluations(self, every: int | None, dense: int) -> Sequence[int]:
        """The steps after which the test set is read: each epoch's end, and the last `dense` of the points `every` steps apart.

        A paper that evaluates every 50 steps and averages its last ten evaluations gets just those ten; the earlier ones, which no
        table reads, would cost more than the training of a small network.
        """
        starts = range(0, self.steps, self.steps_per_epoch)
        ends = {min(start + self.steps_per_epoch, self.steps) for start in starts}
        if every is None:
            return sorted(ends)
        between = {start + step for start in starts for step in range(every, self.steps_per_epoch, every) if start + step < self.steps}
        return sorted(ends | set(sorted(ends | between)[-dense:] if dense else ()))
