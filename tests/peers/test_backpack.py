"""natgrad equals BackPACK 1.7.1 where both define the same thing (its differences are in test_differences.py)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from peers import networks
from peers.networks import close

backpack = pytest.importorskip("backpack", reason=networks.SKIPPED)

# torch's word on the full backward hooks that BackPACK registers, for a first layer whose input needs no gradient
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def extended(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, extension: Any) -> nn.Module:
    """A copy of the model with BackPACK's fields on its parameters."""
    model, loss = backpack.extend(copy.deepcopy(model)), backpack.extend(copy.deepcopy(loss))
    with backpack.backpack(extension):
        loss(model(x), y).backward()
    return model


@pytest.mark.parametrize("loss_name", networks.LOSSES)
@pytest.mark.parametrize("name", networks.MODELS)
def test_the_diagonal(name: str, loss_name: str) -> None:
    (model, x), (loss, y) = networks.network(name), networks.loss_and_targets(loss_name)
    theirs = extended(model, loss, x, y, backpack.extensions.DiagGGNExact())
    ours = natgrad.fisher(model, loss, (x, y), metric="diagonal").diagonal()
    close(ours, torch.cat([p.diag_ggn_exact.reshape(-1) for p in theirs.parameters()]))


@pytest.mark.parametrize("loss_name", networks.LOSSES)
def test_exact_factors_where_no_position_is_shared(loss_name: str) -> None:
    """KFLR keeps the bias apart, with the factor G alone; ours has it in one block with the weight."""
    (model, x), (loss, y) = networks.network("mlp"), networks.loss_and_targets(loss_name)
    theirs = extended(model, loss, x, y, backpack.extensions.KFLR())
    ours = natgrad.fisher(model, loss, (x, y), metric="kfac")
    for name, parameter in theirs.named_parameters():
        factors: list[Tensor] = parameter.kflr
        expected = torch.kron(*factors) if len(factors) == 2 else factors[0]
        close(ours.restrict([name]).to_dense(), expected)


def test_exact_factors_of_a_convolution_with_one_position() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 4), nn.Flatten(), nn.Linear(3, networks.CLASSES)).double()
    x = torch.randn(networks.N, 2, 4, 4, dtype=torch.float64)
    loss, y = networks.loss_and_targets("cross-entropy-mean")
    theirs = extended(model, loss, x, y, backpack.extensions.KFLR())
    ours = natgrad.fisher(model, loss, (x, y), metric="kfac")
    close(ours.restrict(["0.weight"]).to_dense(), torch.kron(*theirs[0].weight.kflr))
    close(ours.restrict(["0.bias"]).to_dense(), theirs[0].bias.kflr[0])
