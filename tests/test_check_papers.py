"""Tests of the hours that the papers' tables would take, beside what is counted by hand, and by the code that trains them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from experiments.check import papers
from experiments.check.papers import Counted, Load, Rates, counted, hours
from experiments.cli import CONF
from experiments.compose import compose
from experiments.config import build
from experiments.spec import Table
from experiments.table import jobs

NET2C = 2 * (24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 100 + 100 * 10)  # two 5x5 convolutions, two linear layers
READ = 2 * 3 * (50 + 8) * 80_000  # images evaluated: at each epoch's end, and at eight of the last ten points, which are not one
CPU = Rates({"fp32": 1e10}, 0)


@pytest.fixture
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def of(*names: str, until: float = math.inf) -> Counted:
    """What is counted when the only paper has these tables, and a figure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(papers, "papers", lambda: {"mine": [*(("table", name) for name in names), ("figure", "itdm_1")]})
        return counted(until)


def asked(name: str) -> int:
    """How many runs the table's own command would ask for."""
    table = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Table), OmegaConf.load(CONF / "table" / f"{name}.yaml")))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return jobs(table, targets=False)["id"].nunique()


def test_hours_by_hand() -> None:
    """Of ITDM's first table: 18 runs of 50 epochs of 60,000 images, 150 at a time; half of the runs read two batches a step."""
    found = of("itdm_1")
    (row,) = hours(CPU, found)
    assert (row["paper"], row["tables"], row["left out"]) == ("mine", "1 of 1", "")
    assert row["runs"] == asked("itdm_1") == 18 and row["steps"] == 18 * 50 * 400
    training = 9 * 50 * 400 * 150 * (1 + 2) * 3 * NET2C  # forward and backward are three forwards
    assert row["hours"] == pytest.approx((training + READ * NET2C) / 1e10 / 3600)

    with initialize_config_dir(str(CONF), version_base="1.3"):
        net = build(compose(["experiment=itdm_grey_j"]).model, "model")(num_classes=10)  # computed, not on the meta device
    x, y = torch.zeros(3, 1, 28, 28), torch.zeros(3, dtype=torch.long)
    step = papers.calls(lambda: cross_entropy(net(x), y).backward())
    forward = 2 * 3 + 3  # twice convolution, ReLU, pool; a linear layer, ReLU, the classifier
    training = 9 * 50 * 400 * (3 * step + 2 * papers.OTHER_CALLS)
    (row,) = hours(Rates({"fp32": math.inf}, 1e-5), found)
    assert row["hours"] == pytest.approx((training + READ / 1000 * forward) * 1e-5 / 3600)


def test_hours_follow_the_rates() -> None:
    found = of("itdm_1")
    rates = ((1e12, 0), (math.inf, 1e-5), (1e12, 1e-5))
    arithmetic, calls, both = (hours(Rates({"fp32": flops}, call), found)[0]["hours"] for flops, call in rates)
    assert max(arithmetic, calls) <= both < arithmetic + calls  # whichever is longer, for each run
    flops = {"fp32": 1e10, "bf16": 4e10}
    assert [*hours(Rates(flops, 0), found)[0]] == ["paper", "tables", "runs", "steps", "hours", "left out"]
    (row,) = hours(Rates(flops, 0, 0), found)
    assert row["hours bf16 graph"] == pytest.approx(row["hours"] / 4)
    with pytest.raises(KeyError, match="fp32"):
        hours(Rates({"bf16": 4e10}, 0), found)


def test_a_graph_is_replayed_and_an_evaluation_is_not() -> None:
    load, rates = Load(100, 1, 10, 1, 20), Rates({"fp32": 1e6, "bf16": 1e6}, 3.0, 2.0)
    assert load.hours(rates, "fp32", graph=False) * 3600 == pytest.approx(100 * 10 * 3 + 20 * 3)
    assert load.hours(rates, "bf16", graph=True) * 3600 == pytest.approx(100 * 10 * 2 + 20 * 3)
    assert load.hours(rates._replace(replay=None), "fp32", graph=True) == load.hours(rates, "fp32", graph=False)


def test_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = hours(CPU, of("itdm_1", "itdm_mnist", until=0))
    assert row == {"paper": "mine", "tables": "0 of 2", "runs": 0, "steps": 0, "hours": 0, "left out": "itdm_1, itdm_mnist"}
    more = iter([True, False])
    monkeypatch.setattr(papers, "time_left", lambda until: next(more))
    (row,) = hours(CPU, of("itdm_1", "itdm_mnist"))
    assert (row["tables"], row["runs"], row["left out"]) == ("1 of 2", 6, "itdm_1")  # the smaller table comes first


@pytest.mark.slow
def test_runs_of_tables_that_share_some_or_try_choices() -> None:
    (row,) = hours(CPU, of("itdm_4", "itdm_lr"))
    assert row["runs"] == asked("itdm_4") + asked("itdm_lr") - 2 * 3  # two networks without ITDM, at the printed learning rate
    (row,) = hours(CPU, of("per_2"))
    assert row["runs"] == asked("per_2") == 33
    assert row["steps"] == 3 * 200 * (7 * 400 + 4 * 360)  # of 100,000 images, 250 at a time; four λ are tried without a tenth of them


def test_trials_hold_out_images(hydra: None) -> None:
    whole, held_out = (papers.load(("experiment=itdm_grey_j", *more), 1, 1) for more in ([], ["dataset.valid=0.1"]))
    assert held_out.read_flop == pytest.approx(1.6 * whole.read_flop) and held_out.read_calls == 1.6 * whole.read_calls  # 6,000 more
    assert held_out.steps == 0.9 * whole.steps


def test_words_of_a_language_model() -> None:
    (row,) = hours(CPU, of("per_strength_lm"))
    windows = -(-(929_589 // 20) // 35)
    assert (row["runs"], row["steps"]) == (10, 10 * 60 * windows)
    word = 2 * (2 * 2 * 650 * 4 * 650 + 650 * 10_000)  # two layers of two matrices, and the decoder
    training, reading = windows * 20 * 35 * 3 * word, (73_760 + 82_430) * word
    assert row["hours"] == pytest.approx(10 * 60 * (training + reading) / 1e10 / 3600)


def test_passes(hydra: None) -> None:
    """Forward-backward passes of a step, and steps on each batch."""
    made = {"vanilla": (1, 1), "vcl": (1, 1), "itdm_c": (2, 1), "[itdm_c,puzzlemix]": (4, 1), "lamix_puzzle": (1.5, 1)}
    assert {method: papers.passes((f"method={method}",)) for method in made} == made
    assert papers.passes(("method=itdm_c", "method.itdm_c.weight=0")) == (1, 1)  # inactive
    assert papers.passes(("method=lamix", "method.lamix.schedule=double")) == (1, 2)


def test_arithmetic_of_a_network_is_what_torch_counts(hydra: None) -> None:
    """Of images on the meta device; of a fused LSTM layer beside the loop over its words."""
    model = compose(["experiment=per_fixup"]).model
    flop, hidden, *_ = papers.work(OmegaConf.to_yaml(model), 3, 32, 32)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(model, "model")(num_classes=100)(torch.empty(2, 3, 32, 32))
    assert flop + 2 * hidden * 100 == pytest.approx(counter.get_total_flops() / 2)

    model = compose(["experiment=per_lstm", "model.width=20", "model.tie_embeddings=true"]).model
    flop, hidden, forward, backward = papers.work(OmegaConf.to_yaml(model), 35)
    with FlopCounterMode(display=False) as counter:
        build(model, "model")(num_classes=50, loop=True)(torch.zeros(2, 35, dtype=torch.long))
    assert flop + 2 * hidden * 50 == counter.get_total_flops() / 2
    assert 0 < forward < 35 < forward + backward + papers.OTHER_CALLS < 2 * 35
