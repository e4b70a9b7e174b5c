"""What a step costs with unitization, or group normalisation, in place of batch normalisation: in batches of 128, and of 2."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.bench import counts
from experiments.bench.configs import Asked, on_gpu, title
from experiments.bench.sides import Row, compare, suite

BN = ("norm=bn", "norm.eps=1e-3", "norm.momentum=0.01")
NORMS = {"unitization": "<= 1.35", "gn": "lower"}  # the target is for two CPU cores and batches of 128
MICRO = "batch_size=2"


def norm_rows(asked: Asked) -> Iterator[Row]:
    """On the paper's network with 20 norm layers; in micro-batches also with 110. Nothing where the command line names a norm, or texts."""
    if asked.given("norm") or asked.given("model") == "lstm":
        return
    for model in asked.models("preact_resnet20"):
        plain = asked.cfg(model, *BN)
        for norm, good in NORMS.items():
            cfg = asked.cfg(model, f"norm={norm}")
            yield compare("e", f"{title(model, cfg)}, {norm}", "bn", good, (suite(cfg), suite(plain)), asked)
    for model in asked.models("preact_resnet20", "preact_resnet110"):
        plain, cfg = asked.cfg(model, *BN, MICRO), asked.cfg(model, "norm=unitization", MICRO)
        yield compare("e", f"{title(model, cfg)}, unitization", "bn", "lower", (suite(cfg), suite(plain)), asked)
        if on_gpu(cfg):
            graph = asked.cfg(model, "norm=unitization", MICRO, "step=graph")
            yield compare("e", f"{title(model, cfg)}, unitization, graph", "eager", "lower", (suite(graph), suite(cfg)), asked)
    for model in asked.models("preact_resnet20"):
        sides = suite(asked.cfg(model, "norm=unitization")), suite(plain := asked.cfg(model, *BN))
        yield counts.calls_row(f"{model}, unitization", "bn", "lower", sides)
        yield counts.kept_row(f"{model}, unitization", "bn", "lower", sides, plain.batch_size)
