"""The unitization layer, against its definition in float64 sample by sample, torch's batch normalisation, and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from nets import IMAGE, composed, small
from test_trainer import data_home, train
from torch import Tensor, nn

from experiments.config import options
from models.unitization import Unitization, practical

__all__ = ["data_home"]  # a fixture
torch.set_num_threads(1)
EPS = 1e-3
SIZES = [(4, 3, 5, 6), (6, 3), (2, 3, 7)]
both = pytest.mark.parametrize("size", SIZES, ids=str)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(channels: int = 3, seed: int = 0, **options: float | str) -> Unitization:
    """In float64, with all parameters off their start, alpha on both sides of [0, 1]."""
    made = Unitization(channels, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.alpha.copy_(torch.tensor([-0.7, 0.4, 1.9, 0.0, 1.0])[:channels])
        made.weight.copy_(torch.randn(channels, generator=rng(seed)) + 2)
        made.bias.copy_(torch.randn(channels, generator=rng(seed + 1)))
    return made


def images(size: tuple[int, ...], seed: int = 7) -> Tensor:
    x = torch.randn(*size, generator=rng(seed), dtype=torch.float64) * 2
    return x + torch.arange(size[1]).view(-1, *[1] * (len(size) - 2))


def by_hand(made: Unitization, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The definition, one sample and channel at a time."""
    pixels = math.prod(x.shape[2:])
    scale = {"hw2": pixels**2, "none": 1, "chw": x.shape[1] * pixels}[made.norm_scale]
    out = torch.empty_like(x)
    for n in range(len(x)):
        z = [(x[n, c] - mean[c]) / math.sqrt(var[c] + made.eps) for c in range(x.shape[1])]
        q = sum(float(one.square().sum()) for one in z) / scale
        for c, one in enumerate(z):
            a = made.alpha[c].item() / math.sqrt(q + made.eps) + 1 - made.alpha[c].item()
            out[n, c] = made.weight[c].item() * a * one + made.bias[c].item()
    return out


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and variance with the code's correction, of each channel."""
    values = x.transpose(0, 1).flatten(1)
    n = values.shape[1]
    return values.mean(1), values.var(1, correction=0) * n / (n - 1 - EPS)


@both
@pytest.mark.parametrize("norm_scale", ["hw2", "none", "chw"])
def test_the_definition(size: tuple[int, ...], norm_scale: str) -> None:
    made, x = layer(norm_scale=norm_scale), images(size)
    torch.testing.assert_close(made(x), by_hand(made, x, *statistics(x)), rtol=1e-12, atol=1e-12)
    mean, var = statistics(x)
    torch.testing.assert_close(made.running_mean, 0.01 * mean)  # momentum 0.99 in Keras' words
    torch.testing.assert_close(made.running_var, 0.99 + 0.01 * var)
    made.eval()
    other = images(size, 8)
    torch.testing.assert_close(made(other), by_hand(made, other, made.running_mean, made.running_var), rtol=1e-12, atol=1e-12)
    assert not torch.equal(made.running_mean, mean)


@both
def test_alpha_0_is_batch_norm_up_to_the_variance(size: tuple[int, ...]) -> None:
    made, x = Unitization(3).double(), images(size)
    n = x.numel() / 3
    factor = n / (n - 1 - EPS)
    same = nn.functional.batch_norm(x, None, None, training=True, eps=EPS / factor) / math.sqrt(factor)
    torch.testing.assert_close(made(x), same, rtol=1e-12, atol=1e-12)
    plain = nn.functional.batch_norm(x, None, None, training=True, eps=EPS)
    assert 0 < (made(x) - plain).abs().max() < 1.1 * (1 - 1 / math.sqrt(factor)) * plain.abs().max()
    made.eval()
    torch.testing.assert_close(made(x), nn.functional.batch_norm(x, made.running_mean, made.running_var, eps=EPS))


@both
@pytest.mark.parametrize("norm_scale", ["hw2", "none", "chw"])
def test_gradients_in_float64(size: tuple[int, ...], norm_scale: str) -> None:
    """gradcheck, and autograd through the definition: mean, variance and norm all carry gradients."""
    made, x = layer(norm_scale=norm_scale), images(size).requires_grad_()
    names = dict(made.named_parameters())

    def out(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(out, (x, *names.values()))
    weights = torch.randn(size, generator=rng(3), dtype=torch.float64)
    ours = torch.autograd.grad((made(x) * weights).sum(), (x, *names.values()))

    (mean, var), pixels, shape = statistics(x), math.prod(size[2:]), (-1, *[1] * (len(size) - 2))
    z = (x - mean.view(shape)) / (var + EPS).sqrt().view(shape)
    q = z.flatten(1).square().sum(1) / {"hw2": pixels**2, "none": 1, "chw": 3 * pixels}[norm_scale]
    gain = made.alpha * (q[:, None] + EPS) ** -0.5 + (1 - made.alpha)
    wanted = made.weight.view(shape) * gain.view(*gain.shape, *shape[1:]) * z + made.bias.view(shape)
    theirs = torch.autograd.grad((wanted * weights).sum(), (x, *names.values()))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@both
def test_gradients_in_evaluation(size: tuple[int, ...]) -> None:
    made = layer().eval()
    assert torch.autograd.gradcheck(made, (images(size).requires_grad_(),))


def test_unscaled_it_is_the_paper_s_practical_map() -> None:
    made, x = layer(norm_scale="none").eval(), images((4, 3, 5, 6))
    made.weight.data.fill_(1)
    made.bias.data.zero_()
    z = (x - made.running_mean[:, None, None]) / (made.running_var + EPS).sqrt()[:, None, None]
    flat = practical(z.flatten(1), made.alpha.repeat_interleave(30), EPS)
    torch.testing.assert_close(made(x), flat.view_as(x))


def test_a_unitized_sample_forgets_its_scale() -> None:
    made, x = layer(eps=1e-12).eval(), images((4, 3, 5, 6))
    made.alpha.data.fill_(1)
    factors = torch.tensor([1e-3, 0.5, 2, 1e3], dtype=torch.float64).view(-1, 1, 1, 1)
    torch.testing.assert_close(made(x * factors), made(x), rtol=1e-6, atol=1e-6)
    made.alpha.data.fill_(0.9)
    assert not torch.allclose(made(x * factors), made(x), rtol=0.1)


@both
def test_samples_do_not_mix_in_evaluation(size: tuple[int, ...]) -> None:
    made, x = layer(), images(size)
    made(x)
    made.eval()
    assert torch.equal(made(x)[:1], made(x[:1]))


@both
def test_a_constant_batch_is_finite(size: tuple[int, ...]) -> None:
    """Normalised it is 0: what comes out is the bias, and the slope there is alpha / sqrt(eps) + 1 - alpha."""
    made = layer()
    x = torch.full(size, 3.0, dtype=torch.float64, requires_grad=True)
    out = made(x)
    torch.testing.assert_close(out, made.bias.view(-1, *[1] * (len(size) - 2)).expand(size))
    (out * torch.randn(size, generator=rng(1), dtype=torch.float64)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    made.eval()
    made.running_mean.zero_()
    slope = torch.autograd.functional.jacobian(lambda one: made(one).sum((0, *range(2, len(size)))), torch.zeros(size, dtype=torch.float64))
    for c, alpha in enumerate((-0.7, 0.4, 1.9)):
        wanted = made.weight[c].item() * (alpha / math.sqrt(EPS) + 1 - alpha) / math.sqrt(made.running_var[c].item() + EPS)
        assert slope[c].transpose(0, 1)[c].flatten().tolist() == pytest.approx([wanted] * (slope[c].numel() // 3))


def test_a_far_mean_loses_nothing() -> None:
    """float32 reductions of a channel whose mean is a thousand deviations away."""
    x = (images((16, 3, 32, 32)) * 0.5 + 1000).float()
    made = Unitization(3)
    torch.testing.assert_close(made(x).double(), by_hand(made, x.double(), *statistics(x.double())), rtol=1e-3, atol=1e-4)


def test_memory_layout_and_precision() -> None:
    x = images((4, 3, 5, 6)).float()
    made = layer().float()
    flat, nhwc = made(x), made(x.contiguous(memory_format=torch.channels_last))
    assert nhwc.is_contiguous(memory_format=torch.channels_last) and flat.is_contiguous()
    torch.testing.assert_close(flat, nhwc, rtol=1e-5, atol=1e-5)
    low = made(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, made(x.bfloat16().float()).bfloat16())  # all in between is float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), flat)


def test_it_starts_as_batch_norm_and_gathers_its_statistics() -> None:
    made = Unitization(5)
    state = made.state_dict()
    assert {name: value.unique().tolist() for name, value in state.items()} == {
        "alpha": [0], "weight": [1], "bias": [0], "running_mean": [0], "running_var": [1]}  # fmt: skip
    for seed in range(1500):
        made(torch.randn(8, 5, generator=rng(seed)) * 3 + 2)
    torch.testing.assert_close(made.running_mean, torch.full((5,), 2.0), rtol=0.3, atol=0)
    torch.testing.assert_close(made.running_var, torch.full((5,), 9.0), rtol=0.3, atol=0)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"^norm_scale: 'hw' is not known; allowed: hw2, none, chw$"):
        Unitization(3, norm_scale="hw")
    with pytest.raises(ValueError, match="more than one value per channel"):
        Unitization(3)(torch.randn(1, 3))
    assert Unitization(3).eval()(torch.randn(1, 3)).shape == (1, 3)


# With everything else

METHODS = [name for name in options("method") if name != "vanilla"]
PAIRS = [("net2c", f"[{name}]") for name in METHODS] + [(model, composed(model)) for model in IMAGE if model != "net2c"]


@pytest.mark.parametrize(("model", "methods"), PAIRS)
def test_it_goes_with_every_method_and_model(model: str, methods: str) -> None:
    """Two steps: every alpha has moved, and what comes out is a number; one without normalisation layers of its own gets its."""
    made = train(*small(model), "norm=unitization", f"method={methods}", epochs=1)
    layers = [module for module in made.net.modules() if isinstance(module, Unitization)]
    assert layers and all(layer.alpha.detach().any() and layer.alpha.isfinite().all() for layer in layers)
    assert all(layer.running_mean.any() for layer in layers) and math.isfinite(made.rows[-1]["test/ce"])
    assert made.step == 2 and (methods == "[label_smoothing]" or len([key for key in made.rows[-1] if key.startswith("train/")]) > 2)
