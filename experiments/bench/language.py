"""What a step of the language model costs: with PER, L1, L2 and recurrent BN, in a loop or fused, and what it sends and keeps."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.bench import counts
from experiments.bench.configs import Asked, title
from experiments.bench.sides import Row, compare, suite

VD = "model.variational_dropout=true"
SHARED = (VD, "model.recurrent_mask=shared")
# row -> what it has, what it is over and what that has
ROWS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "per": (("method=per",), "vanilla", ()),
    "per analytic": (("method=per", "method.per.mode=analytic"), "vanilla", ()),
    "l1": (("method=l1",), "vanilla", ()),
    "l2": (("method=l2",), "vanilla", ()),
    "rbn": (("norm=rbn",), "no norm", ()),
    "loop": (("model.loop=true",), "fused layer", ()),
    "VD, a mask for each row": ((VD,), "one for all rows", SHARED),
    "VD, one mask for all rows": (SHARED, "no dropout", ()),
    "tied embeddings": (("model.tie_embeddings=true",), "untied", ()),
    "bf16": (("precision=bf16",), "fp32", ()),
}
IDS = {"per": "C4", "per analytic": "C4", "l1": "C7", "l2": "C7"}
GOOD = dict.fromkeys(IDS, "<= 1.15")
KEPT_GOOD = dict.fromkeys(IDS, "<= 1.001")  # nothing but a few numbers for the log


def text_rows(asked: Asked) -> Iterator[Row]:
    """Windows of the size and vocabulary of Penn Treebank. Nothing to measure where the command line names another network."""
    if asked.given("model") not in (None, "lstm"):
        return
    for name, (words, over, others) in ROWS.items():
        cfg, plain = asked.cfg("lstm", *words), asked.cfg("lstm", *others)
        what = f"{title('lstm', plain)}, {name}"
        yield compare(IDS.get(name, "e"), what, over, GOOD.get(name, "lower"), (suite(cfg), suite(plain)), asked)
    for name, (words, over, others) in ROWS.items():
        cfg, plain = asked.cfg("lstm", *words), asked.cfg("lstm", *others)
        sides = suite(cfg), suite(plain)
        yield counts.calls_row(f"lstm, {name}", over, "lower", sides)
        yield counts.kept_row(f"lstm, {name}", over, KEPT_GOOD.get(name, "lower"), sides, plain.batch_size)
