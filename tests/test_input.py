"""Tests of bad input: one line on stderr that names the key, what was given and what is allowed; exit code 2; nothing is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import cli, table, train

ROOT = Path(__file__).resolve().parent.parent
TEXT = "experiment=per_lstm dataset=docs model.width=8"
IMAGES = "dataset=cifar10 dataset.source=embedded"
TINY = ["dataset=digits", "dataset.train=100", "profile.test=100", "epochs=1", "runtime.threads=1"]
Command = Callable[..., str]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored afterwards: main sets it
    return tmp_path / "runs"


@pytest.fixture
def refused(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Gives a command bad input, which must end it with exit code 2, one line, and no run's folder. Returns the line."""

    def call(*words: str, task: Callable = train.train, root: str = "config") -> str:
        common = [f"runtime.runs={runs}", *(TINY if root == "config" else [f"out={runs}/tables"])]
        keys = {word.split("=")[0] for word in words} | ({"dataset.train"} if any("dataset=" in word for word in words) else set())
        common = [word for word in common if word.split("=")[0] not in keys]
        monkeypatch.setattr(sys, "argv", ["retable", *words, *common])
        with pytest.raises(SystemExit) as end:
            cli.main(task, root)
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "") and err.startswith("retable: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert not any(path.is_dir() for path in runs.glob("*"))
        return err.removeprefix("retable: ").rstrip("\n")

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # names
        ("method=[itdm_c,foo]", "method: 'foo' is not known; allowed: cutmix, itdm_c, itdm_j"),
        # keys, also with Hydra's signs for adding, forcing and deleting
        ("method=itdm_c method.itdm_c.wieght=1", "method.itdm_c.wieght: there is no such key; allowed: weight, per_class"),
        ("method.itdm_c.weight=1", "method.itdm_c: it has options but is not chosen; add method=itdm_c"),
        ("+dataset.foo=1", "dataset.foo: data.images.digits has no such option; allowed: data_dir"),
        ("++epocs=1", "epocs: there is no such key; allowed: dataset, model"),
        ("~optim", "optim: it is missing"),
        ("~model", "model: nothing is chosen; name a file of conf/model"),
        # values of the schema
        ("optim.lr=0", "optim.lr: 0.0 is not allowed; it must be a number above 0"),
        ("optim.momentum=1", "optim.momentum: 1.0 is not allowed; it must be a number from 0 to below 1"),
        ("optim.nesterov=true optim.momentum=0", "optim.nesterov: true goes with a momentum above 0"),
        ("optim=3", "optim: 3 is not allowed; it must be a mapping"),
        ("epochs=null", "epochs: null is not allowed; it must be a whole number of at least 1"),
        ("epochs=3.5", "epochs: '3.5' is not allowed; it must be a whole number of at least 1"),
        ("runtime.download=[ftp:/x]", "runtime.download: ['ftp:/x'] is not allowed; it must be true, false, or a list"),
        ("step=graph runtime.device=cpu", "step: graph needs a GPU; allowed here: eager"),
        # values of options
        ("method=itdm_c method.itdm_c.weight=inf", "method.itdm_c.weight: inf is not allowed; it must be a finite number"),
        ("method=itdm_c method.itdm_c.weight=-0.5", "method.itdm_c.weight: -0.5 is not allowed; it must be a number of at least 0"),
        ("method=itdm_c method.itdm_c.per_class=1", "method.itdm_c.per_class: 1 is not allowed; it must be true or false"),
        ("method=itdm_c method.itdm_c.multipliers=[1,x]", "method.itdm_c.multipliers: [1, 'x'] is not allowed; it must be a list"),
        ("method=label_smoothing method.label_smoothing.smoothing=2", "method.label_smoothing: smoothing: 2"),
        ("dataset.train=true", "dataset.train: True is not allowed; it must be a whole number or null"),
        # what does not go together
        (IMAGES, "model: models.cnn.net2c does not take the data set's 3x32x32 images (Given groups=1"),
        ("dataset=cifar10 runtime.data_dir=nowhere", "dataset: cifar10 is not under nowhere (looked for cifar-10-batches-py"),
        ("norm=gn norm.num_groups=3", "model: num_groups: 3 does not divide the 20 channels of a layer"),
        ("norm=rbn", "model: models.cnn.net2c does not take the data set's 1x28x28 images (norm=rbn is for recurrent networks)"),
        ("schedule=plateau", "schedule: plateau goes by a split `valid`, which the data set lacks; set dataset.valid"),
        ("experiment=per_lstm dataset=docs model=net2c", "model: models.cnn.net2c does not take the data set's 35 words"),
        (f"{TEXT} method=[per,itdm_j]", "method: itdm_j is for samples of one label each, and here every one of the words has its own"),
        (f"{TEXT} balanced=true", "balanced: true is not allowed for text, whose words stay in their order; it must be false"),
        (f"{TEXT} batch_size=900 profile.train=800", "batch_size: 900 is not allowed for 799 words; it must be at most that"),
        # no override at all
        ("dataset", "'dataset' is not KEY=VALUE"),
        ("method=itdm_c,itdm_j", "Ambiguous value for argument 'method=itdm_c,itdm_j'"),
        # targets
        ("dataset._target_=os.system", "dataset._target_: os.system is not allowed; it must start with data., models."),
        ("+model.norm.inner._target_=os.system", "model.norm.inner._target_: os.system is not allowed"),
        ("model._target_=models.cnn.nope", "model._target_: models.cnn.nope cannot be imported (module 'models.cnn' has no"),
    ],
)
def test_command_line(refused: Command, words: str, expected: str) -> None:
    assert refused(*words.split()).startswith(expected)


def test_table_command_line(refused: Command) -> None:
    asked = {
        "": "table: nothing is chosen; allowed: demo",
        "table=foo": "table: 'foo' is not known; allowed: demo",
        "table=demo table.foo=1": "table.foo: there is no such key; allowed: title, base, seeds",
        "table=per_4 model.width=8": "model.width: there is no such key; allowed: norm, in_channels; for runs of other choices, which",
        "table=demo only=[x]": "only: no row or column has x in its name; allowed: ACC, CE, ITDM, ITDM-c, train, without",
    }
    for words, expected in asked.items():
        assert refused(*words.split(), task=table.run, root="tables").startswith(expected)


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ to write nonsense into."""
    copy = tmp_path / "conf"
    shutil.copytree(cli.CONF, copy)
    monkeypatch.setattr(cli, "CONF", copy)
    return copy


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("method/itdm_c", "wieght: 1", "method.itdm_c.wieght: regularizers.itdm.ITDM has no such option; allowed: weight, "),
        ("profile/paper", "epochs: lots", "profile.epochs: 'lots' is not allowed; it must be a number of at least 0 (in conf/profile/"),
        ("experiment/demo", "epochs: 3", "{conf}/experiment/demo.yaml, line {line}: found duplicate key epochs"),
    ],
)
def test_file(refused: Command, conf: Path, file: str, text: str, expected: str) -> None:
    with open(conf / f"{file}.yaml", "a") as handle:
        handle.write(f"{text}\n")
    line = len((conf / f"{file}.yaml").read_text().splitlines())
    assert refused("experiment=demo", "method=itdm_c").startswith(expected.format(conf=conf, line=line))


def test_table_file(refused: Command, conf: Path) -> None:
    (conf / "table" / "x.yaml").write_text("rows: [{lable: a}]")
    assert refused("table=x", task=table.run, root="tables").startswith("lable: there is no such key; allowed: label, overrides")


def test_a_copy_under_its_old_name_in_the_users_folder(refused: Command, tmp_path: Path) -> None:
    """It would be served the original's numbers."""
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = (cli.CONF / "model" / "net2c.yaml").read_text()
    (tmp_path / "mine" / "model" / "mine.yaml").write_text(text.replace("models.cnn.net2c", "'models.mine.net2c'"))
    assert "models.cnn.net2c and models.mine.net2c have the same name" in refused("--config-dir", f"{tmp_path}/mine", "model=net2c")


def test_runs_that_cannot_be_written(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for where in (f"{tmp_path}/file/runs", "/proc/nowhere"):
        assert refused(f"runtime.runs={where}").startswith(f"runtime.runs: {where} cannot be written (No")


def test_a_sweep_goes_on_after_bad_input(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "method=itdm_c", "method.itdm_c.weight=-1,0.5,-2"]
    monkeypatch.setattr(sys, "argv", ["retable", *words, *TINY, f"runtime.runs={runs}"])
    with pytest.raises(SystemExit) as end:
        cli.main(train.train, "config")
    out, err = capsys.readouterr()
    text = "retable: method.itdm_c.weight: {} is not allowed; it must be a number of at least 0\n"
    assert (end.value.code, err) == (2, text.format(-1) + text.format(-2))
    assert out.count("accuracy") == 1 and len(list(runs.glob("*/*/result.json"))) == 1


def test_a_bug_keeps_its_traceback(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def task(cfg: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sys, "argv", ["retable", f"runtime.runs={runs}"])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(task, "config")


def test_the_real_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "experiments.train", "method=itdm_c", "method.itdm_c.wieght=1", f"runtime.runs={tmp_path}/runs"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    expected = "method.itdm_c.wieght: there is no such key; allowed: weight, per_class, multipliers, bandwidth, baseline_second_forward"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"retable: {expected}\n")
    assert list(tmp_path.iterdir()) == []
