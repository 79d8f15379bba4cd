"""Each example runs, small, and bears out what its page says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_a_laplace_approximation_is_better_calibrated_than_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    scores = main_of("laplace")(train=500, draws=30, epochs=20, plot=tmp_path / "laplace.png")
    point, linear = (
        next(s for name, s in scores.items() if name.startswith(w)) for w in ("MAP", "Laplace, lin")
    )
    assert linear.loglik > point.loglik
    assert linear.ece < point.ece
    assert (tmp_path / "laplace.png").stat().st_size > 10_000


def test_wrong_labels_are_influential(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    plot = tmp_path / "influence.png"
    precision = main_of("influence")(train=600, planted=30, repeats=1, steps=30, plot=plot)
    influence = next(value for name, value in precision.items() if name == "influence, kfac")
    assert influence > 5 * 30 / 600  # of what chance gives


def test_standard_errors_of_a_poisson_regression_are_those_of_statsmodels() -> None:
    pytest.importorskip("statsmodels")
    assert all(difference < 1e-6 for difference in main_of("poisson")().values())
