"""Parameters that act in backward or tangent nodes are listed: their rows come from per-example gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from natgrad.tape import Tape
from natgrad.tape.jacobian import _load_forward_mode
from natgrad.tape.passes import SignalPass
from natgrad.tape.rows import batch_rows
from oracle import taylor as oracle

DTYPE = torch.float64
N, D = 4, 3


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).to(DTYPE)


def nested(model: Any, x: Tensor) -> Tensor:
    points = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    second = [
        torch.autograd.grad(slopes[:, k].sum(), points, create_graph=True)[0][:, k, None] for k in range(D)
    ]
    return torch.stack(second).sum(0)


def functional(model: Any, x: Tensor) -> Tensor:
    hessians = [
        torch.autograd.functional.hessian(lambda p: model(p)[0], point, create_graph=True) for point in x
    ]
    return torch.stack([one.trace() for one in hessians])[:, None]


def backward(model: Any, x: Tensor) -> Tensor:
    """Through .grad of the points."""
    points = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    total = torch.zeros(N, 1, dtype=DTYPE)
    for k in range(D):
        points.grad = None
        with warnings.catch_warnings():  # of a cycle, which is broken below
            warnings.simplefilter("ignore", UserWarning)
            slopes[:, k].sum().backward(create_graph=True, inputs=points)
        total = total + points.grad[:, k, None]
    points.grad = None
    return total


def jvp_of_jvp(model: Any, x: Tensor) -> Tensor:
    total = torch.zeros(N, 1, dtype=DTYPE)
    for k in range(D):
        e = torch.zeros_like(x)
        e[:, k] = 1
        total = total + jvp(lambda z, e=e: jvp(model, (z,), (e,))[1], (x,), (e,))[1]
    return total


def passed_in(model: Any, x: Tensor) -> Tensor:
    """Parameters as an argument of the transformed function."""
    values = dict(model.named_parameters())

    def one(point: Tensor, given: dict[str, Tensor]) -> Tensor:
        return functional_call(model, given, (point[None],))[0]

    return vmap(jacrev(jacrev(one)), in_dims=(0, None))(x, values).diagonal(dim1=2, dim2=3).sum(-1)


def dual_numbers(model: Any, x: Tensor) -> Tensor:
    points = x.clone().requires_grad_()
    total = torch.zeros(N, 1, dtype=DTYPE)
    with forward_ad.dual_level():
        for k in range(D):
            e = torch.zeros_like(x)
            e[:, k] = 1
            slope = forward_ad.unpack_dual(model(forward_ad.make_dual(points, e))).tangent
            total = total + torch.autograd.grad(slope.sum(), points, create_graph=True)[0][:, k, None]
    return total


WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "autograd.grad": (nested, "torch.autograd.grad"),
    "autograd.functional": (functional, "torch.autograd.grad"),
    "backward": (backward, "torch.autograd.grad"),
    "func": (oracle.mapped_laplacian, "torch.func.grad"),
    "jvp": (jvp_of_jvp, "torch.func.jvp"),
    "parameters passed in": (passed_in, "torch.func.grad"),
    "dual numbers": (dual_numbers, "torch.autograd.forward_ad"),
}


def rows(tape: Tape, residuals: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    signals = SignalPass(tape, (residuals,), (torch.ones_like(residuals),), N)
    by_name = batch_rows([signals], parameters).explicit(slice(None))
    return torch.cat([by_name[name][0] for name in parameters], 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("edge", ["none", "before", "after"])
def test_rows_of_a_residual_written_with_torch_are_its_jacobian(way: str, edge: str) -> None:
    _load_forward_mode()
    model, x, boundary = network(), torch.randn(N, D, dtype=DTYPE), torch.randn(N, D, dtype=DTYPE)
    laplacian, reason = WAYS[way]
    parameters = dict(model.named_parameters())
    tape = Tape(parameters)
    with tape.recording():  # an ordinary call is covered by itself: that must not count
        residuals = model(boundary) if edge == "before" else 0
        residuals = residuals + laplacian(model, x)
        if edge == "after":
            residuals = residuals + model(boundary)
    expected = oracle.residual_jacobian(
        model, lambda m, p: oracle.mapped_laplacian(m, p) + (0 if edge == "none" else m(boundary)), x
    )
    torch.testing.assert_close(rows(tape, residuals, parameters), expected)
    assert tape.uncovered == dict.fromkeys(parameters, reason)
    assert not any(tape.covers(name) for name in parameters)
    assert all(p.grad is None for p in model.parameters())


def test_only_what_was_differentiated_is_listed() -> None:
    model, other, x = network(0), network(1), torch.randn(N, D, dtype=DTYPE)
    both = nn.ModuleList([model, other])
    parameters = dict(both.named_parameters())
    tape = Tape(parameters)
    with tape.recording():
        residuals = nested(model, x) * other(x)
    assert tape.uncovered == {n: "torch.autograd.grad" for n in parameters if n.startswith("0.")}
    found = rows(tape, residuals, parameters)
    inner = oracle.residual_jacobian(model, oracle.mapped_laplacian, x) * other(x)
    outer = oracle.residual_jacobian(other, lambda m, p: m(p), x) * nested(model, x)
    torch.testing.assert_close(found, torch.cat([inner, outer], 1))


def test_a_derivative_that_is_not_kept_in_the_graph_is_no_use() -> None:
    model, x = network(), torch.randn(N, D, dtype=DTYPE).requires_grad_()
    tape = Tape(dict(model.named_parameters()))
    with tape.recording():
        u = model(x)
        (slopes,) = torch.autograd.grad(u.sum(), x, retain_graph=True)
        u.sum().backward(retain_graph=True, inputs=[x])
        _ = u + slopes.sum(1, keepdim=True)
    assert not tape.uncovered


def test_detached_copies_and_shapes_under_a_transform_are_no_use() -> None:
    model, x = network(), torch.randn(N, D, dtype=DTYPE)
    fixed = nn.Parameter(torch.ones(D, dtype=DTYPE))
    tape = Tape({"fixed": fixed})
    with tape.recording():
        vmap(lambda p: p * fixed.detach() + fixed.data + fixed.shape[0])(x)
        grad(lambda p: model(p).sum())(x)
    assert not tape.uncovered


def test_examples_mapped_by_vmap() -> None:
    """Without a derivative, too: the rule would take one example's input for the batch."""
    model, x = network(), torch.randn(N, D, dtype=DTYPE)
    parameters = dict(model.named_parameters())
    tape = Tape(parameters)
    with tape.recording():
        residuals = vmap(model)(x)
    assert tape.uncovered == dict.fromkeys(parameters, "torch.func.vmap")
    expected = oracle.residual_jacobian(model, lambda m, p: m(p), x)
    torch.testing.assert_close(rows(tape, residuals, parameters), expected)


def test_a_class_that_decomposes_its_functions_is_heard_through() -> None:
    class Doubled(Tensor):
        decomposes_torch_functions = True

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain = [a.as_subclass(Tensor) if isinstance(a, Doubled) else a for a in args]
            return func(*plain, **(kwargs or {})) + func(*plain, **(kwargs or {}))

    model, x = nn.Linear(D, 2), torch.randn(N, D).as_subclass(Doubled)
    tape = Tape(dict(model.named_parameters()))
    with tape.recording():
        model(x)
    assert [call.raw_inputs.shape for call in tape.take().calls] == [(N, D), (N, D)]
