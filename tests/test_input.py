"""Wrong input: one line on stderr that names the key, what was given and what is allowed; exit code 2; nothing is written."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import cli, table, train

ROOT = Path(__file__).resolve().parent.parent
TEXT = "experiment=per_lstm dataset=docs model.width=8"
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
    """Give a command bad input: it must end with exit code 2, one line, and no run's folder. Returns the line."""

    def call(*words: str, task: Callable = train.train, root: str = "config") -> str:
        asked = [word.split("=")[0] for word in words]
        common = [word for word in [*TINY, f"runtime.runs={runs}"] if root == "config" and word.split("=")[0] not in asked]
        if "dataset" in asked and "dataset.train" not in asked:
            common.remove("dataset.train=100")
        monkeypatch.setattr(sys, "argv", ["retable", *words, *common])
        with pytest.raises(SystemExit) as end:
            cli.main(task, root)
        out, err = capsys.readouterr()
        assert end.value.code == 2, err
        assert err.startswith("retable: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert not any(path.is_dir() for path in runs.glob("*"))
        assert out == ""
        return err.removeprefix("retable: ").rstrip("\n")

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # unknown names
        ("dataset=foo", "dataset: 'foo' is not known; allowed: cifar10, cifar100, digits, docs, fmnist"),
        ("model=foo", "model: 'foo' is not known; allowed: cnn11, densenet121, lenet, lstm, mobilenet, net2c, net5c, preact_resnet110, "),
        ("method=foo", "method: 'foo' is not known; allowed: cutmix, itdm_c, itdm_j"),
        ("method=[itdm_c,foo]", "method: 'foo' is not known; allowed: cutmix, itdm_c, itdm_j"),
        ("norm=foo", "norm: 'foo' is not known; allowed: bn, gn, none"),
        ("schedule=foo", "schedule: 'foo' is not known; allowed: constant, plateau, steps"),
        ("profile=foo", "profile: 'foo' is not known; allowed: paper, reduced, short, smoke"),
        ("experiment=foo", "experiment: 'foo' is not known; allowed: demo"),
        # misspelt keys
        ("dataset.foo=1", "dataset.foo: there is no such key; allowed: train"),
        ("model.foo=1", "model.foo: there is no such key; allowed: norm, in_channels"),
        ("norm=gn norm.foo=1", "norm.foo: there is no such key; allowed: num_groups"),
        ("method=itdm_c method.itdm_c.wieght=1", "method.itdm_c.wieght: there is no such key; allowed: weight, per_class"),
        ("method.itdm_c.weight=1", "method.itdm_c: it has options but is not chosen; add method=itdm_c"),
        ("schedule.foo=1", "schedule.foo: there is no such key; allowed: at, factor"),
        ("optim.lrr=1", "optim.lrr: there is no such key; allowed: lr, momentum, nesterov, weight_decay"),
        ("evaluate.foo=1", "evaluate.foo: there is no such key; allowed: every, dense, batch_size"),
        ("profile.foo=1", "profile.foo: there is no such key; allowed: name, epochs"),
        ("runtime.foo=1", "runtime.foo: there is no such key; allowed: device, devices, runs_per_device"),
        ("epocs=3", "epocs: there is no such key; allowed: dataset, model"),
        # the same with Hydra's signs for adding, forcing and deleting
        ("+dataset.foo=1", "dataset.foo: data.images.digits has no such option; allowed: data_dir"),
        ("++method.itdm_c.weight=1", "method.itdm_c: it has options but is not chosen; add method=itdm_c"),
        ("+optim.lrr=1", "optim.lrr: there is no such key; allowed: lr, momentum, nesterov, weight_decay"),
        ("++epocs=1", "epocs: there is no such key; allowed: dataset, model"),
        ("~optim", "optim: it is missing"),
        ("~model", "model: nothing is chosen; name a file of conf/model"),
        # values
        ("optim.lr=fast", "optim.lr: 'fast' is not allowed; it must be a number above 0"),
        ("optim.lr=0", "optim.lr: 0.0 is not allowed; it must be a number above 0"),
        ("optim.lr=nan", "optim.lr: nan is not allowed; it must be a number above 0"),
        ("optim.momentum=1", "optim.momentum: 1.0 is not allowed; it must be a number from 0 to below 1"),
        ("optim=3", "optim: 3 is not allowed; it must be a mapping"),
        ("epochs=-1", "epochs: -1 is not allowed; it must be a whole number of at least 1"),
        ("epochs=3.5", "epochs: '3.5' is not allowed; it must be a whole number of at least 1"),
        ("epochs=null", "epochs: null is not allowed; it must be a whole number of at least 1"),
        ("epochs=", "epochs: '' is not allowed; it must be a whole number of at least 1"),
        ("batch_size=0", "batch_size: 0 is not allowed; it must be a whole number of at least 1"),
        ("seed=-1", "seed: -1 is not allowed; it must be a whole number from 0"),
        ("balanced=maybe", "balanced: 'maybe' is not allowed; it must be true or false"),
        ("precision=fp64", "precision: fp64 is not allowed; it must be fp32, tf32, bf16"),
        ("runtime.device=tpu", "runtime.device: tpu is not allowed; it must be auto, cpu, cuda, cuda:N"),
        ("method=itdm_c method.itdm_c.weight=nan", "method.itdm_c.weight: nan is not allowed; it must be a finite number"),
        ("method=itdm_c method.itdm_c.weight=inf", "method.itdm_c.weight: inf is not allowed; it must be a finite number"),
        ("method=itdm_c method.itdm_c.weight=-1", "method.itdm_c.weight: -1 is not allowed; it must be a number of at least 0"),
        ("method=itdm_c method.itdm_c.weight=much", "method.itdm_c.weight: much is not allowed; it must be a number"),
        ("method=itdm_c method.itdm_c.weight=null", "method.itdm_c.weight: None is not allowed; it must be a number"),
        ("method=itdm_c method.itdm_c.per_class=1", "method.itdm_c.per_class: 1 is not allowed; it must be true or false"),
        ("method=itdm_c method.itdm_c.multipliers=[1,x]", "method.itdm_c.multipliers: [1, 'x'] is not allowed; it must be a list"),
        ("method=label_smoothing method.label_smoothing.smoothing=2", "method.label_smoothing: smoothing: 2"),
        ("schedule.at=foo", "schedule.at: foo is not allowed; it must be a list, each a number"),
        ("schedule.at=3", "schedule.at: 3 is not allowed; it must be a list, each a number"),
        ("schedule.factor=true", "schedule.factor: True is not allowed; it must be a number"),
        ("dataset.train=x", "dataset.train: x is not allowed; it must be a whole number or null"),
        ("dataset.train=0", "dataset: dataset.train=0: choose"),
        ("runtime.download=maybe", "runtime.download: maybe is not allowed; it must be true, false, or a list of mirrors' URLs"),
        ("runtime.download=[ftp:/x]", "runtime.download: ['ftp:/x'] is not allowed; it must be true, false, or a list"),
        ("runtime.time_limit=0", "runtime.time_limit: 0.0 is not allowed; it must be a number above 0"),
        ("runtime.time_limit=nan", "runtime.time_limit: nan is not allowed; it must be a number above 0"),
        ("step=fast", "step: fast is not allowed; it must be eager, graph"),
        ("step=graph runtime.device=cpu", "step: graph needs a GPU; allowed here: eager"),
        ("compile=maybe", "compile: 'maybe' is not allowed; it must be true or false"),
        ("dataset=cifar10 dataset.source=embedded", "model: models.cnn.net2c does not take the data set's 3x32x32 images (Given groups=1"),
        (
            "dataset=cifar10 dataset.source=embedded model=vgg13 dataset.size=16",
            "model: models.vgg.vgg13 does not take",
        ),
        ("dataset=cifar10 dataset.source=embedded dataset.size=0", "dataset: dataset.size=0: choose"),
        ("dataset=cifar10 dataset.source=embedded dataset.flip=1", "dataset.flip: 1 is not allowed; it must be true or false"),
        ("dataset=cifar10 dataset.source=embedded dataset.padding=-1", "dataset: dataset.padding=-1: choose 0 to 32 pixels"),
        ("dataset=cifar10 runtime.data_dir=nowhere", "dataset: cifar10 is not under nowhere (looked for cifar-10-batches-py"),
        # text where images are meant, and the other way round
        ("model=lstm norm=none", "model: models.lstm.lstm does not take the data set's 1x28x28 images"),
        ("experiment=per_lstm dataset=docs model=net2c", "model: models.cnn.net2c does not take the data set's 35 words"),
        (f"{TEXT} method=itdm_c", "method: itdm_c is for samples of one label each, and here every one of the words has its own"),
        (f"{TEXT} method=[per,itdm_j]", "method: itdm_j is for samples of one label each"),
        (f"{TEXT} method=vcl", "method: vcl is for samples of one label each"),
        (f"{TEXT} balanced=true", "balanced: true is not allowed for text, whose words stay in their order; it must be false"),
        (f"{TEXT} batch_size=900 profile.train=800", "batch_size: 900 is not allowed for 799 words; it must be at most that"),
        (f"{TEXT} dataset.bptt=0", "dataset: dataset.bptt=0: choose a whole number of at least 1"),
        (f"{TEXT} norm=gn", "model: norm: GroupNorm does not go into an LSTM; allowed: none, rbn"),
        (f"{TEXT} model.p_i=1", "model: p_i: 1 is not allowed; it must be a number from 0 to below 1"),
        (f"{TEXT} model.recurrent_mask=none", "model: recurrent_mask: 'none' is not known; allowed: rows, shared"),
        ("norm=rbn", "model: models.cnn.net2c does not take the data set's 1x28x28 images (norm=rbn is for recurrent networks)"),
        ("schedule=plateau", "schedule: plateau goes by a split `valid`, which the data set lacks; set dataset.valid"),
        ("norm=gn norm.num_groups=3", "model: num_groups: 3 does not divide the 20 channels of a layer"),
        # no override at all
        ("dataset", "'dataset' is not KEY=VALUE"),
        ("epochs=[", "'epochs=[' is not KEY=VALUE"),
        ("norm=null", "Config group override must be a string or a list"),
        ("method=itdm_c,itdm_j", "Ambiguous value for argument 'method=itdm_c,itdm_j'"),
        # targets
        ("dataset._target_=os.system", "dataset._target_: os.system is not allowed; it must start with data., models."),
        ("model._target_=builtins.eval", "model._target_: builtins.eval is not allowed"),
        ("+method.x._target_=subprocess.run", "method.x._target_: subprocess.run is not allowed"),
        ("+model.norm.inner._target_=os.system", "model.norm.inner._target_: os.system is not allowed"),
        ("model._target_=models.cnn.nope", "model._target_: models.cnn.nope cannot be imported (module 'models.cnn' has no"),
        ("model._target_=models.nope.nope", "model._target_: models.nope.nope cannot be imported (No module named 'models.nope')"),
        ("-m epochs=-1", "epochs: -1 is not allowed; it must be a whole number of at least 1"),
    ],
)
def test_command_line(refused: Command, words: str, expected: str) -> None:
    assert refused(*words.split()).startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "table: nothing is chosen; allowed: demo"),
        ("table=foo", "table: 'foo' is not known; allowed: demo"),
        ("table=demo table.foo=1", "table.foo: there is no such key; allowed: title, base, seeds"),
        ("table=demo launch=maybe", "launch: 'maybe' is not allowed; it must be true or false"),
        (
            "table=per_4 model.width=8",
            "model.width: there is no such key; allowed: norm, in_channels; for runs of other choices, which have it: ++model.width=...",
        ),
        ("table=demo only=[x]", "only: no row or column has x in its name; allowed: ACC, CE, ITDM, ITDM-c, train, without"),
        ("table=demo epochs=-1", "epochs: -1 is not allowed"),
        ("table=demo epocs=1", "epocs: there is no such key"),
        ("table=demo +optim.lrr=1", "optim.lrr: there is no such key"),
        ("table=demo norm=foo", "norm: 'foo' is not known"),
    ],
)
def test_table_command_line(refused: Command, runs: Path, words: str, expected: str) -> None:
    options = [f"runtime.runs={runs}", f"out={runs}/tables"]
    assert refused(*words.split(), *options, task=table.run, root="tables").startswith(expected)


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
        ("dataset/digits", "foo: 1", "dataset.foo: data.images.digits has no such option; allowed: "),
        ("model/net2c", "foo: 1", "model.foo: models.cnn.net2c has no such option; allowed: num_classes, norm, in_channels"),
        ("norm/bn", "foo: 1", "model.norm.foo: models.norm.BatchNorm has no such option; allowed: "),
        ("schedule/steps", "foo: 1", "schedule.foo: experiments.optim.steps has no such option; allowed: "),
        ("method/itdm_c", "wieght: 1", "method.itdm_c.wieght: regularizers.itdm.ITDM has no such option; allowed: weight, "),
        ("profile/paper", "foo: 1", "profile.foo: there is no such key; allowed: name, epochs"),
        ("experiment/demo", "epocs: 1", "epocs: there is no such key; allowed: "),
        (
            "experiment/demo",
            "runtime: {treads: 1}",
            "runtime.treads: there is no such key; allowed: device, devices, runs_per_device",
        ),
        ("experiment/demo", "seed: many", "seed: 'many' is not allowed; it must be a whole number from 0 "),
        ("config", "epocs: 1", "epocs: there is no such key; allowed: "),
        ("groups", "epocs: 1", "epocs: there is no such key; allowed: "),
        ("method/itdm_c", "more: ]", "{conf}/method/itdm_c.yaml, line {line}: "),
        ("experiment/demo", "epochs: 3", "{conf}/experiment/demo.yaml, line {line}: found duplicate key epochs"),
    ],
)
def test_file(refused: Command, conf: Path, file: str, text: str, expected: str) -> None:
    with open(conf / f"{file}.yaml", "a") as handle:
        handle.write(f"{text}\n")
    line = len((conf / f"{file}.yaml").read_text().splitlines())
    assert refused("experiment=demo", "method=itdm_c").startswith(expected.format(conf=conf, line=line))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colums: {}", "table.colums: there is no such key; allowed: title, base, seeds"),
        ("columns: {A: {metrc: a}}", "table.columns.A.metrc: there is no such key; allowed: metric, overrides"),
        ("rows: [{lable: a}]", "lable: there is no such key; allowed: label, overrides"),
        ("claims: [{foo: a}]", "foo: there is no such key; allowed: says, metric"),
        ("seeds: [a]", "table.seeds[0]: 'a' is not allowed; it must be a whole number"),
        ("title: [a", "{conf}/table/x.yaml, line 2: expected ',' or ']'"),
    ],
)
def test_table_file(refused: Command, conf: Path, runs: Path, text: str, expected: str) -> None:
    (conf / "table" / "x.yaml").write_text(f"{text}\n")
    options = [f"runtime.runs={runs}", f"out={runs}/tables"]
    assert refused("table=x", *options, task=table.run, root="tables").startswith(expected.format(conf=conf))


def test_the_file_is_named(refused: Command, conf: Path) -> None:
    with open(conf / "profile" / "paper.yaml", "a") as handle:
        handle.write("epochs: lots\n")
    assert refused() == "profile.epochs: 'lots' is not allowed; it must be a number of at least 0 (in conf/profile/paper.yaml)"


def test_target_in_a_file(refused: Command, conf: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (conf / "dataset" / "evil.yaml").write_text(f"_target_: os.system\ncommand: touch {mark}\n")
    assert refused("dataset=evil").startswith("dataset._target_: os.system is not allowed")
    assert not mark.exists()


def test_no_data(refused: Command, tmp_path: Path) -> None:
    line = refused("dataset=kmnist", f"runtime.data_dir={tmp_path}/nowhere")
    assert f"kmnist is not under {tmp_path}/nowhere" in line and "runtime.download=true" in line


def test_truncated_archive(refused: Command, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60000), ("t10k", 10000)):
        images = struct.pack(">IIII", 2051, count, 28, 28) + bytes(1000)
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">II", 2049, count) + bytes(count)))
    line = refused("dataset=kmnist", f"runtime.data_dir={tmp_path}/data")
    assert line.startswith("dataset: kmnist: the official archive in") and "cannot be read" in line


def test_parquet_without_its_column(refused: Command, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    (tmp_path / "data" / "kmnist").mkdir(parents=True)
    for part in ("train", "test"):
        write_table(pa.table({"picture": [1, 2], "label": [0, 1]}), tmp_path / "data" / "kmnist" / f"{part}.parquet")
    line = refused("dataset=kmnist", f"runtime.data_dir={tmp_path}/data")
    assert "kmnist/train.parquet: wanted img or image" in line and "found picture (int64), label (int64)" in line


@pytest.mark.parametrize("where", ["{tmp}/file/runs", "/proc/nowhere"])
def test_runs_that_cannot_be_written(refused: Command, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    where = where.format(tmp=tmp_path)
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


def test_options_lists_what_a_group_offers() -> None:
    from experiments.config import options

    assert options("norm") == ["bn", "gn", "none", "rbn", "unitization"]
    assert all(OmegaConf.load(cli.CONF / "norm" / f"{name}.yaml")["_target_"] for name in options("norm"))


def test_the_real_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "experiments.train", "method=itdm_c", "method.itdm_c.wieght=1", f"runtime.runs={tmp_path}/runs"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    expected = "method.itdm_c.wieght: there is no such key; allowed: weight, per_class, multipliers, bandwidth, baseline_second_forward"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"retable: {expected}\n")
    assert list(tmp_path.iterdir()) == []
