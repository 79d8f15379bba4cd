"""Training as users do it, from start to finish: what a fault in a strategy would spoil without raising anything."""

from __future__ import annotations

import pytest
import torch

import natgrad
from natgrad.lab.problems import load_problem

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("batch", "steps", "bound"), [(4, 400, 0.25), (32, 300, 0.01)])
def test_small_batches_do_not_drive_the_damping_away(batch: int, steps: int, bound: float) -> None:
    problem = load_problem("digits")
    model, loss_fn, (x, y) = problem.build(0), problem.loss_fn, problem.train
    optimizer = natgrad.NaturalGradient(model, loss_fn)
    generator = torch.Generator().manual_seed(0)
    while optimizer.info.step < steps:
        index = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss_fn(model(x[index]), y[index]).backward()
        optimizer.step()
        assert optimizer.info.damping < 100
    with torch.no_grad():
        assert float(loss_fn(model(x), y)) < bound


def test_the_deep_autoencoder_leaves_its_plateau() -> None:
    problem = load_problem("curves-autoencoder")
    model, loss_fn, images = problem.build(0), problem.loss_fn, problem.train[0]
    optimizer = natgrad.NaturalGradient(model, loss_fn)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for index in [*order.split(1000), *order.split(1000)]:
        optimizer.zero_grad()
        loss_fn(model(images[index]), images[index]).backward()
        optimizer.step()
    with torch.no_grad():
        x = images[:2000]
        excess = float(loss_fn(model(x), x)) - problem.floor
    assert excess < 20  # nats; Adam and SGD are above 80 here


def test_layers_that_write_into_one_stream_do_not_drive_the_damping_up() -> None:
    """A block-diagonal F̂ counts each alone and so expects little of the curvature along their common step: α is small,
    and no λ cures that. It went to 1e2 here, and the loss stayed at 1.7."""
    problem = load_problem("vit")
    model, loss_fn = problem.build(0), problem.loss_fn
    optimizer = natgrad.NaturalGradient(model, loss_fn, seed=0)
    losses = []
    for _, batch in zip(range(100), problem.batches(problem.examples_a_step, 0), strict=False):
        optimizer.zero_grad()
        loss = problem.loss(model, loss_fn, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert optimizer.info.damping <= 1
    assert sum(losses[-20:]) / 20 < 1.45
