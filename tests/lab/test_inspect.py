from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from natgrad.errors import ConfigError, EmptyError
from natgrad.lab.inspect import (
    SCHEDULES,
    LayerShape,
    Schedule,
    factor_flops,
    inspect_model,
    inspect_module,
    inverse_flops,
    kfac_flops,
    precondition_flops,
    product_flops,
    render,
    sgd_flops,
    signal_flops,
    tangent_flops,
)


def test_the_deep_autoencoder_costs_what_the_anchors_say() -> None:
    """SGD 17 GFLOP at batch 1000 with every pass counted, factors 13 (half by a symmetric kernel), signals 5.7,
    inverses 5.5, preconditioning 9.
    """
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers = [LayerShape(a, b, first=i == 0) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
    whole = [LayerShape(layer.inputs, layer.outputs) for layer in layers]
    assert sum(sgd_flops(layer, 1000) for layer in whole) == pytest.approx(17e9, rel=0.01)
    assert sum(signal_flops(layer, 1000) for layer in whole) == pytest.approx(5.7e9, rel=0.01)
    assert sum(factor_flops(layer, 1000) for layer in layers) == pytest.approx(13e9 / 2, rel=0.08)
    assert sum(inverse_flops(layer) for layer in layers) == pytest.approx(5.5e9, rel=0.05)
    assert sum(precondition_flops(layer) for layer in layers) == pytest.approx(9e9, rel=0.05)


def test_costs_by_hand() -> None:
    layer = LayerShape(3, 2, bias=True, groups=2, positions=5)
    assert product_flops(layer, 7) == 2 * 7 * 5 * 2 * 3 * 2
    assert sgd_flops(layer, 7) == 3 * product_flops(layer, 7)
    assert sgd_flops(LayerShape(3, 2, first=True), 7) == 2 * product_flops(LayerShape(3, 2), 7)
    assert layer.factor_elements == 2 * (16 + 4)
    assert inverse_flops(layer) == 2 * (64 + 8)
    assert precondition_flops(layer) == 2 * 2 * (4 * 4 + 2 * 16)
    assert tangent_flops(layer, 7, 0) == 0
    free = Schedule("never", factors_every=10**9, inverses_every=10**9, tangents=0)
    assert kfac_flops(layer, 7, free) == pytest.approx(sgd_flops(layer, 7) + precondition_flops(layer))


def test_positions_are_counted_and_shared_weights_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 4, 3, groups=2)
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.convolution(x).flatten(2).transpose(1, 2)
            return self.inner(torch.tanh(self.inner(x)))

    model = Twice()
    inspection = inspect_module(model, torch.zeros(3, 2, 6, 6))
    rows = {row.name: row for row in inspection.rows}
    assert inspection.examples == 3
    assert rows["convolution.weight"].layer == LayerShape(9, 2, True, groups=2, positions=16, first=True)
    assert rows["inner.weight"].layer == LayerShape(4, 4, True, positions=32)
    assert rows["inner.bias"].factors == "in inner.weight"
    assert rows["convolution.weight"].factors == "2 × (10² and 2²)"
    assert rows["convolution.weight"].memory == 2 * 2 * (100 + 4) * 4
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_vocabulary_s_side_is_a_diagonal() -> None:
    """As K-FAC keeps it: not 9,000² numbers, nor 9,000³ operations."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 9000))
    inspection = inspect_module(model, torch.zeros(2, 3))
    head = {row.name: row for row in inspection.rows}["2.weight"]
    assert head.factors == "5² and a diagonal of 9000"
    assert head.memory == 2 * (25 + 9000) * 4
    assert head.layer is not None
    assert inverse_flops(head.layer) == 125 + 9000
    assert precondition_flops(head.layer) == 2 * 5 * 9000 * (5 + 1)


def test_what_has_no_rule_is_listed_with_the_function_that_used_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.norm, self.idle = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.ones(2))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.odd, self.table = nn.Parameter(torch.ones(4)), nn.Embedding(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            looked_up = self.table(torch.zeros(len(x), dtype=torch.long))
            return torch.einsum("nd,d->nd", self.norm(self.map(x)), self.odd) + looked_up

    inspection = inspect_module(Odd(), torch.zeros(3, 4))
    rows = {row.name: row for row in inspection.rows}
    assert (rows["norm.weight"].rule, rows["norm.weight"].factors) == ("layer_norm", "a diagonal")
    assert (rows["table.weight"].rule, rows["table.weight"].factors) == ("embedding", "4² and a diagonal")
    assert rows["odd"].rule == "none (einsum): a diagonal of squared gradients"
    assert "not used" in rows["idle"].rule
    assert "frozen" not in rows
    text = render(inspection, 120)
    assert "2 of 7 parameters" in text
    assert "1 frozen" in text


def test_a_registered_problem_can_be_inspected() -> None:
    inspection = inspect_model("digits", 500)
    assert inspection.examples == 500
    assert inspection.parameters == 64 * 64 + 64 + 650
    assert 1 < inspection.ratio(SCHEDULES[1]) < inspection.ratio(SCHEDULES[0])
    assert "64² and 10²" not in render(inspection, 100)
    assert "65² and 10²" in render(inspection, 100)


def test_what_inspect_refuses() -> None:
    with pytest.raises(EmptyError, match="no trainable parameter"):
        inspect_module(nn.Tanh(), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="fails on the example input: RuntimeError"):
        inspect_module(nn.Linear(3, 2), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="holds no tensor"):
        inspect_module(nn.Linear(3, 2), "words")
