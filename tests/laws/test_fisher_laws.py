"""`natgrad.fisher` is the definition of F in every representation, for every layer, likelihood and reduction."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import natgrad
from natgrad import CoverageWarning
from oracle import fisher as oracle
from oracle.problems import COVERED, LOSSES, MODELS, Problem, problem, problems

DTYPE = torch.float64
FEW = settings(max_examples=8)
METRICS = ("dense", "diagonal", "block", "kfac", "ekfac", "gram", "matrixfree", natgrad.MatrixFree(memory=0))


def fisher(p: Problem, metric="dense", kind=None, data=None, **options):
    """F, without the warning about what no rule covers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        data = (p.x, p.y) if data is None else data
        return natgrad.fisher(p.model, p.loss, data, metric, kind, **options)


def truth(p: Problem) -> Tensor:
    return oracle.fisher(p.model, p.loss, p.x, p.y)


def blocks_of(p: Problem, F: Tensor, spaces: list) -> Tensor:
    kept = torch.zeros_like(F)
    for space in spaces:
        index = oracle.positions(p.model, space.names)
        kept[index[:, None], index] = F[index[:, None], index]
    return kept


def all_pairs() -> list:
    """Every model with every loss at least once, and every reduction with each."""
    return [
        pytest.param(m, l, r, id=f"{m}-{l}-{r}")
        for (m, l), r in zip(
            itertools.product(MODELS, LOSSES), itertools.cycle(["mean", "sum", "sum", "mean"])
        )
    ]


@pytest.mark.parametrize(("model", "loss", "reduction"), all_pairs())
def test_exact_representations_are_the_definition(model: str, loss: str, reduction: str) -> None:
    p = problem(model, loss, reduction)
    F = truth(p)
    for metric in ("dense", "gram", "matrixfree", natgrad.MatrixFree(memory=0)):
        torch.testing.assert_close(fisher(p, metric).to_dense(), F)
    torch.testing.assert_close(fisher(p, "diagonal", "exact").to_dense(), torch.diag(F.diagonal()))
    block = fisher(p, "block")
    torch.testing.assert_close(block.to_dense(), blocks_of(p, F, [b.space for b in block.blocks]))


@FEW
@given(
    p=problems(),
    metric=st.sampled_from(METRICS),
    cut=st.integers(1, 3),
)
def test_batches_are_one_batch(p: Problem, metric: str, cut: int) -> None:
    whole = fisher(p, metric)
    cuts = fisher(p, metric, data=p.parts(cut, len(p.x) - cut))
    torch.testing.assert_close(cuts.to_dense(), whole.to_dense())
    sliced = fisher(p, metric, batch_size=cut)
    torch.testing.assert_close(sliced.to_dense(), whole.to_dense())


@FEW
@given(
    p=problems(losses=("mse", "ce", "bce", "gaussian")),
    metric=st.sampled_from(METRICS),
)
def test_a_weight_is_a_number_of_copies(p: Problem, metric: str) -> None:
    """With weights that count copies, F of the sum is that of the data with the copies in it."""
    p.loss.reduction = "sum"
    counts = torch.arange(len(p.x)) % 3
    weighted = fisher(p, metric, weights=counts.to(DTYPE), data=p.parts(2, len(p.x) - 2))
    copies = (p.x.repeat_interleave(counts, 0), p.y.repeat_interleave(counts, 0))
    torch.testing.assert_close(weighted.to_dense(), fisher(p, metric, data=copies).to_dense())


@FEW
@given(
    p=problems(losses=("mse", "ce", "bce", "poisson")),
    metric=st.sampled_from(["dense", "block", "gram", "matrixfree"]),
)
def test_the_empirical_fisher_is_the_definition(p: Problem, metric: str) -> None:
    F = oracle.empirical(p.model, p.loss, p.x, p.y)
    found = fisher(p, metric, "empirical")
    expected = blocks_of(p, F, [b.space for b in found.blocks]) if metric == "block" else F
    torch.testing.assert_close(found.to_dense(), expected)


@pytest.mark.parametrize("kind", ["mc", "rademacher"])
@pytest.mark.parametrize("metric", ["dense", "diagonal", "ekfac", "gram"])
def test_sampled_signals_are_right_on_average(metric: str, kind: str) -> None:
    """Within four standard errors of the trace, over 200 seeds; and the same seed gives the same matrix."""
    p = problem("conv1d", "ce", examples=4)
    exact = truth(p).trace()
    traces = torch.stack([fisher(p, metric, kind, seed=seed).trace() for seed in range(200)])
    error = traces.std() / len(traces) ** 0.5
    assert abs(traces.mean() - exact) < 4 * error
    assert torch.equal(traces[3], fisher(p, metric, kind, seed=3).trace())


def test_sampled_signals_do_not_fit_kfac_on_average_but_on_one_datum() -> None:
    p = problem("linear", "ce", examples=1)
    mean = torch.stack([fisher(p, "kfac", "mc", seed=seed).to_dense() for seed in range(300)])
    exact = fisher(p, "kfac").to_dense()
    error = mean.std(0) / len(mean) ** 0.5
    assert ((mean.mean(0) - exact).abs() <= 4 * error + 1e-12).all()


# ------------------------------------------------------------------------------------------------ EKFAC and K-FAC


@FEW
@given(p=problems(), kind=st.sampled_from(["exact", "mc", "empirical", "rademacher"]))
def test_ekfac_has_the_trace_and_is_nearer_than_kfac(p: Problem, kind: str) -> None:
    if kind == "empirical" and isinstance(p.loss, nn.GaussianNLLLoss):
        kind = "exact"
    block, kfac, ekfac = (fisher(p, metric, kind) for metric in ("block", "kfac", "ekfac"))
    torch.testing.assert_close(ekfac.trace(), block.trace())
    F, K, E = ({b.space.names: b.to_dense() for b in op.blocks} for op in (block, kfac, ekfac))
    for names in K:
        if names in F:  # elsewhere both have the diagonal
            assert (F[names] - E[names]).norm() <= (F[names] - K[names]).norm() * (1 + 1e-9)


@FEW
@given(p=problems(COVERED, ("mse", "ce", "bce", "poisson")))
def test_on_one_datum_and_position_all_of_them_are_the_block(p: Problem) -> None:
    p.x, p.y = p.x[:1], p.y[:1]
    block, kfac, ekfac = (fisher(p, metric) for metric in ("block", "kfac", "ekfac"))
    F, K, E = ({b.space.names: b.to_dense() for b in op.blocks} for op in (block, kfac, ekfac))
    single = {
        names
        for names, module in (
            (names, dict(p.model.named_modules())[names[0].rpartition(".")[0]]) for names in F
        )
        if isinstance(module, nn.Linear) and not p.name.startswith(("tokens", "twice", "tied"))
    }
    for names in single:
        torch.testing.assert_close(K[names], F[names])
        torch.testing.assert_close(E[names], F[names])


class Pooled(nn.Module):
    """A deep linear net on positions, whose mean is the output."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers(x)
        return z.mean(1) if self.pooled else z


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("pooled", "right", "wrong"), [(False, "expand", "reduce"), (True, "reduce", "expand")]
)
@pytest.mark.parametrize("metric", [natgrad.KFAC, natgrad.EKFAC])
def test_sharing_is_exact_in_its_setting(
    metric, pooled: bool, right: str, wrong: str, reduction: str
) -> None:
    """Eschenhagen et al. 2023, Propositions 1 and 2: deep linear nets with a squared error."""
    model, x = Pooled(pooled).to(DTYPE), torch.randn(5, 3, 3, dtype=DTYPE)
    p = Problem(model, nn.MSELoss(reduction=reduction), x, torch.zeros_like(model(x)).detach(), "pooled")
    block = fisher(p, "block").to_dense()
    torch.testing.assert_close(fisher(p, metric(kind="exact", sharing=right)).to_dense(), block)
    assert not torch.allclose(
        fisher(p, natgrad.KFAC(kind="exact", sharing=wrong)).to_dense(), block, rtol=1e-2
    )


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("metric", [natgrad.KFAC, natgrad.EKFAC])
def test_factors_of_scores_are_exact_wherever_a_kronecker_product_is(metric, pooled: bool) -> None:
    """A Kronecker product is the product of its partial traces, over its trace: both settings above."""
    model, x = Pooled(pooled).to(DTYPE), torch.randn(5, 3, 3, dtype=DTYPE)
    p = Problem(model, nn.MSELoss(), x, torch.zeros_like(model(x)).detach(), "pooled")
    found = fisher(p, metric(kind="exact", sharing="scores")).to_dense()
    torch.testing.assert_close(found, fisher(p, "block").to_dense())


@FEW
@given(p=problems(COVERED, LOSSES))
def test_factors_of_scores_have_the_trace_of_f(p: Problem) -> None:
    """Also where positions share a weight, of which "expand" leaves out what different ones have in common."""
    found = fisher(p, natgrad.KFAC(kind="exact", sharing="scores"))
    torch.testing.assert_close(found.trace(), fisher(p, "block").trace())


@FEW
@given(p=problems(("linear", "no bias"), LOSSES))
def test_with_one_position_sharing_does_not_matter(p: Problem) -> None:
    expand, reduce = (fisher(p, natgrad.KFAC(kind="exact", sharing=s)) for s in ("expand", "reduce"))
    torch.testing.assert_close(expand.to_dense(), reduce.to_dense())


@FEW
@given(p=problems(("linear",), ("mse",)))
def test_for_a_deep_linear_net_kfac_and_ekfac_are_the_block(p: Problem) -> None:
    p.model[1] = nn.Identity()
    block = fisher(p, "block").to_dense()
    torch.testing.assert_close(fisher(p, "kfac").to_dense(), block)
    torch.testing.assert_close(fisher(p, "ekfac").to_dense(), block)


# ------------------------------------------------------------------------------------------------ what F is


@FEW
@given(p=problems(COVERED, ("ce", "bce", "poisson")))
def test_it_predicts_the_divergence(p: Problem) -> None:
    """KL(θ‖θ+δ) = ½ δᵀFδ + O(δ³): the error falls eightfold, or more, when δ is halved."""
    F = fisher(p)
    delta = torch.randn(F.space.numel, dtype=DTYPE) * 0.02

    def error(scale: float) -> float:
        found = natgrad.kl(p.model, p.loss, (p.x, p.y), scale * delta)
        torch.testing.assert_close(found.predicted, 0.5 * scale**2 * F.inner(delta, delta))
        return abs(float(found.true - found.predicted))

    assert error(0.5) <= error(1.0) / 6 + 1e-14


@FEW
@given(
    p=problems(
        losses=(
            "ce",
            "ce weighted",
            "ce ignoring",
            "ce smoothed",
            "ce soft",
            "mse",
            "bce weighted",
            "poisson",
        )
    )
)
def test_in_natural_parameters_it_is_the_gauss_newton_matrix(p: Problem) -> None:
    ggn = natgrad.ggn(p.model, p.loss, p.parts(1, len(p.x) - 1))
    torch.testing.assert_close(ggn.to_dense(), truth(p))


@FEW
@given(p=problems(losses=("ce", "mse", "bce", "poisson", "gaussian")))
def test_the_hessian_is_the_second_derivative(p: Problem) -> None:
    names = [name for name, _ in p.model.named_parameters()]
    values = dict(p.model.named_parameters())

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([values[n].numel() for n in names])
        z = torch.func.functional_call(
            p.model, {n: v.view_as(values[n]) for n, v in zip(names, parts)}, (p.x,)
        )
        return p.loss(z[0], p.y, z[1]) if isinstance(z, tuple) else p.loss(z, p.y)

    expected = torch.func.hessian(loss)(oracle.parameters(p.model))
    found = natgrad.hessian(p.model, p.loss, p.parts(2, len(p.x) - 2))
    torch.testing.assert_close(found.to_dense(), expected)


@FEW
@given(p=problems(("linear", "conv1d", "layer norm"), ("ce",)))
def test_it_is_the_hessian_on_average_over_targets(p: Problem) -> None:
    """F = E[∇² −log p(y)] with y from the model; here with the expectation over one example's classes."""
    p.x, p.loss.reduction = p.x[:1], "sum"
    probabilities = torch.softmax(p.model(p.x), 1)[0].detach()
    hessians = [natgrad.hessian(p.model, p.loss, (p.x, torch.tensor([c]))).to_dense() for c in range(3)]
    expected = sum(q * H for q, H in zip(probabilities, hessians))
    torch.testing.assert_close(fisher(p, data=p.x).to_dense(), expected)
