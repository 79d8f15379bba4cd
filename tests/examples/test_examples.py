"""Each example runs, small, and bears out what its page says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = Path(__file__).parents[2] / "docs" / "uses"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def drawn(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_laplace_approximation_is_better_calibrated_than_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    scores = main_of("laplace")(train=500, draws=30, epochs=20, plot=tmp_path / "a.png")
    point, linear = scores["MAP (the network itself)"], scores["Laplace, linearised"]
    assert linear.loglik > point.loglik
    assert linear.ece < 0.5 * point.ece
    assert linear.accuracy > point.accuracy - 0.02
    assert drawn(tmp_path / "a.png")


def test_planted_mistakes_come_out_on_top(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    precision = main_of("influence")(train=1000, planted=50, repeats=1, steps=50, plot=tmp_path / "a.png")
    assert precision["influence, kfac"] > 0.7
    assert precision["influence, kfac"] > precision["influence with F = I"] + 0.1
    assert drawn(tmp_path / "a.png")


def test_consolidated_weights_forget_less(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    outcomes = main_of("continual")(examples=300, epochs=8, seeds=(1,), plot=tmp_path / "a.png")
    without = outcomes["without"]
    assert without.forgetting > 0.2
    for name in ("EWC, diagonal", "EWC, kfac"):
        assert outcomes[name].forgetting < 0.5 * without.forgetting
        assert outcomes[name].final > without.final + 0.05
    assert drawn(tmp_path / "a.png")


def test_merged_models_know_more_than_the_mean_of_their_weights(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    accuracy = main_of("merging")(seeds=(0, 1), steps=60, plot=tmp_path / "a.png")
    for name in ("merged, diagonal", "merged, kfac", "merged, dense"):
        assert accuracy[name] > accuracy["mean of the weights"]
        assert accuracy[name] > accuracy["trained on 0 to 4"] + 0.2
    assert drawn(tmp_path / "a.png")


def test_standard_errors_of_a_poisson_regression_are_those_of_statsmodels(tmp_path: Path) -> None:
    pytest.importorskip("statsmodels")
    differences = main_of("poisson")(plot=tmp_path / "a.png")
    assert set(differences) == {"covariance", "standard errors", "robust covariance"}
    assert all(difference < 1e-6 for difference in differences.values())
    assert drawn(tmp_path / "a.png")


def test_the_spectrum_rises_and_then_falls_with_the_loss(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    moments = main_of("spectrum")(steps=(0, 10, 80), train=400, plot=tmp_path / "a.png")["natgrad"]
    start, early, late = moments
    assert early.effective > start.effective
    assert late.effective < early.effective
    assert late.loss < 0.05 * start.loss
    assert all(float(m.values.sum()) == pytest.approx(m.trace) for m in moments)
    assert drawn(tmp_path / "a.png")


def test_every_example_has_its_page_and_the_page_its_picture() -> None:
    examples = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {path.stem for path in PAGES.glob("*.md")} == examples
    for name in examples:
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert f"python examples/{name}.py" in text
        assert f"](../images/{name}.png)" in text
        assert (PAGES.parent / "images" / f"{name}.png").exists()
