"""Compiled models and checkpointed activations: curvature is that of the plain pass, and nothing is lost in silence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad
from tests.optim.runs import DTYPE, MODES, Run, batches, for_every, net, parameters


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


class Net(nn.Module):
    """A module of one's own: torch compiles its forward otherwise than that of a Sequential."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = Net(net()) if inner is None else inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def given_compiled(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    compiled = torch.compile(model, **options)
    return compiled, compiled


def given_original(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    return model, torch.compile(model, **options)


def in_place(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    model.compile(**options)
    return model, model


def a_part(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    for child in model.children():
        child.compile(**options)
    return model, model


# What the optimiser is given, and what is called.
WAYS: dict[str, Callable[..., tuple[nn.Module, nn.Module]]] = {
    "given the compiled": given_compiled,
    "given the original": given_original,
    "in place": in_place,
    "a part": a_part,
}


def counting() -> tuple[Callable[..., Any], list[int]]:
    """A backend that runs the graph as it is, and counts how often."""
    count = [0]

    def backend(graph: Any, example: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            count[0] += 1
            return graph(*args)

        return run

    return backend, count


@pytest.mark.parametrize("build", [net, Net], ids=["Sequential", "Module"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", ["kfac", "kfac-lazy", "exact", "matrixfree"])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_takes_the_same_steps(way: str, metric: str, mode: str, build: Any) -> None:
    plain = Run.of(metric, mode, build())
    backend, count = counting()
    given, called = WAYS[way](build(), backend=backend)
    run = Run.of(metric, mode, given)
    run.model = called
    for batch in batches(5):
        plain.step(batch)
        run.step(batch)
        assert run.optimizer.info.loss == plain.optimizer.info.loss
        assert run.optimizer.info.observed == plain.optimizer.info.observed
    torch.testing.assert_close(parameters(run.model), parameters(plain.model), rtol=1e-9, atol=1e-12)
    assert str(run.optimizer.coverage()) == str(plain.optimizer.coverage())
    if metric == "kfac-lazy" and (
        build is Net or way != "a part"
    ):  # torch leaves parts of its own as they are
        assert count[0] > 0  # it was compiled where nothing had to be recorded


@pytest.mark.parametrize("metric", ["kfac", "exact"])
def test_a_whole_graph_stays_whole_where_the_compiled_model_is_given(metric: str) -> None:
    model = Net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    run, plain = Run.of(metric, "adaptive", compiled), Run.of(metric, "adaptive", Net())
    assert run.optimizer.model is model
    for batch in batches(4):
        plain.step(batch)
        run.step(batch)
        with torch.no_grad():
            run.value(batch)
    torch.testing.assert_close(parameters(model), parameters(plain.model), rtol=1e-9, atol=1e-12)


def test_states_fit_whether_the_model_was_compiled_or_not() -> None:
    run = Run.of("kfac", "adaptive", torch.compile(net(), backend="eager"))
    run.train(batches(3))
    other = Run.of("kfac", "adaptive")
    other.model.load_state_dict(run.optimizer.model.state_dict())
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    torch.testing.assert_close(run.train(batches(3)), other.train(batches(3)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_running_statistics_are_not_counted_twice(way: str) -> None:
    def normed() -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)).double()

    plain = Run.of("kfac", "adaptive", normed())
    given, called = WAYS[way](normed(), backend="aot_eager")
    run = Run.of("kfac", "adaptive", given)
    run.model = called
    for batch in batches(3):
        plain.step(batch)
        run.step(batch)
    for mine, its in zip(run.model.buffers(), plain.model.buffers()):
        torch.testing.assert_close(mine, its)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_takes_the_same_steps() -> None:
    plain = Run.of("kfac", "adaptive", Net())
    run = Run.of("kfac", "adaptive", torch.compile(Net()))
    for batch in batches(8):
        plain.step(batch)
        run.step(batch)
    torch.testing.assert_close(parameters(run.model), parameters(plain.model), rtol=1e-6, atol=1e-9)


# ---- checkpointed activations --------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """The first layers keep no activations; the backward pass makes them again."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Linear(2, 4)
            self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4))
            self.head = nn.Linear(4, 3)
        self.reentrant = reentrant
        self.to(DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.reentrant is None:
            h = self.block(h)
        else:
            h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@for_every
def test_checkpointed_layers_count_like_others(metric: str, mode: str, reentrant: bool) -> None:
    ends = []
    for kind in (None, reentrant):
        run = Run.of(metric, mode, Checkpointed(kind))
        torch.manual_seed(3)
        ends.append(run.train(batches(4)))
        assert torch.utils.checkpoint.CheckpointFunction.__module__ == "torch.utils.checkpoint"
        assert not run.optimizer.coverage().uncovered
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("metric", ["kfac", "exact", "matrixfree", "diagonal"])
def test_the_fisher_of_checkpointed_layers(metric: str, reentrant: bool) -> None:
    found = []
    for kind in (None, reentrant):
        model = Checkpointed(kind).eval()
        found.append(natgrad.fisher(model, nn.CrossEntropyLoss(), batches(1)[0], metric=metric).to_dense())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
