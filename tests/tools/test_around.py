"""What stands around a training loop: schedulers, averaged models, copies, checkpoints of torch.distributed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import lr_scheduler, swa_utils

import natgrad
from natgrad import StateError
from tests.optim.runs import MODES, Run, batches, for_every, net, parameters

# ---- schedulers ----------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, total_iters=3)], o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=2),
}


def test_these_are_all_the_schedulers_of_torch() -> None:
    known = {name for name in lr_scheduler.__all__ if name != "LRScheduler"} | {"SWALR"}
    assert known == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_rules_the_step_as_by_hand(name: str) -> None:
    """A step is linear in its lr: what a scheduler writes there is what is taken."""
    for mode in MODES:
        scheduled, manual = Run.of("kfac", mode), Run.of("kfac", mode)
        scheduler = SCHEDULERS[name](scheduled.optimizer)
        rates = []
        for batch in batches(6):
            manual.optimizer.param_groups[0]["lr"] = rate = scheduled.optimizer.param_groups[0]["lr"]
            rates.append(float(rate))
            scheduled.step(batch)
            manual.step(batch)
            assert torch.equal(parameters(scheduled.model), parameters(manual.model))
            scheduler.step(*([7.0] if name == "ReduceLROnPlateau" else []))  # never better: a plateau
        assert len(set(rates)) > 1


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize("donor", ["sgd", "adamw"])
def test_momentum_is_cycled_as_for_torch_s_optimisers(name: str, donor: str) -> None:
    """By these schedulers' own defaults; plain gradient descent, and grafting without curvature, are torch's."""
    models, losses = (net(), net()), (nn.CrossEntropyLoss(), nn.CrossEntropyLoss())
    size = {"lr": 0.1, "momentum": 0.9} if donor == "sgd" else {"lr": natgrad.Grafted("adam", 0.1)}
    ours = natgrad.NaturalGradient(models[0], losses[0], metric="euclidean", **size)
    theirs: torch.optim.Optimizer = (
        torch.optim.SGD(models[1].parameters(), 0.1, momentum=0.9)
        if donor == "sgd"
        else torch.optim.AdamW(models[1].parameters(), 0.1, weight_decay=0.0)
    )
    momenta = set()
    for model, loss, optimizer in zip(models, losses, (ours, theirs)):
        scheduler: Any = (
            lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2)
            if name == "CyclicLR"
            else lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
        )
        run = Run(model, loss, optimizer)
        for batch in batches(6):
            run.step(batch)
            scheduler.step()
            group = optimizer.param_groups[0]
            momenta.add(group["momentum"] if donor == "sgd" else group["betas"][0])
    assert len(momenta) > 2
    torch.testing.assert_close(parameters(models[0]), parameters(models[1]))


def test_a_state_from_before_groups_had_a_momentum_loads() -> None:
    run, other = Run.of("kfac", "fixed"), Run.of("kfac", "fixed")
    run.train(batches(2))
    state = run.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["momentum"]
    other.optimizer.load_state_dict(state)
    other.model.load_state_dict(run.model.state_dict())
    assert torch.equal(run.train(batches(3)), other.train(batches(3)))


def test_a_group_has_a_momentum_of_its_own() -> None:
    models = net(), net()
    groups = [[{"params": m[0].parameters(), "momentum": 0.5}, {"params": m[3].parameters()}] for m in models]
    loss = nn.CrossEntropyLoss()
    ours = natgrad.NaturalGradient(models[0], loss, groups[0], metric="euclidean", lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(groups[1], 0.1, momentum=0.9)
    for model, own, optimizer in zip(models, (loss, nn.CrossEntropyLoss()), (ours, theirs)):
        Run(model, own, optimizer).train(batches(5))
    torch.testing.assert_close(parameters(models[0]), parameters(models[1]))
    groups[0][0] |= {"params": list(models[0][0].parameters()), "momentum": 1.5}
    with pytest.raises(natgrad.ConfigError, match="momentum=1.5 of group 0"):
        natgrad.NaturalGradient(models[0], loss, groups[0][:1], metric="euclidean", lr=0.1)


# ---- averaged models -----------------------------------------------------------------------------------------


def normed() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), nn.Linear(5, 3)
        ).double()


@pytest.mark.parametrize("average", ["swa", "ema", "deepcopy"])
@pytest.mark.parametrize("metric", ["euclidean", "kfac", "ekfac", "exact"])
def test_an_averaged_model_disturbs_nothing_and_is_the_average(metric: str, average: str) -> None:
    quiet, run = Run.of(metric, "adaptive", normed()), Run.of(metric, "adaptive", normed())
    if average == "deepcopy":
        averaged: Any = copy.deepcopy(run.model)
    else:
        how = swa_utils.get_ema_multi_avg_fn(0.5) if average == "ema" else None
        averaged = swa_utils.AveragedModel(run.model, multi_avg_fn=how)
    data = batches(5)
    kept = []
    for batch in data:
        quiet.step(batch)
        run.step(batch)
        kept.append(parameters(run.model))
        if average != "deepcopy":
            averaged.update_parameters(run.model)
        run.loss(averaged(batch[0]), batch[1]).backward()  # as a teacher's, or out of carelessness
    if average != "deepcopy":
        swa_utils.update_bn([x for x, _ in data], averaged)
        expected = torch.stack(kept).mean(0) if average == "swa" else kept[0]
        for later in kept[1:] if average == "ema" else []:
            expected = 0.5 * expected + 0.5 * later
        torch.testing.assert_close(parameters(averaged), expected)
    assert torch.equal(parameters(quiet.model), parameters(run.model))
    assert quiet.optimizer.info.damping == run.optimizer.info.damping


# ---- copies of the optimiser ---------------------------------------------------------------------------------


def double(z: Tensor) -> Tensor:
    return z


def copied(run: Run, how: str) -> Run:
    if how == "deepcopy":
        optimizer = copy.deepcopy(run.optimizer)
    else:
        buffer = io.BytesIO()
        torch.save(run.optimizer, buffer)
        buffer.seek(0)
        optimizer = torch.load(buffer, weights_only=False)
    return Run(optimizer.model, optimizer._recipe["likelihood"], optimizer)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@for_every
def test_a_copy_of_the_optimiser_goes_on_alone(metric: str, mode: str, how: str) -> None:
    run = Run.of(metric, mode, weight_decay=natgrad.L2(1e-3), outputs=double)
    run.train(batches(4))
    other, start = copied(run, how), parameters(run.model)
    first = other.train(batches(6, seed=3))
    assert torch.equal(parameters(run.model), start)
    assert torch.equal(run.train(batches(6, seed=3)), first)
    assert run.optimizer.damping == other.optimizer.damping


def test_a_copy_keeps_groups_and_fits_what_was_copied_with_it() -> None:
    model, loss = net(), nn.CrossEntropyLoss()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.1, "metric": "diagonal"},
        {"params": model[3].parameters(), "frozen": True},
    ]
    optimizer = natgrad.NaturalGradient(model, loss, groups)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    run = Run(model, loss, optimizer)
    run.train(batches(2))
    schedule.step()
    model2, loss2, optimizer2, schedule2 = copy.deepcopy((model, loss, optimizer, schedule))
    assert optimizer2.model is model2
    other = Run(model2, loss2, optimizer2)
    for one, its in ((run, schedule), (other, schedule2)):
        one.step(batches(1)[0])
        its.step()
    assert torch.equal(parameters(model), parameters(model2))
    for mine, its in zip(optimizer.param_groups, optimizer2.param_groups):
        assert {k: v for k, v in mine.items() if k != "params"} == {
            k: v for k, v in its.items() if k != "params"
        }


# ---- torch.distributed.checkpoint ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@for_every
def test_a_distributed_checkpoint_restores_the_run(metric: str, mode: str, tmp_path: Path) -> None:
    run = Run.of(metric, mode)
    run.train(batches(7))
    dcp.save(
        {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()},
        checkpoint_id=tmp_path / "there",
        no_dist=True,
    )
    dcp_to_torch_save(tmp_path / "there", tmp_path / "one.pt")
    saved = torch.load(tmp_path / "one.pt", weights_only=False)
    other = Run.of(metric, mode, net(seed=5))
    other.model.load_state_dict(saved["model"])
    other.optimizer.load_state_dict(saved["optimizer"])
    # Not to the last bit: the layout of tensors in memory is not kept, and sums are rounded by it.
    ends = [one.train(batches(6, seed=3)) for one in (run, other)]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_a_state_without_our_part_is_refused_by_name() -> None:
    run = Run.of("kfac", "adaptive")
    run.train(batches(2))
    state = get_optimizer_state_dict(run.model, run.optimizer)
    with pytest.raises(StateError, match=r"get_optimizer_state_dict.*optimizer\.state_dict\(\) whole"):
        run.optimizer.load_state_dict(state)
