"""Tests of a run's identity: which configs are one run, what changes its id, and how its folder is named."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.cli import CONF
from experiments.config import GROUPS, ConfigError, _hints, check, options
from experiments.identity import run_dir, run_id


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def config(words: str = "") -> DictConfig:
    return compose("config", words.split())


def identity(words: str = "") -> str:
    return run_id(config(words))


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        ("optim.lr=1e-4 seed=2 epochs=3", "epochs=3 optim.lr=0.0001 seed=2"),
        ("method=itdm_c method.itdm_c.weight=1", "method=[itdm_c] method.itdm_c.weight=1.0"),
        ("", "method=vanilla dataset.train=500 model.in_channels=1.0"),
        (
            "experiment=itdm_grey_c",
            "dataset=kmnist model=net5c norm=bn schedule=steps epochs=50 batch_size=150 balanced=true optim.lr=0.01 optim.momentum=0.5 "
            "optim.weight_decay=0 schedule.at=[20,40] schedule.factor=0.2 evaluate.every=50",
        ),
    ],
)
def test_two_spellings_are_one_run(words: str, spelled: str) -> None:
    assert identity(words) == identity(spelled)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif not isinstance(value, dict):
        yield path, value


def test_every_value_but_those_of_runtime_changes_the_id() -> None:
    cfg = OmegaConf.create(OmegaConf.to_container(config("experiment=demo method=[itdm_c,label_smoothing] norm=gn"), resolve=True))
    plain, known = run_id(cfg), {run_id(cfg)}
    paths = dict(leaves(OmegaConf.to_container(cfg)))
    some = {"seed", "optim.lr", "dataset.train", "model.norm.num_groups", "method.itdm_c.weight", "profile.steps", "schedule.at"}
    assert some <= paths.keys()
    for path, value in paths.items():
        if isinstance(value, bool):
            new: Any = not value
        elif isinstance(value, int | float):
            new = value + 1
        else:
            new = [*value, 99] if isinstance(value, list) else f"{value or ''}x"
        changed = cfg.copy()
        OmegaConf.update(changed, path, new)
        if path.startswith("runtime.") or path in ("experiment", "profile.seeds") or path.endswith("._partial_"):
            assert run_id(changed) == plain, path
        else:
            assert run_id(changed) not in known, path
            known.add(run_id(changed))
    assert identity("method=[itdm_c,label_smoothing]") != identity("method=[label_smoothing,itdm_c]")


def test_the_rule_by_which_an_id_is_made() -> None:
    """Spelt out once more: a change of the rule would lose all stored runs. 1 is 1.0 and not true; null is not given."""
    method = {"a": {"_target_": "x.y.Z", "_partial_": True, "weight": 1, "clip": None, "zero": 0, "no": False, "text": ""}}
    rest = {"profile": {"name": "p", "seeds": 3}, "runtime": {"device": "cpu"}, "experiment": None, "probe": None, "balanced": True}
    text = '[["a", {"_is_": "Z", "no": false, "text": "", "weight": 1.0, "zero": 0.0}]]'
    wanted = f'{{"balanced": true, "method": {text}, "profile": {{"name": "p"}}, "seed": 1.0, "version": 1.0}}'
    assert run_id(OmegaConf.create({"method": method, "seed": 1} | rest)) == hashlib.sha256(wanted.encode()).hexdigest()[:10]


def test_options_that_may_be_null_are_null_by_default() -> None:
    """Null and "not given" have one id, and so must mean the same to the code."""
    for group in GROUPS:
        for name in options(group):
            node = OmegaConf.load(CONF / group / f"{name}.yaml")
            if "_target_" in node:
                found = get_object(node["_target_"])
                hints = _hints(found)
                for key, given in inspect.signature(found).parameters.items():
                    assert type(None) not in get_args(hints.get(key)) or given.default in (None, inspect.Parameter.empty), (name, key)


def test_two_choices_of_one_name_are_refused() -> None:
    """A copy of a network under its old name would be served the original's numbers."""
    with pytest.raises(ConfigError, match=re.escape("model._target_: models.mine.net2c and models.cnn.net2c have the same name")):
        check(config("model._target_=models.mine.net2c"), targets=False)


def test_names_of_folders() -> None:
    names = {
        "": "digits-net2c-vanilla/batchnorm,seed=1-",
        "profile=smoke norm=gn norm.channels_per_group=5": "digits-net2c-vanilla/group,channels_per_group=5,seed=1,smoke-",
        "experiment=per_lstm norm=rbn model.tie_embeddings=true": "ptb-lstm-vanilla/recurrentbatchnorm,tie_embeddings,seed=1-",
        "method=[itdm_c,label_smoothing] method.itdm_c.weight=0.80 norm=gn seed=3": "digits-net2c-itdm_c+label_smoothing/"
        "weight=0.8,smoothing=0.1,group,num_groups=2,seed=3-",
    }
    for words, name in names.items():
        assert run_dir(config(words)) == name + identity(words)


def test_folders_have_harmless_names() -> None:
    cfg = config("method=itdm_c")
    cfg.profile.name = "../../odd name\n$HOME\u00e9" + "x" * 300
    OmegaConf.set_struct(cfg, False)
    cfg.method = {f"m{number}": cfg.method.itdm_c for number in range(60)}
    name = run_dir(cfg)
    assert re.fullmatch(r"[\w=.,+-]+/[\w=.,+-]+", name) and ".." not in name.split("/")
    assert all(len(part) <= 100 for part in name.split("/"))
