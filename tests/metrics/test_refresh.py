"""Periods that follow how far an average has moved."""

from __future__ import annotations

import itertools

import torch

from natgrad.metrics.refresh import Refresh


def looked(refresh: Refresh, average: torch.Tensor, step: int, looks: int) -> tuple[int, list[int]]:
    """So many more looks, each when it is due; the step after them, and the periods."""
    periods = []
    while len(periods) < looks:
        if refresh.due(step):
            refresh.took(step)
            refresh.observed({"A": average})
            periods.append(refresh.period)
        step += 1
    return step, periods


def test_a_period_doubles_while_nothing_moves_and_halves_when_something_does() -> None:
    refresh, one, other = Refresh(None, longest=8), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    step, periods = looked(refresh, one, 0, 40)
    assert periods[-1] == 8
    assert all(now <= later <= 2 * now for now, later in itertools.pairwise(periods))
    step, periods = looked(refresh, other, step, 1)  # as far as a unit vector can turn
    assert periods == [4]
    for vector, expected in ((one, 2), (other, 1), (one, 1)):
        step, periods = looked(refresh, vector, step, 1)
        assert periods == [expected]
    _, periods = looked(refresh, one, step, 3)
    assert periods == [2, 4, 8]


def test_a_scale_is_no_movement_and_a_little_movement_changes_nothing() -> None:
    refresh, one = Refresh(None, longest=8), torch.tensor([1.0, 0.0])
    step, _ = looked(refresh, one, 0, 40)
    step, periods = looked(refresh, 7.0 * one, step, 1)
    assert periods == [8]
    _, periods = looked(refresh, torch.tensor([1.0, 0.25]), step, 1)  # between the two bounds
    assert periods == [8]


def test_a_young_average_is_looked_at_often() -> None:
    _, periods = looked(Refresh(None, longest=20, youth=16), torch.ones(2), 0, 32)
    assert periods == [1] * 32
    _, periods = looked(Refresh(3, longest=20), torch.ones(2), 0, 8)
    assert periods == [3] * 8
