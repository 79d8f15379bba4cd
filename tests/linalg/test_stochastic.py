"""Estimates are right within their standard errors, and exact where there are probes enough."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from natgrad import ConfigError
from natgrad.linalg import stochastic
from natgrad.linalg.stochastic import Estimated, exactly

DTYPE = torch.float64
KIND = {"dtype": DTYPE, "device": torch.device("cpu")}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(n: int, seed: int = 3) -> Tensor:
    root = torch.randn(n, n, dtype=DTYPE, generator=generator(seed)) * torch.logspace(0, -2, n, dtype=DTYPE)
    return root @ root.T


def estimates(n: int, probes: int) -> dict[str, tuple[Callable[[int], Estimated], Tensor]]:
    A = matrix(n)
    product = lambda v: v @ A  # noqa: E731
    shifted = A + 0.1 * torch.eye(n, dtype=DTYPE)
    return {
        "trace": (
            lambda seed: stochastic.trace(product, n, probes, generator=generator(seed), **KIND),
            A.trace(),
        ),
        "diagonal": (
            lambda seed: stochastic.diagonal(product, n, probes, generator=generator(seed), **KIND),
            A.diagonal(),
        ),
        "logdet": (
            lambda seed: stochastic.trace_of_function(
                product, lambda s: (s + 0.1).log(), n, probes, 40, generator=generator(seed), **KIND
            ),
            shifted.logdet(),
        ),
    }


@pytest.mark.parametrize("what", ["trace", "diagonal", "logdet"])
@pytest.mark.parametrize("probes", [2, 5, 24])
def test_the_mean_is_right_and_the_standard_error_says_how_far_off(what: str, probes: int) -> None:
    estimate, exact = estimates(40, probes)[what]
    draws = [estimate(seed) for seed in range(200)]
    values = torch.stack([draw.value for draw in draws])
    spread, count = values.std(0), len(draws)
    assert ((values.mean(0) - exact).abs() <= 4.5 * spread / count**0.5).all()
    # The mean of the squared errors is the variance that the values really have.
    variance = torch.stack([draw.standard_error.square() for draw in draws]).mean(0)
    ratio = variance / spread.square()
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()


def test_hutch_plus_plus_errs_less_than_hutchinson() -> None:
    Q = torch.linalg.qr(torch.randn(200, 200, dtype=DTYPE, generator=generator(0))).Q
    A = (Q * torch.logspace(0, -20, 200, dtype=DTYPE)) @ Q.T
    few = [
        stochastic.trace(lambda v: v @ A, 200, 60, generator=generator(s), **KIND).standard_error
        for s in range(5)
    ]
    hutchinson = (2 * (A.square().sum() - A.diagonal().square().sum()) / 60).sqrt()
    assert max(few) < 0.2 * hutchinson


@pytest.mark.parametrize("what", ["trace", "diagonal"])
def test_as_many_probes_as_rows_are_exact(what: str) -> None:
    estimate, exact = estimates(20, 20)[what]
    found = estimate(0)
    assert_close(found.value, exact)
    assert not found.standard_error.any()


def test_chance_can_be_repeated_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("trace", "diagonal", "logdet"):
        estimate, _ = estimates(30, 12)[what]
        assert torch.equal(estimate(1).value, estimate(1).value)
        assert not torch.equal(estimate(1).value, estimate(2).value)
    estimate, _ = estimates(30, 12)["diagonal"]
    once = estimate(1)
    monkeypatch.setattr(stochastic, "AT_ONCE", 5)
    again = estimate(1)  # the same stream of chance, in other portions
    assert_close(again.value, once.value)
    assert_close(again.standard_error, once.standard_error)


def test_too_few_probes() -> None:
    A = matrix(10)
    with pytest.raises(ConfigError, match="2 products"):
        stochastic.trace(lambda v: v @ A, 10, 1, **KIND)
    with pytest.raises(ConfigError, match="2 products"):
        stochastic.diagonal(lambda v: v @ A, 10, 1, **KIND)
    with pytest.raises(ConfigError, match="2 probes"):
        stochastic.trace_of_function(lambda v: v @ A, torch.log, 10, 1, 5, **KIND)


def test_exactly_has_no_error() -> None:
    value, error = exactly(torch.tensor([1.0, 2.0]))
    assert torch.equal(error, torch.zeros(2))
    assert torch.equal(value, torch.tensor([1.0, 2.0]))
