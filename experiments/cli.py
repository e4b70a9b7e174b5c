"""How a command starts Hydra, and how it ends: one clear line and exit code 2 for bad input, 1 for runs that failed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError, YAMLError

from experiments import timebox
from experiments.config import ConfigError, options, wanted

CONF = Path(__file__).resolve().parent.parent / "conf"

BAD_INPUT = (ConfigError, HydraException, OmegaConfBaseException, YAMLError, OSError)


class RunFailed(RuntimeError):
    """A run that raised or diverged; its folder has the reason."""


def main(task: Callable[..., Any], config_name: str) -> None:
    """Run a Hydra task from the command line. A sweep goes on after a job that fails; each failure is a line at the end."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach this function as exceptions, which it then prints as one line
    errors: list[Exception] = []
    plain = JobReturn.return_value  # prints a line of its own and raises a sweep's first failure only

    def collect(job: JobReturn) -> Any:
        return errors.append(job._return_value) if job.status == JobStatus.FAILED else job._return_value

    JobReturn.return_value = plain.getter(collect)  # type: ignore[attr-defined, method-assign]
    try:
        with timebox.began_now():
            hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(task)()
    except (*BAD_INPUT, ValueError) as error:  # before any job: Hydra raises ValueError too
        line = one_line(error)
        if config_name != "config" and (key := re.match(r"((?:dataset|model|norm|schedule|method)\.\S+): there is no such key", line)):
            line += f"; for runs of other choices, which have it: ++{key[1]}=..."  # the command's own are the defaults
        stop(line, 2)
    except KeyboardInterrupt:
        stop("interrupted; ask again and it goes on from the last checkpoint", 130)
    finally:
        JobReturn.return_value = plain  # type: ignore[method-assign]
    late = sum(isinstance(each, timebox.TimeUp) for each in errors)
    if late:
        print(f"the time box has ended: {late} {'run is' if late == 1 else 'runs are'} left; ask again and it goes on")
    errors = [each for each in errors if not isinstance(each, timebox.TimeUp)]
    for each in errors:
        if not isinstance(each, (RunFailed, *BAD_INPUT)):
            raise each
    if errors:
        lines = dict.fromkeys(str(each) if isinstance(each, RunFailed) else one_line(each) for each in errors)
        stop("\nretable: ".join(lines), 1 if all(isinstance(each, RunFailed) for each in errors) else 2)


def stop(message: str, code: int) -> None:
    """End the process with a line on stderr."""
    print(f"retable: {message}", file=sys.stderr)
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """The gist of an error: the key, what was given, what is allowed. Hydra's and OmegaConf's own texts span lines and end in internals."""
    text = str(error)
    if isinstance(error, ConfigError):
        return text
    where = re.match(r"In '(.+)': \w+ raised while composing", text)
    place = f" (in conf/{where[1]}.yaml)" if where else ""
    for inner in _causes(error):
        if isinstance(inner, MarkedYAMLError) and inner.problem_mark is not None:
            return f"{inner.problem_mark.name}, line {inner.problem_mark.line + 1}: {inner.problem}"
        if isinstance(inner, ConfigKeyError | ConfigAttributeError) and inner.full_key:
            return _unknown(inner) + place
        if isinstance(inner, ValidationError) and inner.full_key:
            given = re.search(r"Value ('.*?')|value: (.*)", str(inner))
            shown = (given[1] or given[2]) if given else "null"
            return f"{inner.full_key}: {shown} is not allowed; it must be {wanted(inner)}{place}"
        if isinstance(inner, OverrideParseException):
            return f"{inner.override!r} is not KEY=VALUE ({inner.message.splitlines()[0]})"
    if choice := re.search(r"Could not (?:find|load) '(.+)/([^/']+)'", text):
        return f"{choice[1]}: {choice[2]!r} is not known; allowed: {', '.join(options(choice[1]))}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    internals = r"(object|reference)_type=|full_key:|Config search path|provider="
    lines = [line.strip() for line in re.sub(r"^In '.+?': ", "", text).splitlines()]
    return " ".join(line for line in lines if line and not re.match(internals, line)) or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown(error: OmegaConfBaseException) -> str:
    """A key that is not there, and those that are."""
    parent, _, name = str(error.full_key).rpartition(".")
    if parent == "method" and name in options("method"):
        return f"{error.full_key}: it has options but is not chosen; add method={name}"
    known = [] if error.parent_node is None else [str(key) for key in error.parent_node if key != "hydra" and not str(key).startswith("_")]
    return f"{error.full_key}: there is no such key; allowed: {', '.join(known) or 'none'}"
