"""state_dict restores a run: its next steps are the same to the last bit. A state that does not fit changes nothing."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import natgrad
from natgrad import L2, StateError
from tests.optim.runs import METRICS, MODES, Run, batches, net, parameters


def through_a_file(state: Any) -> Any:
    """Saved and loaded as torch advises: with nothing in it but tensors and plain containers."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(run: Run) -> dict[str, Any]:
    return through_a_file(
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
    )


def resume(run: Run, saved: dict[str, Any]) -> None:
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])


def assert_same_run(first: Run, second: Run, steps: int, state: torch.Tensor | None = None) -> None:
    data = batches(steps, seed=7)
    ends = []
    for run in (first, second):
        if state is not None:
            torch.set_rng_state(state)
        ends.append((run.train(data), run.optimizer.damping, run.optimizer.info))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    for name in ("step", "loss", "alpha", "momentum", "rho", "predicted", "grad_norm", "observed"):
        assert getattr(ends[0][2], name) == getattr(ends[1][2], name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_the_next_hundred_steps_are_the_same(metric: str, mode: str) -> None:
    run = Run.of(metric, mode, net(dropout=0.3), weight_decay=L2(1e-3))
    run.train(batches(13))
    saved = snapshot(run)
    other = Run.of(metric, mode, net(dropout=0.3, seed=5), weight_decay=L2(1e-3), seed=3)
    resume(other, saved)
    assert other.optimizer.info.step == 13
    assert_same_run(run, other, 100 if metric == "kfac" else 20, saved["rng"])


@pytest.mark.parametrize("after", [0, 1, 4, 11])
@pytest.mark.parametrize("metric", ["kfac", "kfac-lazy", "diagonal"])
def test_a_run_can_be_saved_at_any_step(metric: str, after: int) -> None:
    run = Run.of(metric, "adaptive")
    run.train(batches(after))
    saved = snapshot(run)
    other = Run.of(metric, "adaptive", net(seed=5))
    other.train(batches(3, seed=6))  # what it did before is forgotten
    resume(other, saved)
    assert_same_run(run, other, 12)


def test_saving_disturbs_nothing_and_what_is_saved_stays_as_it_is() -> None:
    quiet, run = Run.of("kfac", "adaptive"), Run.of("kfac", "adaptive")
    for batch in batches(12):
        quiet.step(batch)
        run.step(batch)
        run.optimizer.state_dict()
    assert torch.equal(parameters(quiet.model), parameters(run.model))


def test_a_restored_run_shares_nothing_with_the_one_it_came_from() -> None:
    run, other = Run.of("kfac", "adaptive"), Run.of("kfac", "adaptive")
    run.train(batches(13))
    alone = Run.of("kfac", "adaptive")
    resume(alone, snapshot(run))
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(run.optimizer.state_dict())  # not through a file
    run.train(batches(5, seed=8))
    assert_same_run(alone, other, 5)


class Normed(nn.Module):
    """Layers that the tape covers, and one that takes the fallback."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.norm, self.last = nn.Linear(2, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@pytest.mark.filterwarnings("ignore::natgrad.CoverageWarning")
@pytest.mark.parametrize(
    "fallback", [None, lambda params: torch.optim.AdamW(params, lr=1e-2)], ids=["plain", "adamw"]
)
@pytest.mark.parametrize("mode", MODES)
def test_the_fallback_is_saved_with_it(mode: str, fallback: Any) -> None:
    run = Run.of("kfac", mode, Normed(), fallback=fallback)
    run.train(batches(13))
    saved = snapshot(run)
    other = Run.of("kfac", mode, Normed(5), fallback=fallback)
    resume(other, saved)
    assert_same_run(run, other, 20)
    assert str(run.optimizer.coverage()) == str(other.optimizer.coverage())


def test_the_groups_options_are_saved() -> None:
    run, other = (Run.of("diagonal", "fixed", weight_decay=1e-3) for _ in range(2))
    run.train(batches(3))
    run.optimizer.param_groups[0]["lr"] = 0.02
    resume(other, snapshot(run))
    assert other.optimizer.param_groups[0]["lr"] == 0.02
    assert_same_run(run, other, 5)


def test_a_scheduler_goes_on_where_it_was() -> None:
    def scheduled(seed: int) -> tuple[Run, Any]:
        run = Run.of("kfac", "adaptive", net(seed=seed))
        return run, torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + 0.1 * step))

    (run, scheduler), (other, second) = scheduled(0), scheduled(5)
    for batch in batches(6):
        run.step(batch)
        scheduler.step()
    resume(other, snapshot(run))
    second.load_state_dict(through_a_file(scheduler.state_dict()))
    for batch in batches(6, seed=3):
        for one, its in ((run, scheduler), (other, second)):
            one.step(batch)
            its.step()
    assert torch.equal(parameters(run.model), parameters(other.model))


# ---- what does not fit ---------------------------------------------------------------------------------------


def wider() -> Run:
    return Run.of(
        "kfac", "adaptive", nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Dropout(0), nn.Linear(6, 3)).double()
    )


def renamed() -> Run:
    return Run.of("kfac", "adaptive", nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double())


def in_groups() -> Run:
    model = net()
    return Run.of(
        "kfac",
        "adaptive",
        model,
        params=[{"params": model[0].parameters()}, {"params": model[3].parameters()}],
    )


def plain_sgd() -> Run:
    model = net()
    return Run(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))


STRANGERS = {
    "a wider model": (wider, r"0\.weight is \(6, 2\) there and \(5, 2\) here"),
    "other names": (renamed, r"absent"),
    "another metric": (lambda: Run.of("diagonal", "adaptive"), r"Diagonal.*not.*KFAC"),
    "another option": (lambda: Run.of("kfac", "adaptive", metric=natgrad.KFAC(decay=0.5)), r"decay=0\.5"),
    "other groups": (in_groups, r"groups"),
    "another optimiser": (plain_sgd, r"natgrad"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name: str) -> None:
    build, message = STRANGERS[name]
    stranger = build()
    stranger.train(batches(3))
    state = stranger.optimizer.state_dict()
    run, untouched = Run.of("kfac", "adaptive"), Run.of("kfac", "adaptive")
    for one in (run, untouched):
        one.train(batches(4))
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(StateError, match=message):
        run.optimizer.load_state_dict(state)
    after = run.optimizer.state_dict()
    assert repr(after["natgrad"]["damping"]) == repr(before["natgrad"]["damping"])
    assert after["natgrad"]["step"] == before["natgrad"]["step"]
    assert_same_run(run, untouched, 5)


def test_another_version_is_refused() -> None:
    run = Run.of("kfac", "adaptive")
    state = run.optimizer.state_dict()
    state["natgrad"]["version"] = 99
    with pytest.raises(StateError, match="version 99"):
        run.optimizer.load_state_dict(state)


def test_a_broken_state_is_refused_and_changes_nothing() -> None:
    run, untouched = Run.of("kfac", "adaptive"), Run.of("kfac", "adaptive")
    for one in (run, untouched):
        one.train(batches(4))
    state = copy.deepcopy(run.optimizer.state_dict())
    del state["natgrad"]["estimates"]
    with pytest.raises(StateError, match="estimates"):
        run.optimizer.load_state_dict(state)
    assert_same_run(run, untouched, 5)
