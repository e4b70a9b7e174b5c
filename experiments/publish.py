"""Pack the finished runs of a table or figure into one small file that git keeps.   python -m experiments.publish --help"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.cli import main
from experiments.config import Config, ConfigError
from experiments.launching.missing import find
from experiments.published import FOLDER, pack
from experiments.spec import Figure, Table
from experiments.store import Run
from experiments.table import common_overrides, jobs, narrowed


@dataclass
class PublishConfig(Config):
    table: Table = field(default_factory=Table)
    figure: Figure = field(default_factory=Figure)
    only: list[str] = field(default_factory=list)
    out: str = str(FOLDER)


def run(cfg: DictConfig) -> None:
    """The task that Hydra runs. Raises ConfigError when nothing is chosen, or none of its runs is finished."""
    parts = {}
    if not OmegaConf.is_missing(cfg.table, "title"):
        parts["table"] = narrowed(cfg, cfg.table, cfg.only)
    if not OmegaConf.is_missing(cfg.figure, "title"):
        parts["figure"] = narrowed(cfg, cfg.figure.runs, cfg.figure.only, cfg.only)
    if not parts:
        raise ConfigError("publish: nothing is chosen; add table=NAME or figure=NAME")
    for kind, table in parts.items():
        name = HydraConfig.get().runtime.choices[kind]
        asked = jobs(table, common_overrides(), targets=False)
        found = {identity: one for identity, one in find(asked, cfg.runtime.runs).items() if one.result() is not None}
        done = {identity: one for identity, one in found.items() if _whole(identity, one)}
        if len(done) < len(found):
            print(f"{len(found) - len(done)} runs are left out: they have lost their metrics, or have another run's result")
        if not done:
            raise ConfigError(f"{kind}: none of the {asked['id'].nunique()} runs of {name} is finished in {cfg.runtime.runs}")
        file = Path(cfg.out) / f"{name}.zip"
        added, changed = pack(file, done)
        print(f"{file}: {len(done)} of {asked['id'].nunique()} runs of {kind} {name}, {added} added; {file.stat().st_size / 1000:.0f} kB")
        if changed:
            print(f"{changed} runs were there before with other numbers, and are replaced")
        dirty = sum(bool((one.result() or {}).get("dirty")) for one in done.values())
        if dirty:
            print(f"{dirty} of these runs were made by code with uncommitted changes")


def _whole(identity: str, one: Run) -> bool:
    """Whether the run has numbers, or diverged, and its result is its own."""
    result = one.result() or {}
    return result.get("id") == identity and bool("diverged" in result or one.metrics())


ConfigStore.instance().store("publish_schema", PublishConfig)

if __name__ == "__main__":
    from experiments.publish import run as task

    main(task, "publish")
