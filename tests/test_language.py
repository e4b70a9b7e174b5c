"""Language models in the trainer: windows in order, the state between them, evaluation, perplexity, the schedule, resumes."""

from __future__ import annotations

import copy
import io
import math

import hydra
import pytest
import torch
from device_steps import step_calls
from nets import small
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainers import config, data_home, parameters, same, train, trainer, watch

from data.bundle import Batch
from experiments.board import settings
from experiments.cli import CONF
from experiments.metrics import perplexity
from experiments.optim import plateau
from experiments.trainer import Trainer

__all__ = ["data_home"]  # a fixture
TEXT = [*small("lstm"), "model.variational_dropout=false"]


def test_per_s_protocol() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", ["experiment=per_lstm"])
    grids = {row.label: [*row.get("grid", {}).values()] for row in OmegaConf.load(CONF / "table" / "per_4.yaml")["rows"]}
    assert [cfg.epochs, cfg.batch_size, cfg.dataset.bptt, cfg.evaluate.batch_size, cfg.balanced] == [60, 20, 35, 10, False]
    assert [cfg.optim[key] for key in ("lr", "momentum", "weight_decay", "clip", "clip_each")] == [20, 0, 0, 0.25, False]
    assert (cfg.schedule.factor, cfg.evaluate.every, cfg.precision) == (0.25, None, "fp32")
    assert [cfg.model[key] for key in ("width", "p_e", "p_i", "p_h", "p_o", "recurrent_mask")] == [650, 0.2, 0.5, 0.2, 0.5, "rows"]
    assert not (cfg.model.tie_embeddings or cfg.model.variational_dropout or cfg.model.loop)
    assert len(grids) == 20 and {label: grid for label, grid in grids.items() if grid} == {
        f"{net} {method}": [[3e-4, 1e-4, 3e-5]] for net in ("LSTM", "RE-LSTM", "VD-LSTM", "RE-VD-LSTM") for method in ("L1", "L2", "PER")
    }


def test_an_epoch_is_the_text_in_columns_and_starts_without_a_state() -> None:
    made, starts = trainer(*TEXT, "profile.train=236", "batch_size=5", "dataset.bptt=9"), iter([*range(0, 47, 9)] * 2)
    x, y = (words.view(5, 47) for words in made.bundle.splits["train"])  # 235 words to follow, 47 in each column

    def see(batch: Batch, _: Batch | None) -> None:
        start, state = next(starts), made.net.features.states.get(True)
        assert (state is not None and bool(state.any())) == (start > 0)
        assert torch.equal(batch.x, x[:, start : start + 9]) and torch.equal(batch.y, y[:, start : start + 9])

    watch(made, see)
    made.train_epoch()
    made.train_epoch()
    assert not [*starts] and made.length.full == 6


def test_a_step_is_the_sgd_of_the_books() -> None:
    """Against float64 and autograd over the whole window from the carried state, with the norm of all gradients together clipped."""
    made = trainer(*TEXT, "optim.lr=5", "optim.momentum=0", "optim.clip=0.1", "schedule=constant")
    net = copy.deepcopy(made.net).double()
    norms = []

    def step(batch: Batch, _: Batch | None) -> None:
        logits = net(batch.x).flatten(0, 1)
        ce = (logits.exp().sum(1).log() - logits.gather(1, batch.y.reshape(-1, 1))[:, 0]).mean()
        gradients = torch.autograd.grad(ce, list(net.parameters()))
        norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
        for value, gradient in zip(net.parameters(), gradients, strict=True):
            value.data -= 5 * gradient * min(1, 0.1 / norms[-1])

    watch(made, step)
    for _ in range(2):
        made.train_epoch()
        net.reset()
    assert len(norms) == 4 and max(norms) > 0.1
    assert made.net.classifier.weight is made.net.features.embedding.weight  # tied, and yet stepped once
    for name, value in net.named_parameters():
        torch.testing.assert_close(made.net.get_parameter(name).double(), value, rtol=1e-4, atol=1e-5)


def test_a_step_has_few_calls_and_does_not_wait_for_the_device() -> None:
    """As many calls for a long window as for a short one, unless the window is stepped through."""

    def calls(*more: str) -> list[int]:
        return [len(step_calls(*TEXT, f"dataset.bptt={length}", "profile.train=400", *more)[0].kernels) for length in (5, 20)]

    whole, update = step_calls(*small("lstm"), "method=[l1,l2]", "precision=bf16", "optim.clip=0.25")
    assert whole.waits == [] and "aten.bernoulli_.float" in whole.names and 0 < len(update.names) <= 6
    short, long = calls()
    looped = calls("model.loop=true")
    assert looped[1] > 2 * looped[0] > 2 * short
    variational = calls("model.variational_dropout=true", "model.recurrent_mask=shared")
    assert variational[1] - variational[0] == long - short


def test_methods_see_the_states_of_both_layers() -> None:
    """PER, L1 and L2 add their gradients to every step of every row (protocol sheet, 1.1.5), as an explicit loss would."""
    made = trainer(*TEXT, "method=[l1,l2]", "method.l1.weight=0.01", "method.l2.weight=0.02")
    made.net.double()
    made.net.reset()
    batch = Batch(*(next(iter(made.bundle.batches("train", 10))).x[:, part] for part in (slice(0, 4), slice(1, 5), slice(1, 5))))
    made.loss(batch, None)[0].backward()
    net = trainer(*TEXT).net.double()
    taps: list[Tensor] = []
    for tap in net.features.taps:
        tap.register_forward_hook(lambda tap, _, out: taps.append(out))
    loss = cross_entropy(net(batch.x).flatten(0, 1), batch.y.flatten())
    loss = loss + sum(0.01 * h.abs().sum() + 0.02 * h.square().sum() for h in taps)
    for parameter, wanted in zip(made.net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-8)


def test_evaluation_by_hand() -> None:
    """Against float64, column after column and word after word."""
    made = train(*small("lstm"), "optim.lr=5", epochs=1)
    net = copy.deepcopy(made.net).double().eval()
    for split, columns in (("valid", 1), ("test", 4)):
        x, y = made.bundle.splits[split]
        length = len(y) // columns
        loss, right = 0.0, 0
        for column in range(columns):
            net.reset()
            for place in range(column * length, (column + 1) * length):
                logits = net(x[place].view(1, 1))[0, 0].tolist()
                loss += math.log(math.fsum(map(math.exp, logits))) - logits[int(y[place])]
                right += logits.index(max(logits)) == int(y[place])
        made.cfg.evaluate.batch_size, ce = columns, loss / (columns * length)
        wanted = {"ce": ce, "accuracy": 100 * right / (columns * length), "perplexity": math.exp(ce)}
        metrics = made.evaluate(split)
        assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert made.rows[0]["train/perplexity"] == pytest.approx(math.exp(made.rows[0]["train/ce"]))
    assert [perplexity(ce) for ce in (0.0, 1e4, math.inf)] == [1, math.inf, math.inf] and math.isnan(perplexity(math.nan))


def test_evaluating_within_an_epoch_changes_nothing() -> None:
    words = [*small("lstm"), "profile.train=400", "method=per", "optim.lr=5"]
    plain, often = train(*words), train(*words, "evaluate.every=2", "evaluate.dense=99")
    assert len(often.rows) > len(plain.rows) and same(parameters(plain), parameters(often))
    assert plain.rows[-1]["valid/ce"] == often.rows[-1]["valid/ce"]


def test_plateau_goes_by_the_best_so_far() -> None:
    """Not by the epoch before (protocol sheet, T15): 4.5 is below 5.0 and yet no best."""
    losses = [5.0, 4.0, 5.0, 4.5, 3.9, 3.9, 3.8]
    assert [plateau(0, 0, losses[:count], 0.25) for count in range(8)] == [1, 1, 1, 1 / 4, 1 / 16, 1 / 16, 1 / 64, 1 / 64]
    assert plateau(9, 99, [], 0.5) == 1 and plateau(0, 0, [math.nan], 0.25) == 0.25
    with pytest.raises(ValueError, match=r"^plateau goes by a split `valid`"):
        plateau(0, 0, None, 0.25)


def test_the_rate_falls_where_validation_stalls_also_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(made: Trainer, losses: list[float]) -> None:
        left, evaluate = iter(losses), made.evaluate
        monkeypatch.setattr(made, "evaluate", lambda split: evaluate(split) | ({"ce": next(left)} if split == "valid" else {}))

    words = [*TEXT, "schedule=plateau", "optim.lr=8", "epochs=6", "evaluate.every=1", "evaluate.dense=3"]
    losses = [5.0, 5.5, 4.0, 4.0, 3.0, 2.9, 1.0]  # of each epoch's end; the last but one is measured within an epoch
    whole, resumed, file = trainer(*words), trainer(*words), io.BytesIO()
    script(whole, losses)
    for _ in range(3):
        whole.train_epoch()
    torch.save(whole.state(), file)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True))
    script(resumed, losses[3:])
    for made in (whole, resumed):
        for _ in range(3):
            made.train_epoch()
        rates = {row["epoch"]: row["lr"] for row in made.rows}
        assert [rates[float(epoch)] for epoch in range(1, 7)] == [8, 8, 2, 2, 0.5, 0.5]
        assert made.history() == [5.0, 5.5, 4.0, 4.0, 3.0, 1.0] and len(made.rows) == 7


def test_the_board_tells_networks_apart() -> None:
    values = settings(config(*small("lstm")))
    assert (values["model"], values["model.tie_embeddings"], values["model.width"], values["model.p_i"]) == ("lstm", True, 8, 0.5)
    assert not any("_target_" in key or "_partial_" in key for key in values)
