"""Bad input gets a clear error, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

import natgrad
from natgrad import (
    ConfigError,
    FixedStep,
    NonFiniteError,
    NotPositiveDefiniteError,
    OutputError,
    StepError,
    TargetError,
    UnknownNameError,
    UnsupportedLossError,
)
from tests.optim.runs import DTYPE, METRICS, MODES, Run, batches, net, parameters


def spoil(batch: Any) -> Any:
    x, y = batch
    x = x.clone()
    x[3] = torch.nan
    return x, y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_loss_that_is_not_finite_raises_before_anything_moves(metric: str, mode: str) -> None:
    run, untouched, data = Run.of(metric, mode), Run.of(metric, mode), batches(6)
    for one in (run, untouched):
        one.train(data[:3])
    start = parameters(run.model)
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan .*0\.weight.* in step 4, batch 4; no parameter was"
    ):
        run.step(spoil(data[3]))
    assert torch.equal(parameters(run.model), start)
    # Averages and momentum are clean too: the run goes on as if the batch had not been there.
    assert torch.equal(run.train(data[3:]), untouched.train(data[3:]))
    assert run.optimizer.info.skipped == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_or_such_steps_are_skipped_and_counted(metric: str, mode: str) -> None:
    run = Run.of(metric, mode, on_nonfinite="skip")
    untouched, data = Run.of(metric, mode), batches(6)
    for k, batch in enumerate(data):
        if k in (0, 2, 3):
            run.step(spoil(batch))
            assert run.optimizer.info.skipped == {0: 1, 2: 2, 3: 3}[k]
        run.step(batch)
        untouched.step(batch)
        assert torch.equal(parameters(run.model), parameters(untouched.model))
    assert run.optimizer.info.step == 6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_gradient_that_is_not_finite_is_named(metric: str, mode: str) -> None:
    run = Run.of(metric, mode)
    run.train(batches(2))
    start = parameters(run.model)
    run.optimizer.zero_grad()
    run.value(batches(1)[0]).backward()
    run.model[3].bias.grad[1] = torch.inf
    with pytest.raises(
        NonFiniteError, match=r"a gradient is not finite in step 3, batch 3|gradients of 3\.bias"
    ):
        run.optimizer.step()
    assert torch.equal(parameters(run.model), start)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", ["diagonal", "dense", "kfac"])
def test_no_average_takes_in_what_is_not_finite(metric: str, mode: str) -> None:
    """The loss is finite and only the backward pass is not: the curvature pass meets it first."""

    class Cornered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.corner = net(), False

        def forward(self, x: Tensor) -> Tensor:
            z = self.inner(x)
            return z + (z.detach() - z).abs().sqrt() if self.corner else z  # √ at 0

    run = Run.of(metric, mode, Cornered(), on_nonfinite="skip")
    untouched, data = Run.of(metric, mode, Cornered()), batches(5)
    for k, batch in enumerate(data):
        if k == 2:
            run.model.corner = True
            run.step(batch)
            assert run.optimizer.info.skipped == 1
            run.model.corner = False
        run.step(batch)
        untouched.step(batch)
    torch.testing.assert_close(parameters(run.model), parameters(untouched.model), rtol=0.2, atol=0.05)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_one_bad_micro_batch_spoils_the_step_alone() -> None:
    run, data = Run.of("kfac", "adaptive", on_nonfinite="skip"), batches(4)
    start = parameters(run.model)
    run.optimizer.zero_grad()
    for batch in (data[0], spoil(data[1])):
        (0.5 * run.value(batch)).backward()
    run.optimizer.step()
    assert torch.equal(parameters(run.model), start)
    assert run.optimizer.info.skipped == 1
    run.train(data)
    assert run.optimizer.info.step == 4
    assert torch.isfinite(parameters(run.model)).all()


@pytest.mark.parametrize("how", ["raise", "skip"])
def test_a_direction_that_is_not_finite_moves_nothing(how: str) -> None:
    run = Run.of("diagonal", "fixed", on_nonfinite=how)
    run.train(batches(2))
    start = parameters(run.model)
    estimate = run.optimizer._curvature.estimates[0][1]
    estimate._squares.totals["0.bias"][0] = torch.nan
    if how == "skip":
        run.step(batches(1)[0])
        assert run.optimizer.info.skipped == 1
    else:
        with pytest.raises(NonFiniteError, match=r"natural gradient is not finite.*in step 3"):
            run.step(batches(1)[0])
    assert torch.equal(parameters(run.model), start)


@pytest.mark.parametrize("mode", MODES)
def test_a_factor_that_is_not_positive_definite_is_named(mode: str) -> None:
    run = Run.of("kfac", mode, damping=1e-8)
    run.train(batches(1))
    start = parameters(run.model)
    estimate = run.optimizer._curvature.estimates[0][1]
    estimate._blocks["3.weight"].as_map.A[0, 0] = -1e3
    with pytest.raises(
        NotPositiveDefiniteError, match=r"factor A of 3 is not positive definite \(least eigenvalue -"
    ):
        run.step(batches(1)[0])
    assert torch.equal(parameters(run.model), start)


def test_a_matrix_that_is_singular_without_damping_is_named() -> None:
    run = Run.of("dense", "fixed", damping=0.0)  # a softmax has one logit too many
    with pytest.raises(NotPositiveDefiniteError, match=r"factor F of .*eigenvalue"):
        run.step(batches(1)[0])


# ---- outputs and targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["diagonal", "dense", "kfac"])
def test_targets_out_of_range_are_said_in_our_words(metric: str) -> None:
    run, ((x, y),) = Run.of(metric, "adaptive"), batches(1)
    with pytest.raises(TargetError, match=r"class indices from 0 to 2.*got 3"):
        run.step((x, y + 3 - y))
    run.step((x, y))


def test_targets_that_torch_would_take_are_checked_too() -> None:
    for loss, y in (
        (nn.BCEWithLogitsLoss(), torch.full((40, 3), 1.5, dtype=DTYPE)),
        (nn.MSELoss(), torch.zeros(40, dtype=DTYPE)),
        (nn.PoissonNLLLoss(), torch.full((40, 3), -1.0, dtype=DTYPE)),
        (nn.CrossEntropyLoss(), torch.full((40, 3), -1.0, dtype=DTYPE)),
    ):
        run, ((x, _),) = Run.of("kfac", "adaptive", loss=loss), batches(1)
        start = parameters(run.model)
        with pytest.raises(TargetError):
            run.step((x, y))
        assert torch.equal(parameters(run.model), start)


def test_outputs_of_a_wrong_shape_are_said_in_our_words() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).squeeze(-1)

    run, ((x, y),) = Run.of("kfac", "adaptive", Flat()), batches(1)
    with pytest.raises(OutputError, match=r"logits \[N, C, \.\.\.\], got shape \(40,\)"):
        run.step((x, y))


class Reshaped(nn.Module):
    """What the loss reads is not quite what the model returns."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("metric", METRICS)
def test_outputs_may_be_squeezed_before_the_loss(metric: str) -> None:
    ends = []
    for squeeze in (False, True):
        model, loss = Reshaped(1), nn.BCEWithLogitsLoss()
        optimizer = natgrad.NaturalGradient(model, loss, metric=METRICS[metric])
        for x, y in batches(6):
            optimizer.zero_grad()
            z, target = model(x), (y > 0).double()
            loss(z.squeeze(-1) if squeeze else z, target if squeeze else target[:, None]).backward()
            optimizer.step()
        ends.append(parameters(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_tokens_may_be_flattened_before_the_loss(metric: str) -> None:
    model, loss = Reshaped(3), nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss, metric=METRICS[metric])
    losses = []
    for x, y in batches(25, 240):
        optimizer.zero_grad()
        z = model(x.view(60, 4, 2))
        value = loss(z.flatten(0, 1), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_what_cannot_be_followed_asks_for_outputs() -> None:
    model, loss = Reshaped(3), nn.CrossEntropyLoss()
    x, y = batches(1, 40)[0]

    def value() -> Tensor:
        return loss(model(x.view(10, 4, 2)).transpose(1, 2), y.view(10, 4))

    optimizer = natgrad.NaturalGradient(model, loss)
    start = parameters(model)
    value().backward()
    with pytest.raises(OutputError, match=r"\(10, 3, 4\).*\(10, 4, 3\).*outputs=lambda"):
        optimizer.step()
    assert torch.equal(parameters(model), start)
    told = natgrad.NaturalGradient(model, loss, outputs=lambda z: z.transpose(1, 2))
    told.zero_grad()
    value().backward()
    told.step()
    fixed = natgrad.NaturalGradient(model, loss, lr=0.1)
    fixed.zero_grad()
    value().backward()
    fixed.step()  # nothing needs the outputs again


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x), "hidden": x}


def test_a_model_that_returns_a_dict_asks_for_outputs() -> None:
    model, loss = Named(), nn.CrossEntropyLoss()
    ((x, y),) = batches(1)

    def step(**options: Any) -> None:
        optimizer = natgrad.NaturalGradient(model, loss, **options)
        optimizer.zero_grad()
        loss(model(x)["logits"], y).backward()
        optimizer.step()

    start = parameters(model)
    with pytest.raises(OutputError, match=r"dict with keys logits, hidden.*outputs=lambda o: o\.logits"):
        step()
    assert torch.equal(parameters(model), start)
    step(lr=0.1)
    step(outputs=lambda o: o["logits"])
    assert not torch.equal(parameters(model), start)


def test_a_likelihood_alone_is_enough_for_a_loss_inside_the_model() -> None:
    """As in Hugging Face: the model returns its loss, and nobody calls a torch loss."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            z = self.inner(x)
            return {"loss": nn.functional.cross_entropy(z, labels), "logits": z}

    def run(closed: bool) -> Tensor:
        model, losses = Inside(), []
        optimizer = natgrad.NaturalGradient(model, natgrad.Categorical(), outputs=lambda o: o["logits"])

        def evaluate(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            value = model(x, labels=y)["loss"]
            value.backward()
            losses.append(value.item())
            return value

        for x, y in batches(25):
            if closed:
                optimizer.step(lambda x=x, y=y: evaluate(x, y))
            else:
                evaluate(x, y)
                optimizer.step()
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
        return parameters(model)

    assert torch.equal(run(False), run(True))
    with pytest.raises(ConfigError, match="likelihood"):
        natgrad.NaturalGradient(Inside(), natgrad.Categorical(), damping=natgrad.LevenbergMarquardt())


# ---- steps and arguments -------------------------------------------------------------------------------------


def test_an_adaptive_step_must_have_seen_the_batch() -> None:
    run, ((x, y),) = Run.of("euclidean", "adaptive"), batches(1)
    nn.functional.cross_entropy(run.model(x), y).backward()
    with pytest.raises(StepError, match=r"call the model and the loss that you gave"):
        run.optimizer.step()


def test_a_metric_must_have_seen_a_batch() -> None:
    for metric in ("diagonal", "dense", "kfac"):
        run, ((x, y),) = Run.of(metric, "fixed"), batches(1)
        start = parameters(run.model)
        nn.functional.cross_entropy(run.model(x), y).backward()
        with pytest.raises(StepError, match=r"loss"):
            run.optimizer.step()
        assert torch.equal(parameters(run.model), start)


def test_a_fixed_step_measures_rho_if_its_damping_asks_for_it() -> None:
    rule = natgrad.LevenbergMarquardt(period=1)
    run = Run.of("dense", "fixed", lr=FixedStep(0.5), momentum=None, damping=rule)
    for batch in batches(4, size=30):
        before = run.step(batch)
        info = run.optimizer.info
        with torch.no_grad():
            after = run.value(batch).item()
        assert info.actual == pytest.approx(after - before, rel=1e-6)
        assert info.rho == pytest.approx(info.actual / info.predicted)
    assert run.optimizer.damping != rule.initial


def test_attention_has_a_forward_mode_derivative() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x).view(-1, 1, 4, 4)
            return self.last(nn.functional.scaled_dot_product_attention(h, h, h).mean(2).squeeze(1))

    model, loss = Attends(), nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(torch.randn(20, 4, 2)), torch.randint(3, (20,))).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "kfca"}, UnknownNameError, "'kfac'"),
        ({"metric": "Dense"}, UnknownNameError, "'dense'"),
        ({"metric": "adam"}, UnknownNameError, "metric"),
        ({"metric": 3}, ConfigError, "metric"),
        ({"lr": -1.0}, ConfigError, "lr"),
        ({"lr": "fast"}, ConfigError, "lr"),
        ({"lr": 0.1, "momentum": 1.0}, ConfigError, "momentum"),
        ({"lr": FixedStep(0.1), "momentum": 0.9}, ConfigError, "momentum"),
        ({"damping": -1.0}, ConfigError, "damping"),
        ({"damping": "small"}, ConfigError, "damping"),
        ({"weight_decay": -0.1}, ConfigError, "weight decay"),
        ({"weight_decay": float("nan")}, ConfigError, "weight decay"),
        ({"on_nonfinite": "ignore"}, ConfigError, "on_nonfinite"),
        ({"params": [{"params": [], "metric": "kfac"}]}, natgrad.EmptyError, "trainable"),
    ],
)
def test_arguments_are_checked(options: dict, error: type, message: str) -> None:
    with pytest.raises((error, TypeCheckError), match=message):  # under pytest, types are checked first
        natgrad.NaturalGradient(net(), nn.CrossEntropyLoss(), **options)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.L1Loss(), "MSELoss"),
        (nn.NLLLoss(), "CrossEntropyLoss"),
        (nn.CrossEntropyLoss(reduction="none"), "mean"),
    ],
)
def test_a_loss_without_a_likelihood_says_what_to_pass_instead(loss: Any, message: str) -> None:
    with pytest.raises(UnsupportedLossError, match=message):
        natgrad.NaturalGradient(net(), loss)
