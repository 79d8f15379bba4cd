"""The quadratic model of a step: M(δ) = h + ∇hᵀδ + ½ δᵀ(F + λI)δ by explicit formulas with the oracle's F."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from natgrad.likelihoods import likelihood_from
from natgrad.optim.model import Basis, Expansion, Probe, expand
from natgrad.optim.watcher import Watcher
from natgrad.steps import QuadraticModel
from natgrad.tape import Batch
from oracle import fisher as oracle

DTYPE = torch.float64


def random_model(seed: int, size: int, damping: float) -> QuadraticModel:
    source = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size + 2, dtype=DTYPE, generator=source)
    directions = torch.randn(size, size + 3, dtype=DTYPE, generator=source)
    linear = torch.randn(size, dtype=DTYPE, generator=source)
    return QuadraticModel(1.0, linear, root @ root.T, damping * directions @ directions.T)


@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.0, 1e-3, 10.0]))
def test_minimise_minimises(seed: int, size: int, damping: float) -> None:
    model = random_model(seed, size, damping)
    c = model.minimise()
    exact = -torch.linalg.solve(model.curvature, model.linear)
    least = -0.5 * float(model.linear @ torch.linalg.solve(model.curvature, model.linear))
    assert model.change(exact) == pytest.approx(least)
    # A relative ridge of 1e-6 is all that stands between.
    assert least <= model.change(c) + 1e-12 * abs(least)
    assert model.change(c) <= least + 1e-2 * abs(least)
    if torch.linalg.cond(model.curvature) < 1e3:
        assert model.change(c) == pytest.approx(least, rel=1e-5)
        torch.testing.assert_close(c, exact, rtol=1e-2, atol=1e-2)


@given(st.integers(0, 10_000), st.floats(-2, 2))
def test_what_is_fixed_stays_and_the_rest_minimises(seed: int, value: float) -> None:
    model = random_model(seed, 3, 1.0)
    c = model.minimise({1: value})
    assert float(c[1]) == value
    Q = model.curvature
    free = torch.tensor([0, 2])
    slope = (model.linear + Q @ c)[free]
    assert slope.norm() <= 1e-3 * (model.linear.norm() + abs(value) * Q.norm())
    assert torch.equal(model.minimise({0: 1.0, 1: 2.0, 2: 3.0}), torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE))


def test_a_direction_that_is_zero_or_given_twice_does_no_harm() -> None:
    one = torch.ones(1, 1, dtype=DTYPE)
    zero = QuadraticModel(
        0.0,
        torch.tensor([-1.0, 0.0], dtype=DTYPE),
        torch.block_diag(one, 0 * one),
        torch.zeros(2, 2, dtype=DTYPE),
    )
    torch.testing.assert_close(zero.minimise(), torch.tensor([1.0, 0.0], dtype=DTYPE), rtol=1e-5, atol=0)
    twice = QuadraticModel(
        0.0,
        torch.full((2,), -1.0, dtype=DTYPE),
        torch.ones(2, 2, dtype=DTYPE),
        torch.zeros(2, 2, dtype=DTYPE),
    )
    assert float(twice.minimise().sum()) == pytest.approx(1.0, rel=1e-5)
    assert float(twice.minimise().abs().max()) < 2


def test_change_and_norm_are_what_they_say() -> None:
    model = random_model(3, 4, 0.1)
    c = torch.randn(4, dtype=DTYPE)
    assert model.change(c) == pytest.approx(
        float(model.linear @ c + 0.5 * c @ (model.fisher + model.damping) @ c)
    )
    assert model.fisher_norm(c) == pytest.approx(float((c @ model.fisher @ c).sqrt()))
    assert model.change(torch.zeros(4, dtype=DTYPE)) == 0


class Case:
    """A batch, a gradient and directions in parts, with everything that the formulas need."""

    def __init__(self, loss: nn.Module, build=None, seed: int = 0, examples: int = 6) -> None:
        torch.manual_seed(seed)
        self.model = (build or (lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))))().to(
            DTYPE
        )
        self.loss = loss
        self.x = torch.randn(examples, 2, dtype=DTYPE)
        kind = nn.CrossEntropyLoss
        self.y = (
            torch.randint(3, (examples,)) if isinstance(loss, kind) else torch.randn(examples, 3, dtype=DTYPE)
        )
        if isinstance(loss, (nn.BCEWithLogitsLoss, nn.PoissonNLLLoss)):
            self.y = (self.y > 0).to(DTYPE)
        self.names = list(oracle.trainable(self.model))
        draw = lambda: {n: torch.randn_like(p) for n, p in oracle.trainable(self.model).items()}  # noqa: E731
        self.gradient, self.direction, self.previous = draw(), draw(), draw()
        self.parts = [self.names[:2], self.names[2:]]
        self.turn = 0

    @property
    def batches(self) -> list[Batch]:
        return [Batch((self.x,), {}, self.y, len(self.x))]

    def expansion(self, damping: float = 0.0, penalty: float = 0.0, fraction: float = 1.0) -> Expansion:
        likelihood = likelihood_from(self.loss)

        def never() -> bool:
            return False

        watcher = Watcher(self.model, self.loss, likelihood, None, None, [], never, lambda *_: None, never)
        watcher.batches = self.batches
        with torch.no_grad():
            return expand(
                Basis(self.direction, self.parts, self.previous),
                Probe.of(self.model, likelihood, watcher, fraction, self.turn),
                2.5,
                self.gradient,
                damping,
                dict.fromkeys(self.names, penalty),
            )

    def matrix(self) -> Tensor:
        """The directions as columns, [P, 3]: two parts of Δ and the last step."""
        columns = []
        for part in self.parts:
            columns.append(
                oracle.flat({n: v if n in part else torch.zeros_like(v) for n, v in self.direction.items()})
            )
        return torch.stack([*columns, oracle.flat(self.previous)], dim=1)


LOSSES = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
    nn.BCEWithLogitsLoss(reduction="sum"),
    nn.PoissonNLLLoss(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda l: f"{type(l).__name__}-{l.reduction}")
def test_linear_fisher_and_damping_are_explicit_formulas(loss: nn.Module) -> None:
    case = Case(loss)
    model, D = case.expansion(damping=0.3, penalty=0.2).model, case.matrix()
    F = oracle.fisher(case.model, loss, case.x, case.y)
    assert model.loss == 2.5
    torch.testing.assert_close(model.linear, D.T @ oracle.flat(case.gradient))
    torch.testing.assert_close(model.fisher, D.T @ F @ D)
    torch.testing.assert_close(model.damping, 0.5 * D.T @ D)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda l: f"{type(l).__name__}-{l.reduction}")
def test_the_slices_own_model_has_its_own_slope(loss: nn.Module) -> None:
    case = Case(loss)
    local, D = case.expansion(damping=0.3, penalty=0.2).local, case.matrix()
    value = loss(case.model(case.x), case.y)
    value.backward()
    assert local.loss == pytest.approx(value.item())
    torch.testing.assert_close(local.linear, D.T @ oracle.gradient(case.model))
    torch.testing.assert_close(local.damping, 0.3 * D.T @ D)  # the slice's loss is without the penalty


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_are_one_batch(reduction: str) -> None:
    case = Case(nn.CrossEntropyLoss(reduction=reduction))
    whole = case.expansion()

    class Parts(Case):
        @property
        def batches(self) -> list[Batch]:
            return [
                Batch((self.x[rows],), {}, self.y[rows], len(rows))
                for rows in torch.arange(len(self.x)).split(2)
            ]

    parts = Parts(nn.CrossEntropyLoss(reduction=reduction)).expansion()
    torch.testing.assert_close(parts.model.fisher, whole.model.fisher)
    torch.testing.assert_close(parts.local.linear, whole.local.linear)
    assert parts.local.loss == pytest.approx(whole.local.loss)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_slices_stand_for_the_batch_and_take_turns(reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    case = Case(loss, examples=128)
    found, D = [], case.matrix()
    for turn in range(4):
        case.turn = turn
        found.append(case.expansion(fraction=0.25).model.fisher)
        rows = slice(32 * turn, 32 * turn + 32)
        F = oracle.fisher(case.model, loss, case.x[rows], case.y[rows])
        torch.testing.assert_close(found[-1], (4.0 if reduction == "sum" else 1.0) * D.T @ F @ D)
    whole = oracle.fisher(case.model, loss, case.x, case.y)
    torch.testing.assert_close(torch.stack(found).mean(0), D.T @ whole @ D)
    case.turn = 4
    torch.testing.assert_close(case.expansion(fraction=0.25).model.fisher, found[0])


def test_every_example_has_its_turn() -> None:
    from natgrad.optim.model import _slices

    for total, fraction in [(100, 0.6), (70, 0.5), (33, 0.1), (250, 0.15), (5, 0.2), (1, 0.5)]:
        x = torch.arange(total)
        batches = [Batch((rows,), {}, None, len(rows)) for rows in x.split(24)]
        seen: set[int] = set()
        for turn in range(20):
            pieces = _slices(batches, fraction, turn)
            rows = torch.cat([piece.args[0] for piece in pieces]).tolist()
            assert (
                sum(piece.examples for piece in pieces) == len(rows) >= min(total, round(fraction * total), 1)
            )
            seen.update(rows)
        assert seen == set(range(total))


def test_a_slice_needs_fewer_examples_where_each_has_many_labels() -> None:
    from natgrad.optim.model import FEWEST_EVENTS, FEWEST_EXAMPLES, _slices

    def taken(targets: Tensor) -> int:
        return sum(piece.examples for piece in _slices([Batch((targets,), {}, targets, 64)], 0.01, 0))

    assert taken(torch.zeros(64, dtype=torch.long)) == FEWEST_EVENTS
    assert taken(torch.zeros(64, 2, dtype=torch.long)) == FEWEST_EVENTS / 2
    assert taken(torch.zeros(64, 50, dtype=torch.long)) == FEWEST_EXAMPLES
    assert taken(torch.zeros(64, 50)) == FEWEST_EVENTS  # numbers of one example belong together


def test_a_batch_is_cut_where_a_dimension_counts_examples() -> None:
    batch = Batch(
        (torch.arange(4), torch.zeros(8, 8)),
        {"mask": torch.arange(8).view(4, 2), "scale": torch.tensor(2.0), "flag": True},
        {"tokens": torch.arange(8), "other": torch.arange(3)},
        4,
    )
    cut = batch.slice(1, 3)
    assert cut.examples == 2
    assert cut.args[0].tolist() == [1, 2]
    assert cut.args[1].shape == (8, 8)  # an attention mask is no batch of examples
    assert cut.kwargs["mask"].tolist() == [[2, 3], [4, 5]]
    assert cut.kwargs["scale"] == 2.0
    assert cut.kwargs["flag"] is True
    assert cut.targets["tokens"].tolist() == [2, 3, 4, 5]  # tokens flattened into the first dimension
    assert len(cut.targets["other"]) == 3


def test_the_models_error_is_its_departure_from_the_loss() -> None:
    case = Case(nn.CrossEntropyLoss())
    expansion = case.expansion(damping=0.3)
    c = torch.tensor([0.02, -0.01, 0.015], dtype=DTYPE)
    before = case.loss(case.model(case.x), case.y).item()
    step = case.matrix() @ c
    torch.nn.utils.vector_to_parameters(oracle.parameters(case.model) + step, case.model.parameters())
    after = case.loss(case.model(case.x), case.y).item()
    with torch.no_grad():
        error = expansion.error(c)
    assert error == pytest.approx(after - before - expansion.local.change(c))


def test_the_promise_is_what_the_model_can_fall_by_without_its_damping() -> None:
    torch.manual_seed(0)
    root, slope = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    fisher = root @ root.mT + 0.1 * torch.eye(4, dtype=torch.float64)
    model = QuadraticModel(1.0, slope, fisher, 7.0 * torch.eye(4, dtype=torch.float64))
    expected = 0.5 * float(slope @ torch.linalg.solve(fisher, slope))
    assert model.promise == pytest.approx(expected, rel=1e-4)
