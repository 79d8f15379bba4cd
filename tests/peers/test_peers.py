"""Against curvlinops and BackPACK, where they define the same thing; where they don't, the oracle says who is right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad

curvlinops = pytest.importorskip("curvlinops", reason="pip install --no-deps -r tests/peers/requirements.txt")
backpack = pytest.importorskip("backpack", reason="pip install --no-deps -r tests/peers/requirements.txt")

N = 12
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        torch.randn(N, 5),
    ),
    "cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        torch.randn(N, 2, 4, 4),
    ),
}
LOSSES = {"cross-entropy": nn.CrossEntropyLoss, "squared error": nn.MSELoss}


@pytest.fixture(autouse=True)
def _peers_own_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=MODELS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    with _doubles():
        return MODELS[request.param]()


@pytest.fixture(params=[(name, reduction) for name in LOSSES for reduction in ("mean", "sum")], ids="-".join)
def loss_and_targets(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    name, reduction = request.param
    torch.manual_seed(4)
    targets = torch.randint(3, (N,)) if name == "cross-entropy" else torch.randn(N, 3, dtype=torch.float64)
    return LOSSES[name](reduction=reduction), targets


def test_products_are_those_of_curvlinops_gauss_newton_matrix(network: Any, loss_and_targets: Any) -> None:
    (model, x), (loss, y) = network, loss_and_targets
    theirs = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(x, y)])
    V = torch.randn(sum(p.numel() for p in model.parameters()), 3, dtype=torch.float64)
    for metric in ("matrixfree", "dense", "gram"):
        ours = natgrad.fisher(model, loss, (x, y), metric=metric)
        torch.testing.assert_close(ours @ V, theirs @ V, rtol=1e-8, atol=1e-10)


def test_the_diagonal_is_backpacks(network: Any, loss_and_targets: Any) -> None:
    (model, x), (loss, y) = network, loss_and_targets
    extended, extended_loss = backpack.extend(copy.deepcopy(model)), backpack.extend(copy.deepcopy(loss))
    with backpack.backpack(backpack.extensions.DiagGGNExact()):
        extended_loss(extended(x), y).backward()
    theirs = torch.cat([p.diag_ggn_exact.reshape(-1) for p in extended.parameters()])
    ours = natgrad.fisher(model, loss, (x, y), metric="diagonal").diagonal()
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("metric", "operator"), [("kfac", "KFACLinearOperator"), ("ekfac", "EKFACLinearOperator")]
)
def test_exact_factors_are_those_of_curvlinops(
    network: Any, loss_and_targets: Any, metric: str, operator: str
) -> None:
    (model, x), (loss, y) = network, loss_and_targets
    theirs = getattr(curvlinops, operator)(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    ours = natgrad.fisher(model, loss, (x, y), metric=metric)
    eye = torch.eye(ours.shape[0], dtype=torch.float64)
    torch.testing.assert_close(ours.to_dense(), theirs @ eye, rtol=1e-8, atol=1e-10)


def test_backpacks_exact_factors_are_ours_where_no_position_is_shared(loss_and_targets: Any) -> None:
    torch.manual_seed(3)
    with _doubles():
        model, x = MODELS["mlp"]()
    loss, y = loss_and_targets
    extended, extended_loss = backpack.extend(copy.deepcopy(model)), backpack.extend(copy.deepcopy(loss))
    with backpack.backpack(backpack.extensions.KFLR()):
        extended_loss(extended(x), y).backward()
    ours = natgrad.fisher(model, loss, (x, y), metric="kfac")
    for k in (0, 2):
        G, A = extended[k].weight.kflr  # theirs keeps the bias apart: its block is G itself
        block = ours.restrict([f"{k}.weight"]).to_dense()
        torch.testing.assert_close(block, torch.kron(G, A), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(
            ours.restrict([f"{k}.bias"]).to_dense(), extended[k].bias.kflr[0], rtol=1e-8, atol=1e-10
        )


def _doubles() -> Any:
    class Doubles:
        def __enter__(self) -> None:
            self.before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)

        def __exit__(self, *_: object) -> None:
            torch.set_default_dtype(self.before)

    return Doubles()
