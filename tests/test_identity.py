"""A run's identity: which configs are one run, what does not change its id, and how its folder is named."""

from __future__ import annotations

import hashlib
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.cli import CONF
from experiments.config import GROUPS, ConfigError, _hints, check, options
from experiments.identity import run_dir, run_id

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def config(words: str = "") -> DictConfig:
    return compose("config", words.split())


def identity(words: str = "") -> str:
    return run_id(config(words))


# identity


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("optim.lr=1", "optim.lr=1.0"),
        ("optim.lr=1e-4", "optim.lr=0.0001"),
        ("method=itdm_c method.itdm_c.weight=1", "method=[itdm_c] method.itdm_c.weight=1.0"),
        ("method=itdm_c", "method=[itdm_c]"),
        ("", "method=[]"),
        ("", "method=vanilla"),
        ("seed=2 epochs=3", "epochs=3 seed=2"),
        ("dataset=digits dataset.train=500", "dataset=digits"),
        ("model.in_channels=1", "model.in_channels=1.0"),
        (
            "experiment=demo",
            "dataset=digits model=net2c norm=bn schedule=steps epochs=20 batch_size=50 balanced=true optim.lr=0.05 optim.momentum=0.5 "
            "optim.weight_decay=0 schedule.at=[8,16] schedule.factor=0.2",
        ),
        (
            "experiment=itdm_grey_c",
            "dataset=kmnist model=net5c norm=bn schedule=steps epochs=50 batch_size=150 balanced=true optim.lr=0.01 optim.momentum=0.5 "
            "optim.weight_decay=0 schedule.at=[20,40] schedule.factor=0.2 evaluate.every=50",
        ),
        ("experiment=demo epochs=7", "epochs=7 experiment=demo"),
    ],
)
def test_two_spellings_meet(one: str, other: str) -> None:
    assert identity(one) == identity(other)


def test_order_of_methods_counts() -> None:
    assert identity("method=[itdm_c,label_smoothing]") != identity("method=[label_smoothing,itdm_c]")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif not isinstance(value, dict):
        yield path, value


FULL = "experiment=demo method=[itdm_c,label_smoothing] norm=gn"


def test_every_leaf_but_runtime_counts() -> None:
    """Change each of them, one at a time: the id changes, or for what must not change a number it does not."""
    cfg = config(FULL)
    plain, known = run_id(cfg), {run_id(cfg)}
    content = OmegaConf.to_container(cfg, resolve=True)
    paths = dict(leaves(content))
    assert {
        "seed",
        "optim.lr",
        "dataset.train",
        "model.norm.num_groups",
        "method.itdm_c.weight",
        "profile.steps",
        "schedule.at",
    } <= paths.keys()
    for path, value in paths.items():
        changed = cfg.copy()
        OmegaConf.set_struct(changed, False)
        OmegaConf.resolve(changed)
        changed = OmegaConf.create(OmegaConf.to_container(changed))  # without types: any value will do
        if isinstance(value, bool):
            new: Any = not value
        elif isinstance(value, int | float):
            new = value + 1
        else:
            new = [*value, 99] if isinstance(value, list) else f"{value or ''}x"
        OmegaConf.update(changed, path, new)
        if path.startswith("runtime.") or path in ("experiment", "profile.seeds") or path.endswith("._partial_"):
            assert run_id(changed) == plain, path
        else:
            assert run_id(changed) not in known, path
            known.add(run_id(changed))


def test_true_is_not_one() -> None:
    cfg = OmegaConf.create(OmegaConf.to_container(config(), resolve=True))
    one, other = cfg.copy(), cfg.copy()
    one.balanced, other.balanced = True, 1
    assert run_id(one) != run_id(other)


def test_the_id_is_that_of_its_content() -> None:
    """Spelt out once more, so that a change of the rule, which would lose all stored runs, is seen."""
    content = {"method": {"a": {"_target_": "x.y.Z", "_partial_": True, "weight": 1, "clip": None}}, "seed": 1, "balanced": True}
    cfg = OmegaConf.create(
        content | {"profile": {"name": "p", "seeds": 3}, "runtime": {"device": "cpu"}, "experiment": None, "probe": None}
    )
    method = '[["a", {"_is_": "Z", "weight": 1.0}]]'
    text = f'{{"balanced": true, "method": {method}, "profile": {{"name": "p"}}, "seed": 1.0, "version": 1.0}}'
    assert run_id(cfg) == hashlib.sha256(text.encode()).hexdigest()[:10]


def test_a_new_option_that_is_null_leaves_runs_their_ids() -> None:
    cfg = OmegaConf.create(OmegaConf.to_container(config("method=itdm_c"), resolve=True))
    for path in ("optim.new", "model.new", "method.itdm_c.new"):
        for value in (None, 0, False, ""):
            changed = cfg.copy()
            OmegaConf.update(changed, path, value, force_add=True)
            assert (run_id(changed) == run_id(cfg)) == (value is None), (path, value)


def test_no_option_is_given_by_leaving_it_out() -> None:
    """An option that is null has the id of one that is left out: so both must mean the same to the code."""
    for group in GROUPS:
        for name in options(group):
            node = OmegaConf.load(CONF / group / f"{name}.yaml")
            if "_target_" in node:
                found = get_object(node["_target_"])
                hints = _hints(found)
                for key, given in inspect.signature(found).parameters.items():
                    assert type(None) not in get_args(hints.get(key)) or given.default in (None, inspect.Parameter.empty), (name, key)


COPIED = ("conf", "data", "experiments", "models", "regularizers")
IDS = """
import sys
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from experiments.cli import CONF
from experiments.config import check
from experiments.identity import run_id
for words in ("method=itdm_c norm=gn", "experiment=per_lstm dataset=docs method=per", "experiment=lamix_demo method=lamix"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", words.split())
    check(cfg)
    print(run_id(cfg), cfg.model._target_)
"""
MOVES = {
    "data/images.py": "data/pictures.py",
    "data/text.py": "data/words.py",
    "models/cnn.py": "models/small/nets.py",
    "models/lstm.py": "models/recurrent_net.py",
    "regularizers/itdm.py": "regularizers/matching/mmd_of_two.py",
    "regularizers/lamix.py": "regularizers/soft.py",
}


def test_moving_modules_changes_no_id(tmp_path: Path) -> None:
    """In a copy of the tree, where each name of a moved module is replaced."""

    def ids() -> list[list[str]]:
        done = subprocess.run([sys.executable, "-c", IDS], cwd=tmp_path, capture_output=True, text=True, check=True)
        return [line.split() for line in done.stdout.splitlines()]

    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "raw"))
    before = ids()
    names = {old.removesuffix(".py").replace("/", "."): new.removesuffix(".py").replace("/", ".") for old, new in MOVES.items()}
    for old, new in MOVES.items():
        (tmp_path / new).parent.mkdir(exist_ok=True)
        (tmp_path / old).rename(tmp_path / new)
    for file in [*tmp_path.rglob("*.py"), *tmp_path.rglob("*.yaml")]:
        file.write_text(re.sub(r"\b(" + "|".join(map(re.escape, names)) + r")\b(?!\.py)", lambda found: names[found[1]], file.read_text()))
    after = ids()
    assert [one for one, _ in after] == [one for one, _ in before]
    assert all(new != old for (_, new), (_, old) in zip(after, before, strict=True) if old.split(".")[1] in ("cnn", "lstm"))


def test_two_choices_of_one_name_are_refused(tmp_path: Path) -> None:
    """A copy of a network under its old name would be served the original's numbers. Also where both are in a folder of the user's."""
    with pytest.raises(ConfigError, match=re.escape("model._target_: models.mine.net2c and models.cnn.net2c have the same name")):
        check(config("model._target_=models.mine.net2c"), targets=False)
    (tmp_path / "model").mkdir()
    plain = (CONF / "model" / "net2c.yaml").read_text()
    (tmp_path / "model" / "mine.yaml").write_text(plain.replace("models.cnn.net2c", "'models.mine.net2c'"))
    for model in ("mine", "net2c"):  # whichever is asked for, before or after the other
        command = [sys.executable, "-m", "experiments.train", "--config-dir", str(tmp_path), f"model={model}", f"runtime.runs={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and re.search(r"model\._target_: \S+ and \S+ have the same name", done.stderr), done.stderr


# folders


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "digits-net2c-vanilla/batchnorm,seed=1-"),
        ("method=vanilla profile=smoke norm=none", "digits-net2c-vanilla/identity,seed=1,smoke-"),
        ("method=itdm_c method.itdm_c.weight=0.80 seed=3", "digits-net2c-itdm_c/weight=0.8,batchnorm,seed=3-"),
        ("experiment=per_lstm norm=rbn model.tie_embeddings=true", "ptb-lstm-vanilla/recurrentbatchnorm,tie_embeddings,seed=1-"),
        (
            "method=[itdm_c,label_smoothing] norm=gn",
            "digits-net2c-itdm_c+label_smoothing/weight=0.4,smoothing=0.1,group,num_groups=2,seed=1-",
        ),
        ("norm=gn norm.channels_per_group=5", "digits-net2c-vanilla/group,channels_per_group=5,seed=1-"),
    ],
)
def test_names_of_folders(words: str, expected: str) -> None:
    assert run_dir(config(words)) == expected + identity(words)


def test_folders_have_harmless_names() -> None:
    cfg = config("method=itdm_c")
    cfg.profile.name = "../../odd name\n$HOME\u00e9" + "x" * 300
    OmegaConf.set_struct(cfg, False)
    cfg.method = {f"m{number}": cfg.method.itdm_c for number in range(60)}
    name = run_dir(cfg)
    assert re.fullmatch(r"[\w=.,+-]+/[\w=.,+-]+", name) and ".." not in name.split("/")
    assert all(len(part) <= 100 for part in name.split("/"))
