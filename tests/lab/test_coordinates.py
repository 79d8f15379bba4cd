from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from natgrad.lab.coordinates import (
    GaussianFit,
    follow,
    gaussian_paths,
    gaussian_study,
    rao_distance,
    run_studies,
)
from natgrad.lab.report import report_lines, write_report
from natgrad.lab.runs import read_json
from natgrad.lab.study import studies_from
from natgrad.lab.whitening import Whitened, network_study, neuron_study


def test_gradient_descent_takes_two_paths_and_the_natural_gradient_one() -> None:
    fit = GaussianFit()
    assert gaussian_paths(fit, "gradient").distance > 0.2
    natural = gaussian_paths(fit, "natural")
    assert natural.distance < 1e-8
    assert natural.first[-1] == pytest.approx((fit.mean, fit.deviation), abs=4e-3)


def test_finite_natural_steps_part_at_first_order_in_the_step() -> None:
    fit = GaussianFit()
    apart = [
        gaussian_paths(fit, "natural", step=h, steps=round(4 / h), order=1).distance
        for h in (0.04, 0.02, 0.01)
    ]
    assert apart[0] / apart[1] == pytest.approx(2, rel=0.1)
    assert apart[1] / apart[2] == pytest.approx(2, rel=0.1)


def test_the_gaussians_velocities_are_those_of_its_loss_and_its_fisher_information() -> None:
    fit = GaussianFit()
    xi = torch.tensor([-0.4, 1.3], dtype=torch.float64, requires_grad=True)

    def loss(parameters: torch.Tensor, logged: bool) -> torch.Tensor:
        mu, sigma = parameters[0], parameters[1].exp() if logged else parameters[1]
        return sigma.log() + ((fit.mean - mu) ** 2 + fit.deviation**2) / (2 * sigma**2)

    for logged, descent, natural in (
        (False, fit.descent_in_sigma, fit.natural_in_sigma),
        (True, fit.descent_in_log_sigma, fit.natural_in_log_sigma),
    ):
        (gradient,) = torch.autograd.grad(loss(xi, logged), xi)
        point = (float(xi[0].detach()), float(xi[1].detach()))
        assert descent(point) == pytest.approx((-gradient).tolist())
        # F = E[−∇² log p] over data of the model itself: the Hessian of the loss where m = μ and s = σ
        own = GaussianFit(point[0], math.exp(point[1]) if logged else point[1])
        at = lambda p, own=own, logged=logged: own_loss(own, p, logged)  # noqa: E731
        fisher = torch.autograd.functional.hessian(at, xi.detach())
        assert natural(point) == pytest.approx((-torch.linalg.solve(fisher, gradient)).tolist())
    assert fit.loss(point[0], point[1]) == pytest.approx(float(loss(xi, False).detach()))


def own_loss(fit: GaussianFit, parameters: torch.Tensor, logged: bool) -> torch.Tensor:
    mu, sigma = parameters[0], parameters[1].exp() if logged else parameters[1]
    return sigma.log() + ((fit.mean - mu) ** 2 + fit.deviation**2) / (2 * sigma**2)


def test_the_rao_distance_of_known_pairs() -> None:
    assert rao_distance((0.3, 1.2), (0.3, 1.2)) == 0
    assert rao_distance((0.0, 1.0), (0.0, math.e)) == pytest.approx(
        math.sqrt(2)
    )  # the length of d log σ · √2
    step = 1e-5  # near, it is √(δᵀFδ)
    assert rao_distance((0.0, 2.0), (step, 2.0)) == pytest.approx(step / 2, rel=1e-6)


def test_runge_kutta_is_of_fourth_order() -> None:
    def field(point: tuple[float, float]) -> tuple[float, float]:
        return -point[1], point[0]

    errors = [abs(follow(field, (1.0, 0.0), 1 / n, n)[-1][0] - math.cos(1)) for n in (10, 20)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.2)


def test_whitening_changes_the_inputs_and_keeps_the_function() -> None:
    inputs = (
        torch.randn(50, 2, dtype=torch.float64) @ torch.tensor([[2.0, 0.3], [0.1, 0.2]], dtype=torch.float64)
        + 1
    )
    white = Whitened.of(inputs, centre=True)
    assert torch.allclose(white.white.T @ white.white / 50, torch.eye(2, dtype=torch.float64), atol=1e-10)
    weight = torch.randn(3, 2, dtype=torch.float64)
    assert torch.allclose(white.white @ white.carried(weight).T + weight @ white.mean, inputs @ weight.T)
    assert torch.allclose(white.back(white.carried(weight)), weight)


@pytest.mark.parametrize("study", [neuron_study, network_study])
def test_whitening_moves_gradient_descent_and_not_the_natural_gradient(study: object) -> None:
    seen = study(12)  # type: ignore[operator]
    assert seen.gradient.distance > 3e-3
    assert seen.natural.distance < 1e-7


def test_the_studys_page_has_both_pictures_and_the_numbers(tmp_path: Path) -> None:
    heard: list[str] = []
    studies = run_studies(tmp_path, heard.append)
    assert len(heard) == 3
    record = read_json(tmp_path / "coordinates.json")
    assert record is not None
    assert studies_from(record) == studies
    page = write_report(tmp_path).read_text()
    assert "The natural gradient takes the same one" in page
    assert page.count("<svg") == 2
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["paths-gaussian.png", "paths-neuron.png"]
    for study in studies:
        assert study.title in page
    assert "natural gradient" in report_lines(tmp_path)


def test_the_gaussian_study_survives_json() -> None:
    import dataclasses
    import json

    study = gaussian_study()
    assert studies_from(json.loads(json.dumps({"studies": [dataclasses.asdict(study)]}))) == [study]
