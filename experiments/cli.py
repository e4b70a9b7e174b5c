"""How a command starts Hydra, and how it ends: one clear line and exit code 2 for bad input, 1 for runs that failed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import store
from experiments.config import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"

OmegaConf.register_new_resolver("run_dir", lambda *, _root_: store.run_dir(_root_), replace=True)
OmegaConf.register_new_resolver("run_id", lambda *, _root_: store.run_id(_root_), replace=True)


class RunFailed(RuntimeError):
    """A run that raised or diverged; its folder has the reason."""


def main(task: Callable[..., Any], config_name: str) -> None:
    """Run a Hydra task from the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach this function as exceptions, which it then prints as one line
    try:
        hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(task)()
    except RunFailed as error:
        stop(str(error), 1)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        stop(one_line(error), 2)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}" if error.filename else one_line(error), 2)
    except KeyboardInterrupt:
        stop("interrupted; ask again and it goes on from the last checkpoint", 130)


def stop(message: str, code: int) -> None:
    """End the process with a line on stderr."""
    print(f"retable: {message}", file=sys.stderr)
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's texts span lines, list options one a line and end in internals: the gist, on one line."""
    text = str(error)
    if error.__cause__ is not None and isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}\n{error.__cause__}"
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"(object_type|reference_type|full_key)=|Config search path|provider=|To append", line)]
    key = re.search(r"full_key: (\S+)", text)
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type"))]
    message = " ".join(lines) or type(error).__name__
    return f"{key[1]}: {message}" if key and not message.startswith(key[1]) else message
