"""metric="kfac": its factors are second moments, and coincide with the Fisher block where theory says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from natgrad import KFAC, ConfigError, NonFiniteError, NotPositiveDefiniteError, StepError
from natgrad.operators import Kronecker
from oracle import fisher as oracle

DTYPE = torch.float64


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(5))


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(6))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).to(DTYPE)


def factors(shown) -> dict[str, tuple[Tensor, Tensor]]:
    blocks = shown.estimate.operator().blocks
    assert all(isinstance(block, Kronecker) for block in blocks)
    return {block.space.names[0].rpartition(".")[0]: (block.A, block.G) for block in blocks}


def assert_same_factors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        for side, mine, theirs in zip("AG", found[name], expected[name]):
            torch.testing.assert_close(mine, theirs, msg=lambda m, n=name, s=side: f"{s} of {n}: {m}")


def block_diagonal(F: Tensor, model: nn.Module, layers: list[list[str]]) -> Tensor:
    kept = torch.zeros_like(F)
    for names in layers:
        index = oracle.positions(model, names)
        kept[index[:, None], index] = F[index[:, None], index]
    return kept


BY_LAYER = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 2), (4, 3, 2)])
def test_factors_are_second_moments(shape: tuple, bias: bool, reduction: str, show: Callable) -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias)).to(DTYPE)
    loss, x, y = nn.MSELoss(reduction=reduction), real(*shape), real(*shape[:-1], 3)
    shown = show(KFAC(kind="exact"), model, loss)
    shown.observe(x, y)
    H = oracle.output_information(loss, model(x).detach(), y)
    assert_same_factors(factors(shown), oracle.kronecker_factors(model, x, H))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_on_one_datum_it_is_the_fisher_block(loss: nn.Module, show: Callable) -> None:
    model, x, y = net(), real(1, 2), classes(1)
    shown = show(KFAC(kind="exact"), model, loss)
    shown.observe(x, y)
    expected = block_diagonal(oracle.fisher(model, loss, x, y), model, BY_LAYER)
    torch.testing.assert_close(shown.dense(), expected)


def test_on_deep_linear_gaussian_nets_it_is_the_fisher_block(show: Callable) -> None:
    """There the signals do not depend on the example, so that E[a aᵀ ⊗ g gᵀ] = E[a aᵀ] ⊗ E[g gᵀ] (Bernacchia 2018)."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).to(DTYPE)
    loss, x, y = nn.MSELoss(), real(7, 3), real(7, 2)
    shown = show(KFAC(kind="exact"), model, loss)
    shown.observe(x, y)
    layers = [[f"{k}.weight", f"{k}.bias"] for k in range(3)]
    F = oracle.fisher(model, loss, x, y)
    expected = block_diagonal(F, model, layers)
    torch.testing.assert_close(shown.dense(), expected)
    assert not torch.allclose(F, expected)  # layers are coupled all the same


def test_where_signals_and_inputs_are_independent_it_is_the_fisher_block(show: Callable) -> None:
    """Whitened inputs and signals that don't depend on them: every sign pattern of x with every branch."""

    class Independent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, both: Tensor) -> Tensor:
            x, scale = both[:, :2], both[:, 2:]
            return self.linear(x) * scale

    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DTYPE)] * 2)
    scales = torch.tensor([[0.5, 1.0], [2.0, -1.0], [0.1, 3.0]], dtype=DTYPE)
    x = torch.cat([signs.repeat_interleave(3, 0), scales.repeat(4, 1)], dim=1)
    model, loss, y = Independent().to(DTYPE), nn.MSELoss(), real(12, 2)
    shown = show(KFAC(kind="exact"), model, loss)
    shown.observe(x, y)
    torch.testing.assert_close(shown.dense(), oracle.fisher(model, loss, x, y))
    ((A, _),) = factors(shown).values()
    torch.testing.assert_close(A, torch.eye(3, dtype=DTYPE))


def test_in_general_it_is_another_matrix(show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    shown = show(KFAC(kind="exact"), model, loss)
    shown.observe(x, y)
    F = block_diagonal(oracle.fisher(model, loss, x, y), model, BY_LAYER)
    assert not torch.allclose(shown.dense(), F, rtol=1e-2)
    assert 0.2 < shown.dense().trace() / F.trace() < 5


@pytest.mark.parametrize("kind", ["mc", "rademacher"])
def test_sampled_kinds_converge_to_the_exact(kind: str, show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    exact = show(KFAC(kind="exact"), model, loss)
    exact.observe(x, y)
    draws = []
    for seed in range(250):
        shown = show(KFAC(kind=kind), model, loss, seed=seed)
        shown.observe(x, y)
        draws.append(torch.cat([G.flatten() for _, G in factors(shown).values()]))
    samples = torch.stack(draws)
    expected = torch.cat([G.flatten() for _, G in factors(exact).values()])
    error = samples.std(0) / len(draws) ** 0.5
    assert torch.all((samples.mean(0) - expected).abs() <= 4 * error + 1e-12)


def test_empirical_is_made_of_real_gradients(show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    shown = show(KFAC(kind="empirical"), model, loss)
    shown.observe(x, y)
    z = model(x)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(z, y, reduction="sum"), z)
    torch.testing.assert_close(factors(shown)["2"][1], g.T @ g / 6)


def test_groups_of_a_convolution_have_factors_of_their_own(show: Callable) -> None:
    model, loss, x = nn.Conv1d(4, 6, 2, groups=2).to(DTYPE), nn.MSELoss(), real(3, 4, 5)
    shown = show(KFAC(kind="exact"), model, loss)
    shown.observe(x, real(3, 6, 4))
    (block,) = shown.estimate.operator().blocks
    patches = x.unfold(2, 2, 1).transpose(1, 2)  # [N, L, C, k]
    for group in range(2):
        a = patches[:, :, 2 * group : 2 * group + 2].reshape(12, 4)
        a = torch.cat([a, torch.ones(12, 1, dtype=DTYPE)], dim=1)
        torch.testing.assert_close(block.A[group], a.T @ a / 12)
        torch.testing.assert_close(block.G[group], 12 * (2 / 72) * torch.eye(3, dtype=DTYPE))


def test_a_weight_that_is_used_twice_has_one_block_over_all_its_rows(show: Callable) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model, x = Twice().to(DTYPE), real(5, 3)
    shown = show(KFAC(kind="exact"), model, nn.MSELoss())
    shown.observe(x, real(5, 3))
    ones, zeros = torch.ones(5, 1, dtype=DTYPE), torch.zeros(5, 1, dtype=DTYPE)
    hidden = torch.tanh(model.first(x)).detach()
    rows = torch.cat([torch.cat([x, ones], 1), torch.cat([hidden, zeros], 1)])
    ((A, _),) = factors(shown).values()
    torch.testing.assert_close(A, rows.T @ rows / 10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_micro_batches_are_one_batch(kind: str, reduction: str, show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(reduction=reduction), real(6, 2), classes(6)
    whole, parts = show(KFAC(kind=kind), model, loss), show(KFAC(kind=kind), model, loss)
    whole.observe(x, y)
    for k, rows in enumerate(torch.arange(6).split(2)):
        parts.observe(x[rows], y[rows], first=k == 0)
    assert_same_factors(factors(parts), factors(whole))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_averages_are_corrected_for_their_bias(reduction: str, show: Callable) -> None:
    model, loss, decay = net(), nn.MSELoss(reduction=reduction), 0.8
    shown = show(KFAC(kind="exact", decay=decay), model, loss)
    seen, weights = [], []
    for step in range(4):
        x, y = real(5, 2) * (step + 1), real(5, 3)
        shown.observe(x, y, step)
        H = oracle.output_information(loss, model(x).detach(), y)
        seen.append(oracle.kronecker_factors(model, x, H))
        weights = [w * decay for w in weights] + [1.0]
        expected = {
            name: tuple(sum(w * f[name][k] for w, f in zip(weights, seen)) / sum(weights) for k in (0, 1))
            for name in seen[0]
        }
        assert_same_factors(factors(shown), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(11, 2), (11, 3, 2)])
def test_thinned_factors_are_those_of_the_examples_that_stay(
    shape: tuple, reduction: str, show: Callable
) -> None:
    model, loss, x, y = net(), nn.MSELoss(reduction=reduction), real(*shape), real(*shape[:-1], 3)
    thinned, kept = show(KFAC(kind="exact", examples=4), model, loss), show(KFAC(kind="exact"), model, loss)
    thinned.observe(x, y)
    kept.observe(x[::3], y[::3])
    share = (
        1.0 if reduction == "mean" else 4 / 11
    )  # the sum over a batch is estimated, not that over what stays
    for name, (A, G) in factors(kept).items():
        torch.testing.assert_close(factors(thinned)[name][0], A)
        torch.testing.assert_close(factors(thinned)[name][1], G / share)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_of_examples_with_many_positions_are_unbiased(reduction: str, show: Callable) -> None:
    """14 sets of 40 examples with three positions, so that there are about as many rows as examples: within four
    standard errors over many steps. Where there is one position, nothing is summed.
    """
    x, y = real(40, 3, 2), classes(40)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).to(DTYPE)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    whole = show(KFAC(kind="exact", examples=None), model, loss)
    whole.observe(x, y)
    expected = factors(whole)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in expected}
    for step in range(60):
        some = show(KFAC(kind="exact", examples=40), model, loss)
        some.observe(x, y, step=step)
        for name, pair in factors(some).items():
            found[name].append(pair)
    for k in range(2):
        one, exact = torch.stack([pair[k] for pair in found["0"]]), expected["0"][k]
        error = one.std(0) / 60**0.5
        assert one.std(0).mean() > 1e-2 * exact.abs().mean()
        assert ((one.mean(0) - exact).abs() <= 4 * error + 1e-12).all()
        for pair in found["3"]:
            torch.testing.assert_close(pair[k], expected["3"][k])


def test_a_smaller_batch_weighs_less(show: Callable) -> None:
    model, loss = net(), nn.MSELoss()
    shown, both = (show(KFAC(kind="exact", decay=0.999999999), model, loss) for _ in range(2))
    x, y = real(6, 2), real(6, 3)
    shown.observe(x[:5], y[:5], 0)
    shown.observe(x[5:], y[5:], 1)
    both.observe(x, y, 0)
    for name, (A, G) in factors(both).items():
        torch.testing.assert_close(factors(shown)[name][0], A, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(factors(shown)[name][1], G, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_layer_may_be_missing_from_the_first_micro_batch(reduction: str, show: Callable) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.way = nn.Linear(2, 3), nn.Linear(2, 3), "left"

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.way)(x)

    model, loss, x, y = Either().to(DTYPE), nn.MSELoss(reduction=reduction), real(4, 2), real(4, 3)
    shown = show(KFAC(kind="exact"), model, loss)
    for step in range(2):
        for way in ("left", "right"):
            model.way = way
            shown.observe(x, y, step, first=way == "left")
        assert_same_factors({"x": factors(shown)["right"]}, {"x": factors(shown)["left"]})


def test_solve_is_the_factored_tikhonov_inverse(show: Callable) -> None:
    """(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹, π² = (tr A / dim A) / (tr G / dim G): Martens & Grosse 2015, §6.3."""
    model, loss, x, y, damping = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6), 0.05
    shown = show(KFAC(kind="exact"), model, loss)
    shown.observe(x, y)
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    solved = shown.estimate.solve(g, damping, 0)
    for layer, (A, G) in factors(shown).items():
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        V = torch.cat([g[f"{layer}.weight"], g[f"{layer}.bias"][:, None]], dim=1)
        V = torch.linalg.solve(G + damping**0.5 / pi * torch.eye(len(G), dtype=DTYPE), V)
        V = torch.linalg.solve(A + damping**0.5 * pi * torch.eye(len(A), dtype=DTYPE), V.T).T
        torch.testing.assert_close(solved[f"{layer}.weight"], V[:, :-1])
        torch.testing.assert_close(solved[f"{layer}.bias"], V[:, -1])
    alone = shown.estimate.solve({"2.bias": g["2.bias"]}, damping, 0)
    assert set(alone) <= {"2.weight", "2.bias"}
    assert torch.isfinite(alone["2.bias"]).all()


def test_a_fixed_period_keeps_the_inverses(show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    shown = show(KFAC(kind="exact", factors=1, inverses=3), model, loss)
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    solutions = []
    for step in range(4):
        shown.observe(x * (step + 1), y, step)
        solutions.append(oracle.flat(shown.estimate.solve(g, 0.1, step)).clone())
    assert torch.equal(solutions[0], solutions[1])
    assert torch.equal(solutions[1], solutions[2])
    assert not torch.equal(solutions[2], solutions[3])


@pytest.mark.parametrize("period", [1, 3])
def test_factors_are_due_by_their_period(period: int, show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    estimate = show(KFAC(factors=period), model, loss)
    due = []
    for step in range(7):
        due.append(estimate.estimate.due(step))
        if due[-1]:
            estimate.observe(x, y, step)
            assert estimate.estimate.due(step)  # for the other micro-batches of the step
    assert due == [step % period == 0 for step in range(7)]


def test_an_adapted_period_lengthens_where_nothing_moves(show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    shown = show(KFAC(kind="exact"), model, loss)
    steps = []
    for step in range(60):
        if shown.estimate.due(step):
            shown.observe(x, y, step)
            steps.append(step)
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 4


def test_its_state_restores_it(show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    shown, other = (show(KFAC(kind="exact", inverses=5), model, loss) for _ in range(2))
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    shown.observe(x, y, 0)
    shown.estimate.solve(g, 0.1, 0)
    other.estimate.load_state_dict(shown.estimate.state_dict())
    for step in (3, 4, 7, 12):  # not every step
        for one in (shown, other):
            one.observe(x + step, y, step)
        mine, theirs = (oracle.flat(one.estimate.solve(g, 0.1, step)) for one in (shown, other))
        assert torch.equal(mine, theirs)
        assert torch.equal(shown.dense(), other.dense())


def test_what_cannot_be_factorised_names_layer_and_factor(show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    shown = show(KFAC(kind="exact"), model, loss)
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    shown.observe(x, y)
    inner = shown.estimate._blocks["2.weight"].as_map
    inner.G[0, 0] = -1.0
    with pytest.raises(NotPositiveDefiniteError, match="factor G of 2 is not positive definite") as caught:
        shown.estimate.solve(g, 1e-6, 0)
    assert caught.value.layer == "2"
    assert caught.value.least_eigenvalue < 0
    inner.G[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="factor G of 2"):
        shown.estimate.solve(g, 1e-6, 0)


def test_nothing_is_averaged_that_is_not_finite(show: Callable) -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), real(6, 2), classes(6)
    shown = show(KFAC(kind="mc"), model, loss)
    shown.observe(x, y)
    before = shown.dense()
    bad = x.clone()
    bad[2] = torch.inf
    with pytest.raises(NonFiniteError):
        shown.observe(bad, y, 1)
    assert torch.equal(shown.dense(), before)


def test_it_must_have_seen_a_batch(show: Callable) -> None:
    estimate = show(KFAC(), net(), nn.CrossEntropyLoss()).estimate
    with pytest.raises(StepError, match="loss"):
        estimate.operator()
    with pytest.raises(StepError, match="loss"):
        estimate.solve({}, 0.1, 0)


@pytest.mark.parametrize("options", [{"kind": "full"}, {"decay": 1.0}, {"factors": 0}, {"inverses": -1}])
def test_options_are_checked(options: dict) -> None:
    with pytest.raises((ConfigError, TypeCheckError)):  # under pytest, the type is checked first
        KFAC(**options)


def test_a_damping_that_is_tried_leaves_no_trace(show: Callable) -> None:
    model = net()
    shown = show(KFAC(), model, nn.CrossEntropyLoss())
    shown.observe(real(6, 2), classes(6))
    estimate = shown.estimate
    gradient = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    before = estimate.solve(gradient, 0.5, 1)
    tried = estimate.attempt(gradient, 0.1, 2)
    other = show(KFAC(), model, nn.CrossEntropyLoss())
    other.observe(real(6, 2), classes(6))
    expected = other.estimate.solve(gradient, 0.1, 1)
    for name, value in estimate.solve(gradient, 0.5, 1).items():
        torch.testing.assert_close(value, before[name])
        torch.testing.assert_close(tried[name], expected[name])
