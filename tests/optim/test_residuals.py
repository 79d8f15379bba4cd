"""A step on residuals: bad input, what it leaves alone, and saving."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import ConfigError, EmptyError, NonFiniteError, OutputError, StepError
from natgrad.likelihoods import Residuals
from tests.laws.test_least_squares_laws import DTYPE, flat, network, points

X = points(6)


def once() -> Callable[[Tensor], Tensor]:
    """Longer by one point each time."""
    count = [3]

    def residuals(model: Any) -> Tensor:
        count[0] += 1
        return model(X[: count[0]])

    return residuals  # type: ignore[return-value]


def backward(model: Any) -> Tensor:
    z = model(X)
    z.square().mean().backward()
    return z


def spoilt(model: Any) -> Tensor:
    z = model(X)
    return torch.where(torch.arange(6)[:, None] == 4, torch.nan, z)


@pytest.mark.parametrize("lr", [None, 1.0])
@pytest.mark.parametrize(
    ("residuals", "error", "words"),
    [
        (lambda model: model(X).square().mean(), OutputError, "not their loss"),
        (lambda model: model(X)[None], OutputError, r"\(1, 6, 2\)"),
        (lambda model: [model(X)], OutputError, "list"),
        (lambda model: {}, EmptyError, "empty dict"),
        (lambda model: model(X[:0]), EmptyError, "empty"),
        (lambda model: model(X).half(), OutputError, "float16"),
        (lambda model: model(X).detach(), OutputError, "depends on no parameter"),
        (lambda model: {"edge": X.sin()}, OutputError, "edge depends on no parameter"),
        (backward, StepError, "return them"),
        (spoilt, NonFiniteError, "point 4"),
    ],
)
def test_bad_residuals_are_named_and_nothing_moves(
    residuals: Callable[[Any], Any], error: type[Exception], words: str, lr: float | None
) -> None:
    model = network()
    optimizer = natgrad.NaturalGradient(model, metric="exact", lr=lr)
    before, grads = flat(model), [p.grad for p in model.parameters()]
    with pytest.raises(error, match=words):
        optimizer.step(lambda: residuals(model))
    assert torch.equal(flat(model), before)
    assert grads == [None] * 4 or residuals is backward
    optimizer.step(lambda: model(X))  # and it goes on


def test_residuals_that_change_their_length_within_a_step() -> None:
    model = network()
    before, residuals = flat(model), once()
    with pytest.raises(StepError, match="draw new points between steps"):
        natgrad.NaturalGradient(model, metric="exact").step(lambda: residuals(model))  # type: ignore[arg-type]
    assert torch.equal(flat(model), before)


def test_an_error_in_the_middle_of_a_search_moves_nothing() -> None:
    model = network()
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("the user's own")
        return model(X)

    before = flat(model)
    with pytest.raises(KeyError, match="the user's own"):
        natgrad.NaturalGradient(model, metric="exact").step(closure)
    assert torch.equal(flat(model), before)


def test_a_step_without_a_closure_says_what_to_pass() -> None:
    with pytest.raises(StepError, match=r"step\(lambda: residuals\)"):
        natgrad.NaturalGradient(network()).step()


def test_arguments_that_make_no_sense_for_residuals() -> None:
    with pytest.raises(ConfigError, match="decay"):
        natgrad.NaturalGradient(network(), weight_decay=0.1)
    with pytest.raises(ConfigError, match="momentum"):
        natgrad.NaturalGradient(network(), lr=natgrad.SPRING(0.1), momentum=0.9)
    with pytest.raises(ConfigError, match="NoiseFloor goes with"):
        natgrad.NaturalGradient(network(), damping=natgrad.NoiseFloor())
    with pytest.raises(ConfigError, match="SPRING"):
        natgrad.NaturalGradient(network(), lr=natgrad.FixedStep(0.1))
    with pytest.raises(ConfigError, match="weights for 'edge'"):
        natgrad.NaturalGradient(network(), Residuals(weights={"edge": 1.0})).step(lambda: torch.ones(1))
    with pytest.raises(ConfigError, match="weight"):
        Residuals(weights={"edge": 0.0})


def test_skipping_counts_steps_that_are_not_finite() -> None:
    model = network()
    optimizer = natgrad.NaturalGradient(model, metric="exact", on_nonfinite="skip")
    before = flat(model)
    optimizer.step(lambda: spoilt(model))
    assert torch.equal(flat(model), before)
    assert optimizer.info.skipped == 1


def test_points_that_are_drawn_in_the_closure_stay_the_same_within_a_step() -> None:
    model = network(1)
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    drawn: list[Tensor] = []

    def closure() -> Tensor:
        drawn.append(torch.rand(6, 3, dtype=DTYPE))
        return model(drawn[-1]) - 1

    torch.manual_seed(3)
    optimizer.step(closure)
    assert len(drawn) > 1
    assert all(torch.equal(drawn[0], later) for later in drawn)
    first, count = drawn[0], len(drawn)
    optimizer.step(closure)
    assert not torch.equal(first, drawn[count])


def test_grad_mode_buffers_and_gradients_are_left_alone() -> None:
    model = network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    natgrad.NaturalGradient(model, metric="exact").step(lambda: model(X))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_trials_leave_no_trace_in_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(DTYPE)
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    with pytest.warns(natgrad.CoverageWarning, match="depend on one another"):
        optimizer.step(lambda: model(X) - 1)
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[arg-type]


def test_frozen_parameters_stay_and_groups_go_at_their_own_rate() -> None:
    model = network()
    groups = [
        {"params": list(model[0].parameters()), "frozen": True},
        {"params": list(model[2].parameters())},
    ]
    before = copy.deepcopy(model.state_dict())
    optimizer = natgrad.NaturalGradient(model, params=groups, metric="exact")
    losses = [float(optimizer.step(lambda: model(X))) for _ in range(6)]
    assert all(torch.equal(before[f"0.{k}"], model.state_dict()[f"0.{k}"]) for k in ("weight", "bias"))
    assert not torch.equal(before["2.weight"], model[2].weight)
    assert losses[-1] < 1e-12 * losses[0]  # linear in what moves


@pytest.mark.parametrize("metric", ["exact", "gram", "kfac", "matrixfree"])
@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.5, "momentum": 0.9, "damping": 1e-2}], ids=["search", "spring"]
)
def test_a_restored_run_goes_on_to_the_last_bit(metric: str, options: dict[str, Any]) -> None:
    def closure(model: nn.Module) -> Tensor:
        return model(X) - X[:, :2].sin()

    model = network()
    optimizer = natgrad.NaturalGradient(model, metric=metric, **options)
    for _ in range(4):
        optimizer.step(lambda: closure(model))
    other = network(seed=5)
    resumed = natgrad.NaturalGradient(other, metric=metric, **options)
    resumed.step(lambda: closure(other))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        optimizer.step(lambda: closure(model))
        resumed.step(lambda: closure(other))
    assert torch.equal(flat(model), flat(other))


def test_float32_models_work() -> None:
    model = network().float()
    x = X.float()
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    losses = []
    while len(losses) < 15 and not optimizer.info.stalled:
        losses.append(float(optimizer.step(lambda: model(x) - x[:, :2].sin())))
    assert losses[-1] < 1e-3 * losses[0]


def at_a_minimum() -> tuple[nn.Module, Callable[[], Tensor], list[int]]:
    """Residuals that no step makes smaller, and how often they were asked for."""
    model, calls = nn.Linear(2, 1, bias=False).to(DTYPE), []
    nn.init.zeros_(model.weight)

    def closure() -> Tensor:
        calls.append(1)
        z = model(torch.eye(2, dtype=DTYPE))[:, 0]
        return torch.cat([1 + z.abs() + 1e-3 * z, 1 + z.abs() + 1e-3 * z])

    return model, closure, calls


def test_a_run_that_goes_on_after_a_stall_is_told_once_and_each_ends_soon() -> None:
    model, closure, calls = at_a_minimum()
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    optimizer.step(closure)  # who reads info.stalled and ends here is not warned
    assert optimizer.info.stalled
    with pytest.warns(natgrad.StallWarning, match="another seed") as said:
        optimizer.step(closure)
    assert said[0].filename == __file__
    optimizer.step(closure)
    assert len(calls) <= 3 * 80
    assert not model.weight.any()


def test_after_a_stall_the_damping_goes_on_where_it_was() -> None:
    model, closure, _ = at_a_minimum()
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    optimizer.step(lambda: model(X[:, :2]) - 1 + 0.1 * model(X[:, :2]) ** 2)
    before = optimizer.damping
    nn.init.zeros_(model.weight)
    optimizer.step(closure)
    assert optimizer.info.stalled
    assert optimizer.damping == before


def test_nothing_is_said_where_nothing_is_left() -> None:
    model = nn.Linear(2, 1, bias=False).to(DTYPE)
    nn.init.zeros_(model.weight)
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    for _ in range(2):
        optimizer.step(lambda: model(X[:, :2]))
        assert optimizer.info.stalled


def test_an_undamped_step_tells_the_rank_and_what_was_left_out() -> None:
    model = nn.Linear(3, 1, bias=False).to(DTYPE)
    x = torch.randn(8, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    x[:, 2] = x[:, 0] + 1e-10 * x[:, 1]
    optimizer = natgrad.NaturalGradient(model, metric="gram", lr=1.0, damping=0.0)
    optimizer.step(lambda: model(x)[:, 0] - 1)
    assert optimizer.info.rank == 2
    assert (optimizer.info.condition or 0.0) < 1e8
    assert [list(stage.values()) for stage in optimizer.info.stages.values()] == [
        ["small eigenvalues left out"]
    ]
