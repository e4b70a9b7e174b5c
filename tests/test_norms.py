"""Norm layers: batch normalisation is torch's, group normalisation is Wu & He's, by groups and by channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.norm import BatchNorm, group


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("theirs", "size"), [(nn.BatchNorm1d, (6, 5)), (nn.BatchNorm2d, (6, 5, 3, 4))])
def test_batch_norm_is_torchs(theirs: type[nn.Module], size: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(0)
    ours, reference = BatchNorm(5), theirs(5)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
            other.copy_(mine.normal_())
    results = []
    for layer in (ours, reference):
        for step in range(3):  # running statistics first
            layer(torch.randn(*size, generator=torch.Generator().manual_seed(step)) * 3 + 1)
        layer.train(training)
        x = torch.randn(*size, generator=torch.Generator().manual_seed(9)).requires_grad_()
        out = layer(x)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in layer.parameters()), layer.running_mean, layer.running_var])
    assert len(results[0]) == 6
    torch.testing.assert_close(*results, rtol=0, atol=0)
    mean, var = results[0][4], results[0][5]
    assert mean.abs().max() > 0.1 and (var - 1).abs().max() > 0.1


def test_batch_norm_by_hand() -> None:
    x = torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1
    layer = BatchNorm(2)
    out = layer(x)
    for c in range(2):
        values = x[:, c].double()
        mean, var = values.mean(), values.var(correction=0)
        torch.testing.assert_close(out[:, c].double(), (values - mean) / (var + 1e-5).sqrt(), rtol=1e-5, atol=1e-5)
        assert layer.running_mean is not None and layer.running_var is not None
        assert layer.running_mean[c].item() == pytest.approx(0.1 * mean.item(), rel=1e-5)
        assert layer.running_var[c].item() == pytest.approx(0.9 + 0.1 * values.var().item(), rel=1e-5)


def test_batch_norm_wants_channels() -> None:
    with pytest.raises(ValueError, match=r"\[N, C, \.\.\.\]"):
        BatchNorm(5)(torch.randn(5))


@pytest.mark.parametrize("size", [(3, 20), (3, 20, 2, 5)])
def test_group_norm(size: tuple[int, ...]) -> None:
    x = torch.randn(*size, generator=torch.Generator().manual_seed(0)) * 2 + 1
    layer = group(20, num_groups=4, eps=1e-3)
    with torch.no_grad():
        layer.weight.normal_(), layer.bias.normal_()
    out = layer(x)
    for n in range(3):
        for first in range(0, 20, 5):
            values = x[n, first : first + 5].double()
            plain = (values - values.mean()) / (values.var(correction=0) + 1e-3).sqrt()
            for c in range(5):
                wanted = plain[c] * layer.weight[first + c].item() + layer.bias[first + c].item()
                torch.testing.assert_close(out[n, first + c].double(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError):
        group(20, num_groups=3)


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_groups_of_so_many_channels(channels: int) -> None:
    for size in (1, 2, 4, 8, 16):
        assert group(channels, channels_per_group=size).num_groups == channels // size
        assert group(channels, num_groups=size).num_groups == size
    x = torch.randn(3, channels, 5, 5)
    torch.testing.assert_close(group(channels, channels_per_group=1)(x), nn.functional.instance_norm(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(group(channels, num_groups=1)(x), nn.functional.layer_norm(x, x.shape[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, "^num_groups: 3 does not divide the 16 channels of a layer$"),
        ({"num_groups": 0}, "^num_groups: 0 does not divide the 16 channels of a layer$"),
        ({"channels_per_group": 32}, "^channels_per_group: 32 does not divide the 16 channels of a layer$"),
        ({"channels_per_group": 0}, "^channels_per_group: 0 does not divide the 16 channels of a layer$"),
    ],
)
def test_groups_must_divide_the_channels(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group(16, **options)
