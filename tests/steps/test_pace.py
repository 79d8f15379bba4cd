"""α as the geometric mean of its measurements, and steps that need none."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from natgrad import AdaptiveStep, ConfigError
from natgrad.steps import Pace
from natgrad.steps.pace import KEEP, LONGEST
from tests.optim.runs import Run, batches, parameters


def seen(alphas: list[float], start: Pace | None = None) -> Pace:
    pace = start or Pace()
    for step, alpha in enumerate(alphas):
        pace = pace.after([alpha], step)
    return pace


def test_it_is_a_weighted_geometric_mean() -> None:
    alphas = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).add(0.1).tolist()
    for count in (1, 4, 5, 30):
        weights = [1.0]  # equal ones at first
        for n in range(2, count + 1):
            keep = min(KEEP, 1 - 1 / n)
            weights = [keep * w for w in weights] + [1 - keep]
        expected = math.prod(a**w for a, w in zip(alphas, weights, strict=False))
        assert seen(alphas[:count]).alphas == pytest.approx([expected])
    assert seen([0.1, 0.4]).alphas == pytest.approx([0.2])


def test_parts_have_means_of_their_own() -> None:
    pace = Pace().after([1.0, 4.0], 0).after([4.0, 1.0], 1)
    assert pace.alphas == pytest.approx([2.0, 2.0])
    assert pace.due(1, 3)
    assert pace.after([5.0], 2).alphas == pytest.approx([5.0])  # another number of parts: anew


def test_what_is_not_positive_says_nothing() -> None:
    assert seen([0.2, -1.0, 0.0]).alphas == pytest.approx([0.2])
    assert seen([-1.0]).alphas == [0.0]
    assert seen([-1.0, 0.3]).alphas == pytest.approx([0.3])


def test_measurements_that_agree_become_rare() -> None:
    steady = seen([0.1] * 60)
    assert steady.period == LONGEST
    assert not steady.due(59 + LONGEST - 1, 1)
    assert steady.due(59 + LONGEST, 1)
    assert seen([0.1] * 6).period == 1  # too young to tell
    assert seen([0.1, 1.0] * 30).period == 1
    assert seen([0.1, 1.0] * 5, steady).period == 1


def test_a_step_that_was_taken_back_makes_it_slower_at_once() -> None:
    pace = seen([0.1] * 60).slower(4.0)
    assert pace.alphas == pytest.approx([0.025])
    assert pace.due(60, 1)


def paced(run: Run, alpha: float = 0.01) -> None:
    step = run.optimizer._step
    run.optimizer._pace = Pace((math.log(alpha),), 0.0, 20, LONGEST, step - 1)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_step_without_a_measurement_goes_as_far_as_the_others_agree(momentum: float) -> None:
    """θ ← θ + rα Δ + μδ₀, where a run that measures on the same batch goes along the same Δ."""
    run = Run.of("tempered", "adaptive", lr=AdaptiveStep.tempered(momentum))
    before = run.train(batches(6))
    last = torch.cat([run.optimizer.state[p]["last"].reshape(-1).clone() for p in run.model.parameters()])
    other = copy.deepcopy(run.optimizer)
    measured = Run(other.model, other._recipe["likelihood"], other)
    paced(run)
    batch = batches(1, seed=9)[0]
    run.step(batch)
    info = run.optimizer.info
    assert (info.step_norm, info.predicted) == (None, None)
    assert info.alpha == pytest.approx(0.01 * info.relaxation)
    measured.step(batch)
    assert measured.optimizer.info.step_norm is not None
    direction = (parameters(measured.model) - before - momentum * last) / measured.optimizer.info.alpha
    torch.testing.assert_close(parameters(run.model), before + info.alpha * direction + momentum * last)


def test_a_step_without_a_measurement_does_not_run_the_model() -> None:
    run = Run.of("tempered", "adaptive")
    run.train(batches(6))
    calls: list[int] = []
    run.model[0].register_forward_hook(lambda *_: calls.append(1))
    paced(run)
    run.step(batches(1)[0])
    assert len(calls) == 1
    run.optimizer._pace = Pace()
    run.step(batches(1)[0])
    assert len(calls) > 2


def test_a_run_that_is_restored_measures_in_the_same_steps() -> None:
    run = Run.of("tempered", "adaptive")
    run.train(batches(6))
    paced(run)
    other = copy.deepcopy(run.optimizer)
    assert other._pace == run.optimizer._pace
    run.train(batches(8, seed=5))
    twin = Run(other.model, other._recipe["likelihood"], other)
    assert torch.equal(twin.train(batches(8, seed=5)), parameters(run.model))


def test_a_free_momentum_has_to_be_measured() -> None:
    with pytest.raises(ConfigError, match="momentum"):
        AdaptiveStep(steady=True)
