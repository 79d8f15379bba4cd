"""What a loop can get wrong is said by name, before a parameter moves."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad
from natgrad import ConfigError, EmptyError, ModelChangedError, StepError
from tests.optim.runs import METRICS, MODES, Run, batches, for_every, net, parameters

# Of these every step looks at the batch.
LOOKING = [name for name in METRICS if name != "euclidean" and not name.endswith("lazy")]


def refused(run: Run, message: str, error: type = StepError) -> None:
    start = parameters(run.model)
    with pytest.raises(error, match=message):
        run.optimizer.step()
    assert torch.equal(parameters(run.model), start)


# ---- the model and the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", LOOKING)
@pytest.mark.parametrize("before", [0, 3])
def test_a_loss_that_is_never_called_is_named(metric: str, mode: str, before: int) -> None:
    run = Run.of(metric, mode)
    run.train(batches(before))
    x, y = batches(1)[0]
    run.optimizer.zero_grad()
    F.cross_entropy(run.model(x), y).backward()
    refused(run, r"the model was called, but not the loss")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", LOOKING)
def test_a_model_that_is_never_called_is_named(metric: str, mode: str) -> None:
    run = Run.of(metric, mode)
    run.train(batches(3))
    x, y = batches(1)[0]
    run.optimizer.zero_grad()
    h = x
    for layer in run.model:
        h = layer(h)
    run.loss(h, y).backward()
    refused(run, r"the model was not called since the last step")


def test_a_loss_that_nothing_was_sent_back_through_is_named() -> None:
    run = Run.of("kfac", "fixed")
    run.train(batches(3))
    x, y = batches(1)[0]
    run.optimizer.zero_grad()
    z = run.model(x)
    run.loss(z, y)
    F.cross_entropy(z, y).backward()
    refused(run, r"no gradient was sent back through the loss")


def test_a_model_that_was_compiled_before_has_no_hooks_and_says_so() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    (batch,) = batches(1)
    compiled(batch[0]).sum().backward()
    run = Run.of("kfac", "fixed", model)
    run.model = compiled
    run.optimizer.zero_grad()
    run.value(batch).backward()
    refused(run, r"hooks were left out.*give NaturalGradient the compiled")
    torch.compiler.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", LOOKING)
def test_a_loss_that_is_called_twice_is_named(metric: str, mode: str) -> None:
    run = Run.of(metric, mode)
    run.train(batches(2))
    x, y = batches(1)[0]
    run.optimizer.zero_grad()
    z = run.model(x)
    (run.loss(z, y) + run.loss(2 * z, y)).backward()
    refused(run, r"two calls of the loss on one forward pass")
    run.train(batches(2))


@for_every
def test_a_loss_may_be_called_again_to_look_at_it(metric: str, mode: str) -> None:
    quiet, run = Run.of(metric, mode), Run.of(metric, mode)
    for k, (x, y) in enumerate(batches(5)):
        quiet.step((x, y))
        run.optimizer.zero_grad()
        z = run.model(x)
        looked_at = [run.loss(z, y)] if k % 2 else []
        value = run.loss(z, y)
        value.backward()
        looked_at.append(run.loss(z, y))
        run.optimizer.step()
    assert torch.equal(parameters(quiet.model), parameters(run.model))


@pytest.mark.parametrize("inside", [False, True], ids=["loss", "likelihood"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_is_named(inside: bool, reduction: str) -> None:
    loss = natgrad.Categorical(reduction=reduction) if inside else nn.CrossEntropyLoss(reduction=reduction)
    model = net()
    optimizer = natgrad.NaturalGradient(model, loss, lr=0.1)
    x, y = batches(1)[0]
    with pytest.raises(EmptyError, match=r"the batch is empty.*\(0, 3\)"):
        (F.cross_entropy if inside else loss)(model(x[:0]), y[:0])
    (F.cross_entropy if inside else loss)(model(x), y).backward()
    optimizer.step()


@for_every
def test_batches_may_have_any_size(metric: str, mode: str) -> None:
    run = Run.of(metric, mode)
    for size in (40, 7, 1, 90, 2):
        run.train(batches(1, size))
    assert torch.isfinite(parameters(run.model)).all()


# ---- parameters ----------------------------------------------------------------------------------------------


def test_parameters_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    with pytest.raises(ConfigError, match=r"weight is on the meta device.*to_empty"):
        natgrad.NaturalGradient(model, nn.CrossEntropyLoss())


def test_parameters_of_two_types_are_refused() -> None:
    model = net()
    model[3].float()
    with pytest.raises(
        ConfigError, match=r"0\.weight is torch\.float64 and 3\.weight is torch\.float32.*model\.to"
    ):
        natgrad.NaturalGradient(model, nn.CrossEntropyLoss())
    natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), model[3].parameters())  # frozen ones don't matter


def grown(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3).double())


def shrunk(model: nn.Sequential) -> None:
    model[3] = nn.Identity()


def resized(model: nn.Sequential) -> None:
    model[3].weight.data, model[3].bias.data = torch.zeros(4, 5).double(), torch.zeros(4).double()


def converted(model: nn.Sequential) -> None:
    model.float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grown, r"4\.weight became trainable after.*after the model is complete"),
        (shrunk, r"3\.weight, 3\.bias left the model.*build a new one"),
        (resized, r"3\.weight changed its shape from \(3, 5\) to \(4, 5\).*build a new one"),
        (converted, r"0\.weight is now torch\.float32.*before the optimiser is built"),
    ],
)
@for_every
def test_a_model_that_changed_is_named(
    metric: str, mode: str, change: Callable[[nn.Sequential], None], message: str
) -> None:
    run = Run.of(metric, mode)
    run.train(batches(2))
    change(run.model)
    start = parameters(run.model)
    x, y = batches(1)[0]
    run.optimizer.zero_grad()

    def evaluate() -> None:
        value = run.loss(run.model(x.to(next(run.model.parameters()).dtype)), y)
        value.backward()
        run.optimizer.step()

    with pytest.raises(ModelChangedError, match=message):
        evaluate()
    assert torch.equal(parameters(run.model), start)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="torch has no gloo here")
def test_an_fsdp1_model_is_refused(one_process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FSDP1 is on its way out, and that one process shards nothing
        model: Any = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"FullyShardedDataParallel.*fully_shard"):
        natgrad.NaturalGradient(model, nn.CrossEntropyLoss())


# ---- targets -------------------------------------------------------------------------------------------------


class Inside(nn.Module):
    """The loss is inside, over all but the ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        z = self.inner(x)
        return {"loss": F.cross_entropy(z, labels), "logits": z}


@for_every
def test_a_loss_inside_the_model_trains_like_one_outside_where_targets_are_told(
    metric: str, mode: str
) -> None:
    outside, inside = Run.of(metric, mode), Inside()
    optimizer = natgrad.NaturalGradient(
        inside,
        natgrad.Categorical(),
        metric=METRICS[metric],
        outputs=lambda o: o["logits"],
        targets=lambda x, labels: labels,
        **MODES[mode],
    )
    for x, y in batches(6):
        y = torch.where(x[:, 0] > 0.5, -100, y)
        outside.step((x, y))
        optimizer.zero_grad()
        inside(x, labels=y)["loss"].backward()
        optimizer.step()
        assert optimizer.info.loss == pytest.approx(outside.optimizer.info.loss)
        assert optimizer.info.damping == pytest.approx(outside.optimizer.info.damping)
    torch.testing.assert_close(parameters(inside), parameters(outside.model), rtol=1e-9, atol=1e-12)


def test_targets_beside_a_loss_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the loss tells the targets"):
        natgrad.NaturalGradient(net(), nn.CrossEntropyLoss(), targets=lambda x, y: y)
