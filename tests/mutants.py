"""Mutation check: small faults are put into the product, and the quick tests must catch them.

    python -m tests.mutants                  all mutants
    python -m tests.mutants claims mmd.py    those whose part, file or name contains a word
    python -m tests.mutants workers=4        at a time; default 2

A mutant replaces a text that occurs once in a file. It is caught if a test that covers the file fails or hangs. The tests are the quick
ones, not marked slow. They run in copies of the working tree, with its uncommitted changes; first without a mutant, where all must pass.
Exit code 1: fewer than 55 of the 60 mutants are caught (of a selection: the same fraction), or the check cannot be run.
A mutant compiles, runs and is wrong. Who changes a line of the product that a mutant names changes the mutant too.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import copy2

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {"regularizers": 20, "claims": 12, "selection": 10, "store": 9, "config": 9}
LEAST = 55  # of 60 must be caught
WORKER = threading.local()  # its `folder`: a worker's copy of the working tree
OPTIONS = ["-x", "--tb=no", "-rfE", "-m", "not slow", "-p", "no:xdist", "-p", "no:cacheprovider"]

# parts; their files, each with the test files that cover it (without test_ and .py); name, old text and new text of each mutant
FAULTS = r"""
regularizers
  regularizers/mmd.py: mmd
    gradient through the bandwidth:  _median(distance.detach(), in_x  ->  _median(distance, in_x
    bandwidth 0 is kept:  return torch.where(upper > 0, upper, positive)  ->  return upper
  regularizers/itdm.py: mmd regularizers
    sum over classes:  self.bandwidth, bound).mean()  ->  self.bandwidth, bound).sum()
    labels of the first batch twice:  out.batch.y, other.batch.y, classes  ->  out.batch.y, out.batch.y, classes
  regularizers/activation.py: per regularizers
    mean over images, not positions:  (len(samples) if self.batch_reduction == "mean"  ->  (len(h) if self.batch_reduction == "mean"
    L2 without the factor 2:  h.new_full((), 2.0)  ->  h.new_full((), 1.0)
  regularizers/per.py: per projection
    d for d + 2:  (1 + square / (d + 2)).rsqrt()  ->  (1 + square / d).rsqrt()
    gradient of the length left out:  torch.erf(p / math.sqrt(2)) / length  ->  torch.erf(p / math.sqrt(2))
  regularizers/projection.py: projection per
    windows without signs:  windows[start : start + most] * signs  ->  windows[start : start + most]
  regularizers/vcl.py: per
    biased variance:  .square().sum(0) / (len(x) - 1)  ->  .square().sum(0) / len(x)
  regularizers/mixing.py: mixing
    gamma in float32:  torch._standard_gamma(alpha.expand(2)  ->  torch._standard_gamma(alpha.float().expand(2)
  regularizers/cutmix.py: mixing
    target by lambda, not by area:  batch.target, kept.to(batch.target.dtype)  ->  batch.target, lam.to(batch.target.dtype)
  regularizers/label_smoothing.py: regularizers
    spread over K - 1 classes:  self.weight / classes  ->  self.weight / (classes - 1)
  regularizers/lamix.py: lamix
    global label always detached:  p.detach() if self.detach_global else p  ->  p.detach()
    pairs on even steps:  step % 2 == 1  ->  step % 2 == 0
  regularizers/lamix_puzzle.py: lamix_training
    prior of lambda, not 0.5:  torch.full_like(lam, 0.5)  ->  lam
  regularizers/puzzle_mask.py: puzzle_mask
    borders swapped:  whole.narrow(axis, 0, n - 1).add_(ab + aa)  ->  whole.narrow(axis, 0, n - 1).add_(ba + aa)
  regularizers/puzzle_transport.py: puzzle_transport
    half-shown cells count as hidden:  (mask.flatten(1) > 0)  ->  (mask.flatten(1) > 0.5)
  regularizers/puzzlemix.py: puzzlemix
    L1 norm over channels:  gradient.float().square().mean(1).sqrt()  ->  gradient.float().abs().mean(1)
  regularizers/base.py: bf16
    biased stochastic rounding:  of_sample ^ of_unit  ->  of_sample & of_unit
claims
  experiments/claims.py: claims best
    margin with the wrong sign:  _t_test(paired + _margin(claim))  ->  _t_test(paired - _margin(claim))
    two-sided test:  ttest_1samp(gain, 0, alternative="greater")  ->  ttest_1samp(gain, 0)
    equality counts as a gain:  holds = 0.0 if gain.mean() > 0 else 1.0  ->  holds = 0.0 if gain.mean() >= 0 else 1.0
    refuted by any rival without Bonferroni:  len(each) * min(test.fails  ->  min(test.fails
    holds against any rival:  max(test.holds for test in each), fails  ->  min(test.holds for test in each), fails
    each cell at the full level:  for_it, against_it = LEVEL / (len(tests) - need + 1),  ->  for_it, against_it = LEVEL,
    one refuted cell refutes all:  refuted > len(tests) - need  ->  refuted > 0
    the paper's ties count:  _margin(claim) > 0 for other in known  ->  _margin(claim) >= 0 for other in known
    trend without its start:  ([against] if against else []) + [of  ->  [of
    columns of equal runs each count:  firsts.setdefault(tuple(wanted[wanted["column"] == name]["id"]), name)  ->  firsts[name,] = name
    missing runs are passed over:  if len(present) < len(tests) or not tests:  ->  if not present:
    `picked` is ignored:  if claim.check == "best" or claim.picked:  ->  if claim.check == "best":
selection
  experiments/pick.py: pick select best show
    median of all evaluations:  values[metric].tail(int(middle[1])).median()  ->  values[metric].median()
    best epoch by the metric itself:  values[key].idxmin()  ->  values[metric].idxmin()
    diverged runs are left out of a mean:  values.mean(skipna=False)  ->  values.mean()
    a pick among some:  if any(identity not in found or  ->  if all(identity not in found or
    trials are printed:  return asked[~asked["trial"] & ~asked.index  ->  return asked[~asked.index
    a part of a word is enough:  if word in column.split() for pair  ->  if word in column for pair
    failed runs count as chance:  if run.state == "diverged"}  ->  if run.state != "done"}
    a run of another cell is rejected:  only[~only["id"].isin(both[~both.index.isin(spare)]["id"])]  ->  only
  experiments/table.py: select table
    pick by the column's `at`:  [chosen(row, mine, found, table.at)]  ->  [chosen(row, mine, found, column.at or table.at)]
  experiments/spec.py: best
    rivals picked on the test set:  (row.pick is not None and " test/" not in row.pick)  ->  row.pick is not None
store
  experiments/store.py: store
    written in place:  with open(temporary, "xb") as file:  ->  with open(temporary := path, "wb") as file:
    a lock that two can hold:  _flock(handle, path, fcntl.LOCK_EX)  ->  _flock(handle, path, fcntl.LOCK_SH)
    rounded metrics:  repr(float(row[key])) for key  ->  f"{row[key]:.9g}" for key
  experiments/identity.py: identity
    null is an option:  if inner is not None and key not in HYDRAS_OWN  ->  if key not in HYDRAS_OWN
    true is 1:  isinstance(value, int) and not isinstance(value, bool)  ->  isinstance(value, int)
    a profile's seeds count:  content["profile"].items() if key != "seeds"}  ->  content["profile"].items()}
  experiments/published.py: published
    another run's config is published:  if run_id(run.config()) != identity:  ->  if not run_id(run.config()):
    lost numbers are no difference:  gaps[mine.isna() != theirs.isna()] = math.inf  ->  gaps = gaps.fillna(0.0)
  experiments/index.py: index
    changed runs are not read again:  if row is None or row["stamp"] != stamp:  ->  if row is None:
config
  experiments/config.py: input conf identity
    0 counts as positive:  low < value if open_low else low <= value  ->  low <= value
    true is a whole number:  type(value) is hint or  ->  isinstance(value, hint) or
    first of a list is enough:  all(_fits(each  ->  any(_fits(each
    nesterov without momentum:  if cfg.optim.nesterov and not cfg.optim.momentum:  ->  if cfg.optim.nesterov and cfg.optim.momentum is None:
    negative fractions as weights:  node.get("weight"), int | float) and weight < 0  ->  node.get("weight"), int) and weight < 0
    equal names by the whole target:  names.get(target_name(node._target_), set())  ->  names.get(node._target_, set())
    missing keys are not looked for:  for key in {*known, *(cfg[path]  ->  for key in {*(cfg[path]
  conf/experiment/itdm_grey_c.yaml: protocols
    learning rate of the demonstration:  optim: {lr: 0.01,  ->  optim: {lr: 0.05,
  conf/method/cutmix.yaml: mixing protocols
    every batch is cut:  prob: 0.5  ->  prob: 1.0
"""


@dataclass(frozen=True)
class Mutant:
    part: str
    file: str
    tests: tuple[str, ...]  # paths of test files
    name: str
    old: str
    new: str

    def text(self, root: Path = ROOT) -> str:
        """The mutated file. Raises ValueError if the old text does not occur in it exactly once."""
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: {self.old!r} (mutant {self.name!r}) must occur once and occurs {count} times")
        return text.replace(self.old, self.new)


def mutants() -> Iterator[Mutant]:
    """FAULTS as mutants."""
    part, file, tests = "", "", ()
    for line in FAULTS.strip().splitlines():
        if line.startswith("    "):
            name, _, change = line.strip().partition(":  ")
            yield Mutant(part, file, tests, name, *change.split("  ->  "))
        elif line.startswith("  "):
            file, _, names = line.strip().partition(": ")
            tests = tuple(f"tests/test_{name}.py" for name in names.split())
        else:
            part = line


MUTANTS = list(mutants())


def start(folder: str) -> None:
    """Copies what git tracks and what it does not ignore, for one worker."""
    WORKER.folder = Path(tempfile.mkdtemp(dir=folder))
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # git lists deleted files too
            (WORKER.folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy2(ROOT / name, WORKER.folder / name)


def run(*tests: str, timeout: float | None = None) -> tuple[str, float]:
    """The first test that fails ("" if all pass), and the seconds that the tests took."""
    unset = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTEST_ADDOPTS", "DATA_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | {"OMP_NUM_THREADS": "1"}
    command, began = [sys.executable, "-m", "pytest", *OPTIONS, *tests], time.monotonic()
    options = {"cwd": WORKER.folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests have started
            return "time-out", time.monotonic() - began
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", output, re.MULTILINE)
    return (failed[1] if failed else f"exit code {process.returncode}") if process.returncode else "", time.monotonic() - began


def caught(mutant: Mutant, timeout: float) -> tuple[str, float]:
    """As `run`, of the mutant's tests with the mutant in the worker's copy."""
    text, file = mutant.text(WORKER.folder), WORKER.folder / mutant.file
    plain = file.rename(f"{file}.plain")
    try:
        file.write_text(text)
        os.utime(file, (0, MUTANTS.index(mutant)))  # the time tells Python that its compiled file is out of date
        return run(*mutant.tests, timeout=timeout)
    finally:
        plain.replace(file)


def main(words: list[str]) -> bool:
    """Whether too few are caught. Raises ValueError if the check cannot be run."""
    workers = next((int(word.removeprefix("workers=")) for word in words if word.startswith("workers=")), 2)
    words = [word for word in words if not word.startswith("workers=")]
    chosen = [each for each in MUTANTS if not words or any(word in f"{each.part} {each.file} {each.name}" for word in words)]
    files = list(dict.fromkeys(test for mutant in chosen if mutant.text() for test in mutant.tests))
    if not files:
        raise ValueError(f"no part, file or name of a mutant has {' or '.join(words)}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers, initializer=start, initargs=(folder,)) as pool:
        plain = dict(zip(files, pool.map(run, files), strict=True))
        if failed := [test for test, _ in plain.values() if test]:
            raise ValueError(f"tests fail without a mutant: {', '.join(failed)}")
        limits = [60 + 4 * sum(plain[file][1] for file in mutant.tests) for mutant in chosen]
        count = 0
        for mutant, (test, seconds) in zip(chosen, pool.map(caught, chosen, limits), strict=True):
            count += bool(test)
            print(f"{mutant.name:40} {mutant.file:33} {seconds:4.0f} s  {test or 'SURVIVED'}", flush=True)
    least = math.ceil(LEAST * len(chosen) / 60)
    print(f"{count} of {len(chosen)} mutants caught; at least {least} must be")
    return count < least


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"mutants: {error}")
