"""Norm layers: batch and group normalization against torch's; unitization against its definition in float64, and autograd through it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models.norm import BatchNorm, group
from models.unitization import Unitization

torch.set_num_threads(1)
EPS = 1e-3


@pytest.mark.parametrize(("theirs", "size"), [(nn.BatchNorm1d, (6, 5)), (nn.BatchNorm2d, (6, 5, 3, 4))])
def test_batch_norm_is_torchs(theirs: type[nn.Module], size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, reference = BatchNorm(5), theirs(5)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
            other.copy_(mine.normal_())
    batches, weights, results = torch.randn(3, *size) * 3 + 1, torch.randn(size), []
    for layer in (ours, reference):
        xs = batches.clone().requires_grad_()
        outs = [layer.train(training)(x) for x, training in zip(xs, (True, True, False), strict=True)]
        sum((out * weights).sum() for out in outs).backward()
        results.append([*outs, xs.grad, *(p.grad for p in layer.parameters()), layer.running_mean, layer.running_var])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert (results[0][-1] - 1).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"\[N, C, \.\.\.\]"):
        ours(torch.randn(5))


def test_groups_by_their_number_or_their_channels() -> None:
    assert group(32, channels_per_group=8).num_groups == 4 and group(32, num_groups=8).num_groups == 8
    x, layer = torch.randn(3, 16, 5, 5), group(16, num_groups=1, eps=0.5)
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(x, x.shape[1:], eps=0.5), rtol=1e-4, atol=1e-5)
    for option, value in (("num_groups", 3), ("num_groups", 0), ("channels_per_group", 32), ("channels_per_group", 0)):
        with pytest.raises(ValueError, match=f"^{option}: {value} does not divide the 16 channels of a layer$"):
            group(16, **{option: value})


# Unitization


def unitization(**options: str) -> Unitization:
    """In float64, with no parameter at its initial value, alpha below 0, in [0, 1] and above 1."""
    made = Unitization(3, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.alpha.copy_(torch.tensor([-0.7, 0.4, 1.9]))
        made.weight.copy_(torch.tensor([2.5, 1.2, -0.3]))
        made.bias.copy_(torch.tensor([-1.1, 0.2, 0.7]))
    return made


def images(*size: int, seed: int = 7) -> Tensor:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    return x + torch.arange(size[1]).view(-1, *[1] * (len(size) - 2))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, with the variance's correction of the authors' code."""
    values = x.transpose(0, 1).flatten(1)
    n = values.shape[1]
    return values.mean(1), values.var(1, correction=0) * n / (n - 1 - EPS)


def definition(made: Unitization, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    pixels, shape = math.prod(x.shape[2:]), (-1, *[1] * (x.dim() - 2))
    z = (x - mean.view(shape)) / (var + made.eps).sqrt().view(shape)
    q = z.flatten(1).square().sum(1) / {"hw2": pixels**2, "none": 1, "chw": x.shape[1] * pixels}[made.norm_scale]
    gain = made.alpha * (q[:, None] + made.eps) ** -0.5 + (1 - made.alpha)
    return made.weight.view(shape) * gain.view(*gain.shape, *shape[1:]) * z + made.bias.view(shape)


@pytest.mark.parametrize(("size", "norm_scale"), [((4, 3, 5, 6), "hw2"), ((6, 3), "none"), ((2, 3, 7), "chw"), ((2, 3, 4, 4), "none")])
def test_values_and_gradients_are_those_of_the_definition(size: tuple[int, ...], norm_scale: str) -> None:
    """In training, mean, variance and norm all carry gradients."""
    made, x = unitization(norm_scale=norm_scale), images(*size).requires_grad_()
    wanted, out = definition(made, x, *statistics(x)), made(x)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    mean, var = (value.detach() for value in statistics(x))
    torch.testing.assert_close(made.running_mean, 0.01 * mean)  # Keras' momentum 0.99
    torch.testing.assert_close(made.running_var, 0.99 + 0.01 * var)
    weights = images(*size, seed=3)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), (x, *made.parameters())) for y in (out, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    other = images(*size, seed=8)
    torch.testing.assert_close(made.eval()(other), definition(made, other, made.running_mean, made.running_var), rtol=1e-12, atol=1e-12)


def test_unitization_starts_as_batch_norm_up_to_the_variance() -> None:
    made, x = Unitization(3).double(), images(4, 3, 5, 6)
    factor = 120 / (120 - 1 - EPS)
    wanted = nn.functional.batch_norm(x, None, None, training=True, eps=EPS / factor) / math.sqrt(factor)
    torch.testing.assert_close(made(x), wanted, rtol=1e-12, atol=1e-12)
    made.eval()
    torch.testing.assert_close(made(x), nn.functional.batch_norm(x, made.running_mean, made.running_var, eps=EPS))


def test_a_constant_batch_gives_the_bias_and_finite_gradients() -> None:
    made, x = unitization(), torch.full((4, 3, 5, 6), 3.0, dtype=torch.float64, requires_grad=True)
    out = made(x)
    torch.testing.assert_close(out, made.bias.view(3, 1, 1).expand(4, 3, 5, 6))
    (out * images(4, 3, 5, 6)).sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in (x, *made.parameters()))


def test_precision_and_memory_layout() -> None:
    far = (images(16, 3, 32, 32) * 0.5 + 1000).float()  # the mean is a thousand deviations away
    wanted = definition(Unitization(3), far.double(), *statistics(far.double()))
    torch.testing.assert_close(Unitization(3)(far).double(), wanted, rtol=1e-3, atol=1e-4)
    x, made = images(4, 3, 5, 6).float(), unitization().float()
    flat, nhwc = made(x), made(x.contiguous(memory_format=torch.channels_last))
    assert nhwc.is_contiguous(memory_format=torch.channels_last) and flat.is_contiguous()
    torch.testing.assert_close(flat, nhwc, rtol=1e-5, atol=1e-5)
    low = made(x.bfloat16())
    assert low.dtype == torch.bfloat16 and torch.equal(low, made(x.bfloat16().float()).bfloat16())  # all in between is float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), flat)


def test_unitization_refuses() -> None:
    with pytest.raises(ValueError, match=r"^norm_scale: 'hw' is not known; allowed: hw2, none, chw$"):
        Unitization(3, norm_scale="hw")
    with pytest.raises(ValueError, match="more than one value per channel"):
        Unitization(3)(torch.randn(1, 3))
    assert Unitization(3).eval()(torch.randn(1, 3)).shape == (1, 3)
