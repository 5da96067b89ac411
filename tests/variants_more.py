"""The rows of modules whose weights are not called but read, and of those that take more than one input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from variant import Variant, plainly


def _randn(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def attend(site: nn.Module, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> Any:
    """Self-attention, with the masks by name."""
    return site(x, x, x, key_padding_mask=padding, attn_mask=mask, **more)


def packed(site: nn.Module, x: Tensor, lengths: Tensor) -> Any:
    """Runs a recurrent network over sequences of several lengths."""
    out, state = site(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(out, batch_first=True)[0], state


def sized(site: nn.Module, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Asks a transposed convolution for an output size."""
    return site(x, output_size=size)


def weighted(site: nn.Module, index: Tensor, weights: Tensor) -> Tensor:
    """Forms bags with a weight per sample, given by name."""
    return site(index, per_sample_weights=weights)


class OwnForwardBilinear(nn.Bilinear):
    """A bilinear layer with a forward of its own, which reads the weight."""

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return torch.einsum("...i,oij,...j->...o", one, self.weight, two) + self.bias


class OwnForwardConvTranspose(nn.ConvTranspose2d):
    """A transposed convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Matrix(nn.Module):
    """A model with a matrix that belongs to no module of its own, and names that hosts use themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(7, 12) * 0.3)
        self.names = nn.Parameter(torch.randn(7))
        self.family = nn.Linear(7, 5)
        self.source = nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.source(self.family(x @ self.base.T + self.names))


class Experts(nn.Module):
    """Packed experts, all of which see every token; `mix` is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5) * 0.4)
        self.down = nn.Parameter(torch.randn(3, 5, 4) * 0.4)
        self.mix = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(*x.shape[:-1], 4, dtype=x.dtype)
        for expert in range(3):
            out = out + (x @ self.up[expert]) @ self.down[expert] * self.mix[expert]
        return out


def _attention(name: str, parameter: str, x: Any, call: Any = attend, **more: Any) -> Variant:
    own = {key: more.pop(key) for key in ("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim") if key in more}
    batch_first = more.pop("batch_first", True)

    def make() -> nn.Module:
        return nn.MultiheadAttention(4, 2, batch_first=batch_first, **own)

    return Variant("attention", name, make, x, call=call, parameter=parameter, linear=False, **more)


def _recurrent(name: str, cls: Any, parameter: str, *, call: Any = plainly, x: Any = None, **more: Any) -> Variant:
    known = ("num_layers", "bidirectional", "proj_size", "bias", "nonlinearity", "dropout")
    own = {key: more.pop(key) for key in known if key in more}
    x = x or _randn((2, 3, 4))
    make = partial(cls, 4, 3, batch_first=True, **own)
    return Variant("recurrent", name, make, x, call=call, parameter=parameter, linear=False, **more)


def _transposed(name: str, cls: Any, x: tuple[int, ...], *args: Any, **more: Any) -> Variant:
    known = ("stride", "padding", "output_padding", "dilation", "groups", "bias")
    own = {key: more.pop(key) for key in known if key in more}
    return Variant("conv_transpose", name, partial(cls, *args, **own), _randn(x), **more)


def _bag(name: str, x: Callable[[], Any], **more: Any) -> Variant:
    own = {key: more.pop(key) for key in ("mode", "padding_idx", "include_last_offset", "sparse") if key in more}
    return Variant("embedding_bag", name, partial(nn.EmbeddingBag, 9, 5, **own), x, **more)


def _bilinear(name: str, cls: Any = nn.Bilinear, shape: tuple[int, ...] = (4,), **more: Any) -> Variant:
    make = partial(cls, 5, 6, 7, bias=more.pop("base_bias", True))
    return Variant("bilinear", name, make, _randn((*shape, 5), (*shape, 6)), **more)


def _parameter(name: str, make: Any, parameter: str, x: tuple[int, ...], **more: Any) -> Variant:
    return Variant("parameter", name, make, _randn(x), parameter=parameter, **more)


SELF, CROSS = _randn((2, 3, 4)), _randn((2, 3, 4), (2, 5, 4), (2, 5, 4))
KV = _randn((2, 3, 4), (2, 5, 6), (2, 5, 3))


def _padded() -> tuple[Any, ...]:
    return torch.randn(2, 3, 4), torch.tensor([[False, False, True], [False, False, False]])


def _masked() -> tuple[Any, ...]:
    return torch.randn(2, 3, 4), None, torch.ones(3, 3).triu(1).bool()


def _additive() -> tuple[Any, ...]:
    return torch.randn(2, 3, 4), None, torch.randn(3, 3)


ATTENTION = [
    _attention("self", "in_proj_weight", SELF),
    _attention("cross", "in_proj_weight", CROSS, plainly),
    _attention("sequence-first", "in_proj_weight", SELF, batch_first=False),
    _attention("unbatched", "in_proj_weight", _randn((3, 4))),
    _attention("no-bias", "in_proj_weight", SELF, bias=False),
    _attention("bias-kv", "in_proj_weight", SELF, add_bias_kv=True),
    _attention("zero-attention", "in_proj_weight", SELF, add_zero_attn=True),
    _attention("padding", "in_proj_weight", _padded),
    _attention("mask", "in_proj_weight", _masked),
    _attention("additive-mask", "in_proj_weight", _additive),
    _attention("no-weights", "in_proj_weight", SELF, partial(attend, need_weights=False)),
    _attention("all-weights", "in_proj_weight", SELF, partial(attend, average_attn_weights=False)),
    _attention("q", "q_proj_weight", KV, plainly, kdim=6, vdim=3),
    _attention("k", "k_proj_weight", KV, plainly, kdim=6, vdim=3),
    _attention("v", "v_proj_weight", KV, plainly, kdim=6, vdim=3, add_bias_kv=True),
    _attention("dropout", "in_proj_weight", SELF, options={"dropout": 0.5}),
    _attention("dense", "in_proj_weight", SELF, options={"rank": 5, "dense": True}),
    Variant(
        "linear",
        "attention-out-proj",
        partial(nn.MultiheadAttention, 4, 2, batch_first=True),
        SELF,
        call=attend,
        at="site.out_proj",
        linear=False,
    ),
]

LENGTHS = torch.tensor([2, 3])
GRU_CELL = partial(nn.GRUCell, 4, 3)
RECURRENT = [
    _recurrent("rnn", nn.RNN, "weight_ih_l0"),
    _recurrent("rnn-relu", nn.RNN, "weight_hh_l0", nonlinearity="relu"),
    _recurrent("gru", nn.GRU, "weight_ih_l0"),
    _recurrent("gru-no-bias", nn.GRU, "weight_hh_l0", bias=False),
    _recurrent("gru-layers", nn.GRU, "weight_ih_l1", num_layers=2),
    _recurrent("lstm", nn.LSTM, "weight_ih_l0"),
    _recurrent("lstm-hidden", nn.LSTM, "weight_hh_l0"),
    _recurrent("lstm-layers", nn.LSTM, "weight_hh_l1", num_layers=2),
    _recurrent("lstm-both-ways", nn.LSTM, "weight_hh_l0_reverse", bidirectional=True),
    _recurrent("lstm-projection", nn.LSTM, "weight_hr_l0", proj_size=2),
    _recurrent("lstm-packed", nn.LSTM, "weight_ih_l0", call=packed, x=lambda: (torch.randn(2, 3, 4), LENGTHS)),
    _recurrent("gru-packed", nn.GRU, "weight_hh_l0", call=packed, x=lambda: (torch.randn(2, 3, 4), LENGTHS)),
    _recurrent("lstm-unbatched", nn.LSTM, "weight_ih_l0", x=_randn((3, 4))),
    _recurrent("rnn-state", nn.RNN, "weight_hh_l0", x=_randn((2, 3, 4), (1, 2, 3))),
    Variant("recurrent_cell", "rnn", partial(nn.RNNCell, 4, 3), _randn((2, 4)), parameter="weight_ih", linear=False),
    Variant("recurrent_cell", "gru", GRU_CELL, _randn((2, 4), (2, 3)), parameter="weight_hh", linear=False),
    Variant("recurrent_cell", "lstm", partial(nn.LSTMCell, 4, 3), _randn((2, 4)), parameter="weight_ih", linear=False),
]

ODD = {"stride": (2, 3), "padding": (1, 2), "output_padding": (1, 2)}
BIASES = {"options": {"bias": True}}
TRANSPOSED = [
    _transposed("1d", nn.ConvTranspose1d, (2, 4, 5), 4, 6, 3),
    _transposed("1d-groups", nn.ConvTranspose1d, (2, 4, 5), 4, 6, 3, groups=2, stride=2, **BIASES),
    _transposed("1d-unbatched", nn.ConvTranspose1d, (4, 5), 4, 6, 3, stride=2, output_padding=1),
    _transposed("2d-odd", nn.ConvTranspose2d, (2, 4, 3, 4), 4, 6, (3, 5), **ODD, **BIASES),
    _transposed("2d-dilation", nn.ConvTranspose2d, (2, 4, 3, 4), 4, 6, 3, dilation=(2, 1), padding=1, bias=False),
    _transposed("2d-made-bias", nn.ConvTranspose2d, (2, 4, 3, 4), 4, 6, 3, groups=2, bias=False, **BIASES),
    _transposed("2d-depthwise", nn.ConvTranspose2d, (2, 4, 3, 4), 4, 4, 3, groups=4, stride=2),
    _transposed(
        "2d-size", nn.ConvTranspose2d, (2, 4, 3, 4), 4, 6, 3, stride=2, call=partial(sized, size=(8, 9)), **BIASES
    ),
    _transposed("2d-dense", nn.ConvTranspose2d, (2, 4, 3, 4), 4, 6, 3, options={"rank": 99, "dense": True}),
    _transposed("2d-own-forward", OwnForwardConvTranspose, (2, 4, 3, 4), 4, 6, 3),
    _transposed("2d-dropout", nn.ConvTranspose2d, (2, 4, 3, 4), 4, 6, 3, options={"dropout": 0.5}),
    _transposed("3d", nn.ConvTranspose3d, (2, 2, 2, 3, 3), 2, 4, (1, 2, 3), stride=(1, 2, 1), groups=2, **BIASES),
]


def _flat(*more: Any) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randint(0, 9, (12,)), *more)


OFFSETS = torch.tensor([0, 3, 3, 8])
BAGS = [
    *(_bag(f"{mode}-rows", lambda: torch.randint(0, 9, (4, 3)), mode=mode) for mode in ("sum", "mean", "max")),
    *(_bag(f"{mode}-offsets", _flat(OFFSETS), mode=mode, padding_idx=3) for mode in ("sum", "mean", "max")),
    _bag("weights", lambda: (torch.randint(0, 9, (4, 3)), torch.rand(4, 3)), mode="sum", call=weighted),
    _bag("weights-offsets", lambda: (torch.randint(0, 9, (12,)), OFFSETS, torch.rand(12)), mode="sum", **BIASES),
    _bag("last-offset", _flat(torch.tensor([0, 3, 8, 12])), mode="mean", include_last_offset=True, **BIASES),
    _bag("biases-padding", _flat(OFFSETS), mode="mean", padding_idx=3, **BIASES),
    _bag("max-biases", _flat(OFFSETS), mode="max", padding_idx=3, **BIASES),
    _bag("sparse", _flat(OFFSETS), mode="sum", sparse=True),
    _bag("dense", _flat(OFFSETS), mode="mean", options={"rank": 9, "dense": True}),
    _bag("dropout", _flat(OFFSETS), mode="sum", options={"dropout": 0.5}),
]

BILINEAR = [
    _bilinear("2d"),
    _bilinear("3d-biases", shape=(2, 3), **BIASES),
    _bilinear("no-bias-biases", base_bias=False, **BIASES),
    _bilinear("dense", options={"rank": 9, "dense": True}),
    _bilinear("own-forward", OwnForwardBilinear),
    _bilinear("dropout", options={"dropout": 0.5}),
]

PARAMETERS = [
    _parameter("matrix", Matrix, "base", (4, 12)),
    Variant("linear", "beside-own-names", Matrix, _randn((4, 12)), at="site.family"),
    _parameter("matrix-dense", Matrix, "base", (4, 12), options={"rank": 8, "dense": True}),
    _parameter("experts", Experts, "up", (4, 6)),
    _parameter("experts-down", Experts, "down", (4, 6), options={"rslora": True}),
    _parameter("experts-dense", Experts, "up", (4, 6), options={"rank": 6, "dense": True}),
    _parameter("experts-dropout", Experts, "down", (4, 6), options={"dropout": 0.5}),
]

MORE = [*ATTENTION, *RECURRENT, *TRANSPOSED, *BAGS, *BILINEAR, *PARAMETERS]
