"""The word-level LSTM language model of PER's table 4 (PyTorch's word language model; Gal & Ghahramani 2016; Cooijmans et al. 2017)."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from models.net import Net, Norm, Tap
from models.norm import RecurrentBatchNorm

MASKS = ("rows", "shared")
# cuDNN would have a layer's weights side by side, and says so where it copies them: a fraction of a window's time.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")


class Recurrent(nn.Module):
    """One LSTM layer, x [N, T, inputs], (h, c) [N, units] each -> outputs [N, T, units], (h, c); parameters as torch.nn.LSTM's.

    With a recurrent norm it is Cooijmans et al.'s BN-LSTM (eqs. 6 to 8): BN of each of the two products, without shift, and of the
    cell where the output reads it; the bias of the forget gate starts at 1.
    loop: step by step in Python even where torch's fused layer could do it: the same numbers, as a reference.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    def __init__(self, inputs: int, units: int, norm: Norm, loop: bool) -> None:
        super().__init__()
        self.normed, self.loop = isinstance(norm(8), RecurrentBatchNorm), loop
        bound = 1 / math.sqrt(units)
        shapes = {"weight_ih": (4 * units, inputs), "weight_hh": (4 * units, units), "bias_ih": (4 * units,), "bias_hh": (4 * units,)}
        for name, shape in shapes.items():  # drawn in torch.nn.LSTM's order: one seed starts both alike
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))
        if self.normed:
            self.norm_ih, self.norm_hh, self.norm_c = norm(4 * units), norm(4 * units), norm(units)
            for layer in (self.norm_ih, self.norm_hh):
                layer.register_parameter("bias", None)
            with torch.no_grad():
                self.bias_ih[units : 2 * units], self.bias_hh[units : 2 * units] = 1, 0

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor], mask: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """mask: what h is multiplied with where the recurrent weights read it: [N, units], or [1, units] for all rows alike."""
        if self.normed or self.loop or (mask is not None and len(mask) > 1):
            return self.stepped(x, state, mask)
        weight_hh = self.weight_hh if mask is None else self.weight_hh * mask
        kind = autocast_dtype(x)
        x, h, c, *weights = (one.to(kind) for one in (x, *state, self.weight_ih, weight_hh, self.bias_ih, self.bias_hh))
        with torch.autocast(x.device.type, enabled=False):  # it would run cuDNN's LSTM in float16 even if asked for bfloat16
            out, h, c = torch.lstm(x, (h[None], c[None]), weights, True, 1, 0.0, self.training, False, True)
        return out, (h[0], c[0])

    def stepped(self, x: Tensor, state: tuple[Tensor, Tensor], mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        outputs = []
        bias = self.bias_ih + self.bias_hh
        projected = nn.functional.linear(x, self.weight_ih, None if self.normed else bias)
        for step, inputs in enumerate(projected.unbind(1)):  # not projected[:, t]: each gradient would be a tensor of all steps
            recurrent = nn.functional.linear(h if mask is None else h * mask, self.weight_hh)
            if self.normed:
                inputs, recurrent = self.norm_ih(inputs, step) + bias, self.norm_hh(recurrent, step)
            i, f, g, o = (inputs + recurrent).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (self.norm_c(c, step) if self.normed else c).tanh()
            outputs.append(h)
        return torch.stack(outputs, 1).to(autocast_dtype(x)), (h, c)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """autocast's dtype where it is enabled, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Features(nn.Module):
    """Word ids [N, T] -> the last layer's outputs [N, T, width], from the state that the last window left; a tap after each layer.

    The state is kept for training and for evaluation apart, so that neither disturbs the other, and no gradient flows into the past.
    """

    def __init__(self, words: int, width: int, norm: Norm, dropout: dict[str, float], recurrent_mask: str, loop: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.layers = nn.ModuleList(Recurrent(width, width, norm, loop) for _ in range(2))
        self.taps = nn.ModuleList(Tap(sample_dims=2) for _ in self.layers)
        self.dropout, self.recurrent_mask = dropout, recurrent_mask
        self.states: dict[bool, Tensor] = {}  # of training, of evaluation: [layers, h and c, N, width]

    def forward(self, words: Tensor) -> Tensor:
        rows = len(words)
        x = self.embedding(words)
        if (mask := self.mask("p_e", x, rows, self.embedding.num_embeddings)) is not None:  # a word's fate is one for the whole window
            x = x * mask.gather(1, words)[..., None]
        before, after = self.state(x, rows), []
        for layer, tap, (h, c) in zip(self.layers, self.taps, before, strict=True):
            if (mask := self.mask("p_i", x, rows, 1, x.shape[2])) is not None:
                x = x * mask
            x, state = layer(x, (h, c), self.mask("p_h", x, rows if self.recurrent_mask == "rows" else 1, h.shape[1]))
            x = tap(x)
            after.append(torch.stack(state))
        self.keep(torch.stack(after).detach().to(self.embedding.weight.dtype))
        mask = self.mask("p_o", x, rows, 1, x.shape[2])
        return x if mask is None else x * mask

    def mask(self, name: str, like: Tensor, *shape: int) -> Tensor | None:
        """0 with the probability of this name, else what keeps the mean as it is; None if nothing is dropped."""
        rate = self.dropout[name]
        if not rate or not self.training:
            return None
        return like.new_empty(shape, dtype=self.embedding.weight.dtype).bernoulli_(1 - rate).div_(1 - rate)

    def state(self, x: Tensor, rows: int) -> Tensor:
        """What the last window of so many rows left; zeros at the start. A copy: `keep` writes over the original."""
        known = self.states.get(self.training)
        shape = (len(self.layers), 2, rows, x.shape[2])
        if known is None or known.shape != shape or known.dtype != self.embedding.weight.dtype:
            return x.new_zeros(shape, dtype=self.embedding.weight.dtype)
        return known.clone()

    def keep(self, state: Tensor) -> None:
        """In training in place: a recorded step reads and writes the same memory each time."""
        known = self.states.get(self.training)
        if self.training and known is not None and known.shape == state.shape:
            known.copy_(state)
        else:
            self.states[self.training] = state


class LanguageModel(Net):
    features: Features

    def reset(self) -> None:
        """Forget what was read, in training or in evaluation, whichever the network is in."""
        if self.training and True in self.features.states:
            self.features.states[True].zero_()
        else:
            self.features.states.pop(self.training, None)


def lstm(
    num_classes: int,
    norm: Norm,
    width: int = 650,
    tie_embeddings: bool = False,
    variational_dropout: bool = False,
    p_e: float = 0.2,
    p_i: float = 0.5,
    p_h: float = 0.2,
    p_o: float = 0.5,
    recurrent_mask: str = "rows",
    loop: bool = False,
) -> LanguageModel:
    """Embedding, two LSTM layers and a decoder, all of this width, for word ids [N, T]; logits [N, T, num_classes].

    19,780,400 parameters with 10,000 words, 13,280,400 with tied embeddings. Taps: the raw outputs of both layers.
    norm: none, or rbn, which normalises inside the layers.
    tie_embeddings: the decoder's weight is the embedding's (RE; Inan et al. 2017, Press & Wolf 2017), without their augmented loss.
    variational_dropout: VD (Gal & Ghahramani 2016): one mask for all steps of a window, on word types (p_e), the inputs of both layers
        (p_i), the recurrent state (p_h) and the output (p_o); all gates see the same.
    recurrent_mask: "rows", one for each row, which takes a loop in Python; "shared", one for all rows of the window, which does not.
    loop: the loop even where torch's fused layer would do, as its reference.
    Raises ValueError for an unknown name, a probability outside [0, 1), or another norm layer.
    """
    rates = {"p_e": p_e, "p_i": p_i, "p_h": p_h, "p_o": p_o}
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name}: {rate} is not allowed; it must be a number from 0 to below 1")
    if recurrent_mask not in MASKS:
        raise ValueError(f"recurrent_mask: {recurrent_mask!r} is not known; allowed: {', '.join(MASKS)}")
    if not isinstance(layer := norm(8), nn.Identity | RecurrentBatchNorm):
        raise ValueError(f"norm: {type(layer).__name__} does not go into an LSTM; allowed: none, rbn")
    dropout = rates if variational_dropout else dict.fromkeys(rates, 0.0)
    features = Features(num_classes, width, norm, dropout, recurrent_mask, loop)
    classifier = nn.Linear(width, num_classes)
    nn.init.uniform_(classifier.weight, -0.1, 0.1)
    nn.init.zeros_(classifier.bias)
    if tie_embeddings:
        classifier.weight = features.embedding.weight
    return LanguageModel(features, classifier)
