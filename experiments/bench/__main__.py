"""The bench's command line.   python -m experiments.bench --help"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments import store
from experiments.cli import BAD_INPUT, RunFailed, one_line, stop
from experiments.config import ConfigError

USAGE = """python -m experiments.bench [PART...] [rounds=N] [steps=N] [csv=FILE] [OVERRIDE...]

end        epochs of the whole suite against the usual training loop    use    a step's arithmetic against a convolution's
input      augmented images against a DataLoader's                      step   a step against a plain loop's
methods    each method's step against vanilla's                         text, norms  language models' steps; norm layers' against BN's
puzzle     PuzzleMix's step against vanilla's                           precision    bf16, channels_last
start      seconds to --help and to the first step                      sweep  two runs side by side against one by one
gpu        launch costs, kernels, TF32, CUDA graphs
Without a PART: all. The two sides of a row take turns in one process.
rounds=7   paired rounds of a row, at least 7      csv=FILE  where the table goes too: runs/bench.csv
steps=N    steps of a side in a round; without it as many as take half a second, at least 1
Overrides are those of experiments.train, for all rows; method=[NAME,...] leaves out the rows of other methods."""


def bench(arguments: list[str]) -> None:
    """Measure and print. Raises ConfigError for bad input, before anything is measured, and RunFailed when a process fails."""
    from experiments.bench import cases, measure

    parts = [word for word in arguments if "=" not in word and not word.startswith("~")]
    if unknown := [part for part in parts if part not in cases.PARTS]:
        raise ConfigError(f"bench: {unknown[0]} is not allowed; parts: {', '.join(cases.PARTS)} (--help explains)")
    own = {name: value for name, _, value in (word.partition("=") for word in arguments) if name in ("rounds", "steps", "csv")}
    for name, least in {"rounds": 7, "steps": 1}.items():
        if name in own and not (own[name].isdecimal() and int(own[name]) >= least):
            raise ConfigError(f"{name}: {own[name]} is not allowed; it must be a whole number of at least {least}")
    methods, common = measure.split(word for word in arguments if word not in parts and measure.key(word) not in own)
    asked = measure.Asked(common, methods, int(own.get("rounds", 7)), int(own["steps"]) if "steps" in own else None)
    wanted, path = [case for part in parts or cases.PARTS for case in cases.PARTS[part](asked)], Path(own.get("csv", "runs/bench.csv"))
    if not wanted:
        print("nothing was measured: these parts have no row for the methods named and this device")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    about = measure.machine(asked.cfg(asked.models("net5c")[0])) | {"rounds": asked.rounds, "overrides": " ".join(common) or "none"}
    rows = []
    for case in wanted:
        rows.append(measure.compare(*case[:4], (case.a(), case.b()), asked, case.work, case.unit))
        print("{id} {what} over {over}: {ratio:.3f} {note}".format(**rows[-1]), file=sys.stderr)
    print(measure.table(rows, about))
    from pandas import DataFrame

    with store.written(path) as file:
        DataFrame(rows, columns=measure.COLUMNS).assign(**about).to_csv(file, index=False)


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        print(USAGE)
        return
    try:
        bench(arguments)
    except RunFailed as error:
        stop(str(error), 1)
    except BAD_INPUT as error:
        stop(one_line(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)


if __name__ == "__main__":
    main()
