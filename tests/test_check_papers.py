"""What the papers' tables would take on a device, beside what is counted by hand, and by the code that trains them."""

from __future__ import annotations

import math

import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench.counts import count, forward_gflop
from experiments.check import papers
from experiments.check.papers import Load, Rates, counted, hours
from experiments.cli import CONF
from experiments.config import build
from experiments.launch import compose
from experiments.spec import Table
from experiments.table import jobs

NET2C = 2 * (24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 100 + 100 * 10)  # two 5x5 convolutions, two linear layers
TEST_IMAGES = {"qmnist": 60_000, "kmnist": 10_000, "fmnist": 10_000}
CPU = Rates({"fp32": 1e10}, 0)


def of(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The one paper has these tables, and a figure."""
    monkeypatch.setattr(papers, "papers", lambda: {"mine": [*(("table", name) for name in names), ("figure", "itdm_1")]})


def config(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(words)


def asked(name: str) -> int:
    """How many runs the table's own command would ask for."""
    table = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Table), OmegaConf.load(CONF / "table" / f"{name}.yaml")))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return jobs(table, targets=False)["id"].nunique()


def test_hours_of_arithmetic_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, "itdm_1")
    (row,) = hours(CPU, counted(math.inf))
    assert (row["paper"], row["tables"], row["left out"]) == ("mine", "1 of 1", "")
    assert row["runs"] == asked("itdm_1") == 18
    assert row["steps"] == 18 * 50 * 400  # 50 epochs of 60,000 images, 150 at a time
    training = 9 * 50 * 400 * 150 * (1 + 2) * 3 * NET2C  # half of the runs read two batches a step; forward and backward are three forwards
    evaluations = 50 + 8  # each epoch's end, and of the last ten points 50 steps apart the eight that are none
    reading = 2 * 3 * evaluations * sum(TEST_IMAGES.values()) * NET2C
    assert row["hours"] == pytest.approx((training + reading) / 1e10 / 3600)


def test_hours_of_calls_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, "itdm_1")
    net = build(config("experiment=itdm_grey_j").model, "model")(num_classes=10)  # computed, not on the meta device
    x, y = torch.zeros(3, 1, 28, 28), torch.zeros(3, dtype=torch.long)
    step, _ = count(lambda: cross_entropy(net(x), y).backward())
    training = 9 * 50 * 400 * (3 * step + 2 * papers.OTHER_CALLS)
    forward = 2 * 3 + 3  # twice convolution, ReLU, pool; a linear layer, ReLU, the classifier
    reading = 2 * 3 * 58 * sum(TEST_IMAGES.values()) / 1000 * forward
    (row,) = hours(Rates({"fp32": math.inf}, 1e-5), counted(math.inf))
    assert row["hours"] == pytest.approx((training + reading) * 1e-5 / 3600)


def test_hours_follow_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, "itdm_1")

    def taken(flops: float, call: float) -> float:
        return float(hours(Rates({"fp32": flops}, call), counted(math.inf))[0]["hours"])

    assert taken(2e10, 0) == pytest.approx(taken(1e10, 0) / 2)
    assert taken(math.inf, 2e-5) == pytest.approx(2 * taken(math.inf, 1e-5))
    arithmetic, calls = taken(1e12, 0), taken(math.inf, 1e-5)
    assert max(arithmetic, calls) <= taken(1e12, 1e-5) < arithmetic + calls  # whichever is longer, for each run


def test_bf16_and_graph_where_there_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, "itdm_1")
    (only,) = hours(Rates({"fp32": 1e10, "bf16": 4e10}, 0), counted(math.inf))
    assert [*only] == ["paper", "tables", "runs", "steps", "hours", "left out"]
    (row,) = hours(Rates({"fp32": 1e10, "bf16": 4e10}, 0, 0), counted(math.inf))
    assert row["hours bf16 graph"] == pytest.approx(row["hours"] / 4)
    with pytest.raises(KeyError, match="fp32"):
        hours(Rates({"bf16": 4e10}, 0), counted(math.inf))


def test_a_graph_is_replayed_and_an_evaluation_is_not() -> None:
    load, rates = Load(100, 1, 10, 1, 20), Rates({"fp32": 1e6, "bf16": 1e6}, 3.0, 2.0)
    assert load.hours(rates, "fp32", graph=False) * 3600 == pytest.approx(100 * 10 * 3 + 20 * 3)
    assert load.hours(rates, "bf16", graph=True) * 3600 == pytest.approx(100 * 10 * 2 + 20 * 3)
    assert load.hours(rates._replace(replay=None), "fp32", graph=True) == load.hours(rates, "fp32", graph=False)


def test_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, "itdm_1", "itdm_mnist")
    (row,) = hours(CPU, counted(0))
    assert row == {"paper": "mine", "tables": "0 of 2", "runs": 0, "steps": 0, "hours": 0, "left out": "itdm_1, itdm_mnist"}
    more = iter([True, False])
    monkeypatch.setattr(papers, "time_left", lambda until: next(more))
    (row,) = hours(CPU, counted(math.inf))
    assert (row["tables"], row["runs"], row["left out"]) == ("1 of 2", 6, "itdm_1")  # the smaller one comes first


def test_runs_of_two_tables_count_once_however_they_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, "itdm_4", "itdm_lr")
    (row,) = hours(CPU, counted(math.inf))
    assert row["runs"] == asked("itdm_4") + asked("itdm_lr") - 2 * 3  # two networks without ITDM, at the printed learning rate


def test_trials_hold_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, "per_2")
    (row,) = hours(CPU, counted(math.inf))
    assert row["runs"] == asked("per_2") == 33
    assert row["steps"] == 3 * 200 * (7 * 400 + 4 * 360)  # of 100,000 images, 250 at a time; four λ are tried without a tenth of them
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole, held_out = (papers.load(("experiment=itdm_grey_j", *more), 1, 1) for more in ([], ["dataset.valid=0.1"]))
    assert held_out.read_flop == pytest.approx(1.6 * whole.read_flop) and held_out.read_calls == 1.6 * whole.read_calls  # 6,000 more


def test_words_of_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, "per_strength_lm")
    (row,) = hours(CPU, counted(math.inf))
    windows = -(-(929_589 // 20) // 35)
    assert (row["runs"], row["steps"]) == (10, 10 * 60 * windows)
    word = 2 * (2 * 2 * 650 * 4 * 650 + 650 * 10_000)  # two layers of two matrices, and the decoder
    training, reading = windows * 20 * 35 * 3 * word, (73_760 + 82_430) * word
    assert row["hours"] == pytest.approx(10 * 60 * (training + reading) / 1e10 / 3600)


@pytest.mark.parametrize(
    ("method", "number", "repeats"),
    [
        (["vanilla"], 1, 1),
        (["vcl"], 1, 1),
        (["itdm_c", "method.itdm_c.weight=0"], 1, 1),  # inactive
        (["itdm_c"], 2, 1),
        (["puzzlemix"], 2, 1),
        (["[itdm_c,puzzlemix]"], 4, 1),
        (["lamix_puzzle"], 1.5, 1),
        (["lamix", "method.lamix.schedule=double"], 1, 2),
    ],
)
def test_passes(method: list[str], number: float, repeats: int) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert papers.passes((f"method={method[0]}", *method[1:])) == (number, repeats)


def test_arithmetic_of_a_network_is_what_torch_counts() -> None:
    cfg = config("experiment=per_fixup")
    flop, hidden, *_ = papers.work(OmegaConf.to_yaml(cfg.model), 3, 32, 32)
    assert flop + 2 * hidden * 100 == pytest.approx(1e9 * forward_gflop(cfg, (2, 3, 32, 32), 100) / 2)


def test_arithmetic_of_a_fused_layer_is_that_of_the_loop() -> None:
    cfg = config("experiment=per_lstm", "model.width=20", "model.tie_embeddings=true")
    flop, hidden, forward, backward = papers.work(OmegaConf.to_yaml(cfg.model), 35)
    net = build(cfg.model, "model")(num_classes=50, loop=True)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 35, dtype=torch.long))
    assert flop + 2 * hidden * 50 == counter.get_total_flops() / 2
    assert 0 < forward < 35 < forward + backward + papers.OTHER_CALLS < 2 * 35
