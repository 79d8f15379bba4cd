"""Recurrent networks as linear maps and elementwise functions, position by position.

The kernels of `torch.lstm`, `torch.gru` and the like are one function each: nothing inside is heard, and they have no
forward-mode derivative. Here they are written out, with torch's conventions for the order of gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
# The next state from W_ih x + b_ih, W_hh h + b_hh and the present one, of which h comes first.
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    i, f, g, o = (of_input + of_hidden).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    (r, z, n), (hr, hz, hn) = of_input.chunk(3, -1), of_hidden.chunk(3, -1)
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return ((state[0] - n) * (z + hz).sigmoid() + n,)


def _tanh(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    return ((of_input + of_hidden).tanh(),)


def _relu(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    return ((of_input + of_hidden).relu(),)


def _one_step(cell: Cell) -> Callable[..., Any]:
    """What `torch.lstm_cell` and the like compute."""

    def step(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        found = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return found[0] if isinstance(hx, Tensor) else found

    return step


def _sequence(cell: Cell) -> Callable[..., Any]:
    """What `torch.lstm` and the like compute."""

    def run(
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        x = input.transpose(0, 1) if batch_first else input
        weights = _by_direction(params, num_layers * (1 + bidirectional))
        out, state = _layers(cell, x, _states(hx), weights, has_biases, dropout * train, num_layers, None)
        return out.transpose(0, 1) if batch_first else out, *state

    return run


def _packed(cell: Cell) -> Callable[..., Any]:
    """The same on packed sequences: examples of decreasing lengths, of which each position has those that last."""

    def run(
        data: Float[Tensor, "rows f"],
        batch_sizes: Int[Tensor, "t"],
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        examples = torch.arange(int(batch_sizes[0]), device=data.device)
        there = examples < batch_sizes.to(data.device)[:, None]
        x = _padded(data, there)
        weights = _by_direction(params, num_layers * (1 + bidirectional))
        out, state = _layers(cell, x, _states(hx), weights, has_biases, dropout * train, num_layers, there)
        return out[there], *state

    return run


def _states(hx: Any) -> State:
    """Each [layers · directions, n, ·]."""
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _padded(data: Float[Tensor, "rows f"], there: Bool[Tensor, "t n"]) -> Float[Tensor, "t n f"]:
    return data.new_zeros(*there.shape, data.shape[1]).index_put((there,), data)


def _by_direction(params: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    each = len(params) // count
    return [params[k * each : (k + 1) * each] for k in range(count)]


def _layers(
    cell: Cell,
    x: Float[Tensor, "t n f"],
    state: State,
    weights: list[Sequence[Tensor]],
    biased: bool,
    dropout: float,
    layers: int,
    there: Bool[Tensor, "t n"] | None,
) -> tuple[Float[Tensor, "t n o"], State]:
    """All layers, of one direction or two."""
    directions = len(weights) // layers
    ends: list[State] = []
    for layer in range(layers):
        outs = []
        for k in range(directions):
            own = layer * directions + k
            out, end = _direction(
                cell, x, tuple(part[own] for part in state), weights[own], biased, k == 1, there
            )
            outs.append(out)
            ends.append(end)
        x = torch.cat(outs, -1) if directions > 1 else outs[0]
        if dropout and layer < layers - 1:  # drawn for as many numbers as torch draws it for
            x = F.dropout(x, dropout) if there is None else _padded(F.dropout(x[there], dropout), there)
    return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))


def _direction(
    cell: Cell,
    x: Float[Tensor, "t n f"],
    state: State,
    weights: Sequence[Tensor],
    biased: bool,
    backwards: bool,
    there: Bool[Tensor, "t n"] | None,
) -> tuple[Float[Tensor, "t n o"], State]:
    """One layer in one direction. Examples come first in every call of a linear map, as the tape reads them."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biased else (None, None)
    project = rest[2 * biased :]
    of_inputs = F.linear(x.transpose(0, 1), w_ih, b_ih).unbind(1)
    found = []
    for t in reversed(range(len(x))) if backwards else range(len(x)):
        h, *others = cell(of_inputs[t], F.linear(state[0], w_hh, b_hh), state)
        following = (F.linear(h, project[0]) if project else h, *others)
        if there is not None:
            following = tuple(
                torch.where(there[t, :, None], new, old) for new, old in zip(following, state, strict=True)
            )
        state = following
        found.append(state[0])
    return torch.stack(found[::-1] if backwards else found), state


_CELLS: dict[str, Cell] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}

CELLS = {getattr(torch, f"{name}_cell"): _one_step(cell) for name, cell in _CELLS.items()}
"""Functions of one position."""

SEQUENCES = {getattr(torch, name): _sequence(cell) for name, cell in _CELLS.items()}
"""Functions of sequences of one length."""

PACKED = {getattr(torch, name): _packed(cell) for name, cell in _CELLS.items()}
"""The same functions, of packed sequences."""
