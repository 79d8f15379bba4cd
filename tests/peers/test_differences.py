"""Where natgrad and a peer differ: the oracle, which shares nothing with either, says who is right.

Each test also pins what the peer returns, so that a new release that changes its mind is noticed.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from oracle import fisher as oracle
from peers import networks
from peers.networks import apart, close, dense, from_curvlinops

curvlinops = pytest.importorskip("curvlinops", reason=networks.SKIPPED)
backpack = pytest.importorskip("backpack", reason=networks.SKIPPED)

pytestmark = [
    # torch's word on the full backward hooks that BackPACK registers, for a first layer whose input needs no gradient
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    # linear_operator, which curvlinops imports at its first product, compiles with it
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

EXACT: dict[str, Any] = {"fisher_type": "type-2", "separate_weight_and_bias": False}
IGNORED = 4  # examples


def reweighted(case: str) -> tuple[nn.Module, Tensor, nn.Module, Tensor]:
    """A loss whose examples don't all count alike, its targets, and the loss and targets where they do."""
    _, y = networks.loss_and_targets("cross-entropy-mean")
    what, _, reduction = case.rpartition(" ")
    plain = nn.CrossEntropyLoss(reduction=reduction)
    if what == "weight":
        weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        return nn.CrossEntropyLoss(weight=weight, reduction=reduction), y, plain, y
    ignoring = y.clone()
    ignoring[:IGNORED] = -100
    return plain, ignoring, plain, y


def varied(name: str) -> tuple[nn.Module, Tensor]:
    """A model whose predictions differ between examples, so that it matters which of them count."""
    model, x = networks.network(name)
    return model, 4 * x


REWEIGHTED = ("weight mean", "weight sum", "ignore_index mean", "ignore_index sum")


@pytest.mark.parametrize("case", REWEIGHTED)
def test_curvlinops_factors_leave_out_class_weights_and_ignore_index(case: str) -> None:
    """A linear layer's K-FAC block of its bias is the Fisher's own: Ã ends in E[1·1] = 1, and leaves G."""
    model, x = varied("mlp")
    loss, y, plain, all_y = reweighted(case)
    F = oracle.fisher(model, loss, x, y)
    theirs = from_curvlinops(curvlinops.KFACLinearOperator, model, loss, [(x, y)], **EXACT)
    ours = natgrad.fisher(model, loss, (x, y), metric="kfac").to_dense()
    for name in ("0.bias", "2.bias"):
        at = oracle.positions(model, [name])
        block = F[at][:, at]
        close(ours[at][:, at], block)
        assert apart(theirs[at][:, at], block) > 1e-3
    close(theirs, natgrad.fisher(model, plain, (x, all_y), metric="kfac").to_dense())


@pytest.mark.parametrize("case", REWEIGHTED)
@pytest.mark.parametrize("name", networks.MODELS)
def test_so_do_its_corrected_eigenvalues(name: str, case: str) -> None:
    """EKFAC has the Fisher's trace (George et al. 2018), as its eigenvalues are a diagonal in an orthonormal basis."""
    model, x = varied(name)
    loss, y, plain, all_y = reweighted(case)
    trace = oracle.fisher(model, loss, x, y).trace()
    theirs = from_curvlinops(curvlinops.EKFACLinearOperator, model, loss, [(x, y)], **EXACT)
    close(natgrad.fisher(model, loss, (x, y), metric="ekfac").trace(), trace)
    assert abs(theirs.trace() / trace - 1) > 1e-3
    close(theirs.trace(), oracle.fisher(model, plain, x, all_y).trace())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backpacks_diagonal_counts_ignored_targets(reduction: str) -> None:
    model, x = varied("mlp")
    loss, y, _, all_y = reweighted(f"ignore_index {reduction}")
    theirs = _diagonal_of_backpack(model, loss, x, y)
    truth = oracle.fisher(model, loss, x, y).diagonal()
    close(natgrad.fisher(model, loss, (x, y), metric="diagonal").diagonal(), truth)
    assert apart(theirs, truth) > 1e-3
    close(theirs, oracle.fisher(model, loss, x, all_y).diagonal())


def test_backpacks_factors_of_a_convolution_are_too_large_by_its_positions() -> None:
    """On images that are constant the Fisher of a 1×1 convolution is a Kronecker product: E[(Σg)(Σg)ᵀ] ⊗ E[aaᵀ].

    This holds for one example; `sharing="reduce"` has it. KFLR sums signals and the inputs' outer products over
    positions both, and is S times too large. `sharing="expand"` sums g gᵀ over positions, which is right when signals
    of different positions are uncorrelated.
    """
    torch.manual_seed(0)
    S = 16
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(3 * S, networks.CLASSES)).double()
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64).expand(1, 2, 4, 4).contiguous()
    loss, y = nn.CrossEntropyLoss(), torch.zeros(1, dtype=torch.long)
    at = oracle.positions(model, ["0.weight"])
    block = oracle.fisher(model, loss, x, y)[at][:, at]
    theirs = torch.kron(*_extended(model, loss, x, y, backpack.extensions.KFLR())[0].weight.kflr)
    metric = natgrad.KFAC(kind="exact", sharing="reduce")
    close(natgrad.fisher(model, loss, (x, y), metric=metric).restrict(["0.weight"]).to_dense(), block)
    close(theirs, S * block)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fishers_of_the_squared_error_differ_by_the_variance_assumed(reduction: str) -> None:
    """Both are right, each for its own density.

    natgrad reads Σ(z − y)² as twice the nll of a unit variance, curvlinops as the nll of variance ½, which makes its
    empirical Fisher twice ours on the same targets. Over targets of its own density each has the Gauss–Newton matrix
    as its mean. Here the targets are z ± σ with all signs, which have the density's first two moments.
    """
    model, x = networks.network("mlp")
    loss = nn.MSELoss(reduction=reduction)
    z = model(x).detach()
    F = oracle.fisher(model, loss, x, z)
    signs = [
        torch.tensor(s, dtype=torch.float64) for s in itertools.product((-1, 1), repeat=networks.CLASSES)
    ]

    def ours(y: Tensor) -> Tensor:
        return natgrad.fisher(model, loss, (x, y), metric="dense", kind="empirical").to_dense()

    def theirs(y: Tensor) -> Tensor:
        return from_curvlinops(curvlinops.EFLinearOperator, model, loss, [(x, y)])

    y = torch.randn_like(z)
    close(2 * ours(y), theirs(y))
    close(torch.stack([ours(z + s) for s in signs]).mean(0), F)
    close(torch.stack([theirs(z + 0.5**0.5 * s) for s in signs]).mean(0), F)


def test_a_layer_used_twice_has_one_block_with_the_true_trace() -> None:
    """curvlinops' corrected eigenvalues leave out the products of one use with the other; natgrad's don't."""
    model, x = _Twice().double(), torch.randn(networks.N, 4, dtype=torch.float64)
    loss, y = networks.loss_and_targets("cross-entropy-mean")
    F = oracle.fisher(model, loss, x, y)
    close(from_curvlinops(curvlinops.GGNLinearOperator, model, loss, [(x, y)]), F)
    close(dense(natgrad.fisher(model, loss, (x, y), metric="matrixfree")), F)
    close(natgrad.fisher(model, loss, (x, y), metric="ekfac").trace(), F.trace())
    theirs = from_curvlinops(curvlinops.EKFACLinearOperator, model, loss, [(x, y)], **EXACT)
    assert abs(theirs.trace() / F.trace() - 1) > 1e-3


@pytest.mark.parametrize("loss_name", networks.LOSSES)
def test_corrected_eigenvalues_with_outputs_at_every_token(loss_name: str) -> None:
    """curvlinops refuses them."""
    (model, x), (loss, y) = networks.network("tokens"), networks.loss_and_targets(loss_name, 6)
    close(
        natgrad.fisher(model, loss, (x, y), metric="ekfac").trace(), oracle.fisher(model, loss, x, y).trace()
    )
    with pytest.raises(ValueError, match="Only 2d output"):
        from_curvlinops(curvlinops.EKFACLinearOperator, model, loss, [(x, y)], **EXACT)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def _extended(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, extension: Any) -> Any:
    model, loss = backpack.extend(copy.deepcopy(model)), backpack.extend(copy.deepcopy(loss))
    with backpack.backpack(extension):
        loss(model(x), y).backward()
    return model


def _diagonal_of_backpack(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    extended = _extended(model, loss, x, y, backpack.extensions.DiagGGNExact())
    return torch.cat([p.diag_ggn_exact.reshape(-1) for p in extended.parameters()])
