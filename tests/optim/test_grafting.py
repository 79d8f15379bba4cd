"""Steps as long as Adam's: where there is no curvature they are AdamW's own, and elsewhere they have its length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import ConfigError, Grafted

DTYPE = torch.float64
CE = nn.CrossEntropyLoss()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(DTYPE)


def batch(step: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, dtype=DTYPE, generator=source), torch.randint(3, (8,), generator=source)


def train(net: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        CE(net(x), y).backward()
        optimizer.step()
        schedule.step()


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def test_without_curvature_it_is_adamw_with_its_schedule_and_decay() -> None:
    nets = model(), model()
    ours = natgrad.NaturalGradient(
        nets[0], CE, metric="euclidean", lr=Grafted("adam", 0.05, (0.8, 0.99), 1e-6), weight_decay=0.1
    )
    theirs = torch.optim.AdamW(nets[1].parameters(), 0.05, (0.8, 0.99), 1e-6, weight_decay=0.1)
    for net, optimizer in zip(nets, (ours, theirs)):
        train(net, optimizer, cosine(optimizer), range(10))
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal"])
def test_a_layer_goes_as_far_as_adam_along_the_natural_gradient(metric: str) -> None:
    net, other = model(), model()
    optimizer = natgrad.NaturalGradient(net, CE, metric=metric, lr=Grafted(lr=0.01), damping=0.1)
    adam = torch.optim.Adam(other.parameters(), 0.01)
    before = [p.detach().clone() for p in net.parameters()]
    for each, own in ((net, optimizer), (other, adam)):
        x, y = batch(0)
        CE(each(x), y).backward()
        own.step()
    steps, lengths = ([p.detach() - q for p, q in zip(each.parameters(), before)] for each in (net, other))
    direction = optimizer._curvature.direction(
        {name: p.grad for name, p in net.named_parameters()},
        dict.fromkeys((name for name, _ in net.named_parameters()), 0.1),
        1,
    )
    for layer in ((0, 1), (2, 3), (4, 5)):
        ours = torch.cat([steps[k].flatten() for k in layer])
        theirs = torch.cat([lengths[k].flatten() for k in layer])
        delta = torch.cat([list(direction.values())[k].flatten() for k in layer])
        assert ours.norm() == pytest.approx(theirs.norm())
        assert torch.nn.functional.cosine_similarity(ours, delta, dim=0) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "tempered", "diagonal"])
def test_a_factor_of_the_loss_changes_nothing(metric: str) -> None:
    """As with Adam; λ in nats per parameter² would be another share of F."""
    nets = model(), model()
    for net, loss in zip(nets, (CE, nn.CrossEntropyLoss(reduction="sum"))):
        optimizer = natgrad.NaturalGradient(net, loss, metric=metric, lr=Grafted(lr=0.01, eps=1e-20))
        for step in range(4):
            x, y = batch(step)
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal"])
def test_relative_damping_counts_a_layers_mean_eigenvalues(metric: str) -> None:
    x, y = batch(0)
    directions = []
    for relative in (True, False):
        net = model()[3]
        optimizer = natgrad.NaturalGradient(
            net, CE, metric=metric, lr=1.0, damping=natgrad.RelativeDamping(0.3) if relative else 1.0
        )
        CE(net(torch.tanh(x @ torch.ones(2, 5, dtype=DTYPE))), y).backward()
        estimate = optimizer._curvature.estimates[0][1]
        gradient = {name: p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        parts = [[name] for name in gradient] if metric == "diagonal" else [list(gradient)]
        own: dict[str, Tensor] = {}
        for names in parts:
            mean = estimate.operator().restrict(names).trace() / sum(gradient[n].numel() for n in names)
            found = estimate.attempt(gradient, 0.3 if relative else 0.3 * float(mean), 1)
            own |= {name: found[name] for name in names}
        directions.append(own)
    torch.testing.assert_close(*directions)


def test_relative_damping_is_refused_where_nothing_is_damped_layer_by_layer() -> None:
    for options in (
        {"metric": "dense", "lr": 0.1},
        {"lr": None},
        {"lr": 0.1, "weight_decay": natgrad.L2(0.1)},
    ):
        with pytest.raises(ConfigError, match="RelativeDamping goes with lr="):
            natgrad.NaturalGradient(model(), CE, damping=natgrad.RelativeDamping(), **options)
    for options in ({"metric": "dense"}, {"weight_decay": natgrad.L2(0.1)}):
        assert natgrad.NaturalGradient(model(), CE, lr=Grafted(), **options).damping == 1e-3


def test_a_restored_run_goes_on_to_the_last_bit() -> None:
    nets = model(), model()
    first, second = (natgrad.NaturalGradient(net, CE, lr=Grafted(lr=0.01)) for net in nets)
    schedules = cosine(first), cosine(second)
    train(nets[0], first, schedules[0], range(5))
    nets[1].load_state_dict(nets[0].state_dict())
    second.load_state_dict(first.state_dict())
    schedules[1].load_state_dict(schedules[0].state_dict())
    for net, optimizer, schedule in zip(nets, (first, second), schedules):
        train(net, optimizer, schedule, range(5, 10))
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(p, q)


def test_what_is_out_of_range_is_refused() -> None:
    for bad in (
        {"donor": "sgd"}, {"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            Grafted(**bad)
    with pytest.raises(ConfigError, match="number as damping"):
        natgrad.NaturalGradient(model(), CE, lr=Grafted(), damping=natgrad.LevenbergMarquardt())
    with pytest.raises(ConfigError, match="momentum"):
        natgrad.NaturalGradient(model(), CE, lr=Grafted(), momentum=0.9)
