"""The tape hears what a jet's functions are made of, and the rows of a residual are put together layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from natgrad import pde
from natgrad.tape import Tape
from natgrad.tape.passes import SignalPass
from natgrad.tape.rows import batch_rows
from oracle import taylor as oracle

DTYPE = torch.float64
N = 5


class Scaled(nn.Module):
    """A product, a residual connection, and a parameter that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.tensor([1.5, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.sin(self.inner(h))
        return torch.prod(x * (1 - x), 1, keepdim=True) * self.last(h) * self.scale


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 1)),
    "two-outputs": lambda: nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2, bias=False)),
    "scaled": Scaled,
    "convolution": lambda: nn.Sequential(
        nn.Linear(3, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1)
    ),
}
RESIDUALS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "laplacian": (pde.laplacian, oracle.mapped_laplacian),
    "helmholtz": (
        lambda m, x: pde.helmholtz(m, x, 2.0),
        lambda m, x: oracle.mapped_laplacian(m, x) + 4 * m(x),
    ),
    "squared": (lambda m, x: pde.laplacian(m, x) ** 2, lambda m, x: oracle.mapped_laplacian(m, x) ** 2),
}


def rows(tape: Tape, residuals: Tensor, parameters: dict[str, nn.Parameter]) -> tuple[Tensor, int]:
    """∂r/∂θ, [C·N, P], and how many layers made part of it."""
    passes = []
    for c in range(residuals.shape[1]):
        signal = torch.zeros_like(residuals)
        signal[:, c] = 1
        passes.append(SignalPass(tape, (residuals,), (signal,), len(residuals)))
    found = batch_rows(passes, parameters)
    by_name = found.explicit(slice(None))
    return torch.cat([by_name[name].flatten(0, 1) for name in parameters], 1), len(found.layers)


def recorded(model: nn.Module, residual: Callable[[Any, Tensor], Tensor], x: Tensor) -> tuple[Tape, Tensor]:
    tape = Tape(dict(model.named_parameters()))
    with tape.recording():
        residuals = residual(model, x)
    return tape, residuals


def test_the_tape_hears_the_value_with_its_bias_and_all_streams_without() -> None:
    model, x = MODELS["mlp"]().to(DTYPE), torch.rand(N, 3, dtype=DTYPE)
    tape, _ = recorded(model, pde.laplacian, x)
    heard = [(call.block.weight, tuple(call.raw_inputs.shape), call.has_bias) for call in tape.take().calls]
    assert heard == [
        ("0.weight", (N, 3), True),
        ("0.weight", (N, 3, 3), False),  # no second derivative yet
        ("2.weight", (N, 6), True),
        ("2.weight", (N, 4, 6), False),
        ("4.weight", (N, 5), True),
        ("4.weight", (N, 4, 5), False),
    ]
    assert not tape.uncovered
    assert all(tape.covers(name) for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_rows_of_a_residual_are_its_jacobian(name: str, residual: str) -> None:
    model, x = MODELS[name]().to(DTYPE), torch.rand(N, 3, dtype=DTYPE)
    ours, theirs = RESIDUALS[residual]
    tape, residuals = recorded(model, ours, x)
    found, layers = rows(tape, residuals, dict(model.named_parameters()))
    torch.testing.assert_close(found, oracle.residual_jacobian(model, theirs, x))
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert layers == linear, "the linear layers, each by its rule"
    assert set(tape.uncovered) == ({"scale"} if name == "scaled" else set())


def test_blocks_of_a_residual_together() -> None:
    """An ordinary call of the model in the same recording is one more use of its layers."""
    model, x, edge = MODELS["mlp"]().to(DTYPE), torch.rand(N, 3, dtype=DTYPE), torch.rand(N, 3, dtype=DTYPE)
    tape, residuals = recorded(model, lambda m, p: pde.laplacian(m, p) + m(edge), x)
    found, layers = rows(tape, residuals, dict(model.named_parameters()))
    expected = oracle.residual_jacobian(model, lambda m, p: oracle.mapped_laplacian(m, p) + m(edge), x)
    torch.testing.assert_close(found, expected)
    assert layers == 3
