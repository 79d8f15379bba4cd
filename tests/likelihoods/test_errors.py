"""What is refused, and that the message says what it got, what it expects and what to do."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from natgrad.errors import ConfigError, OutputError, TargetError
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Likelihood, Poisson

Z = torch.zeros(5, 3)
MAP = torch.zeros(2, 3, 4)


@pytest.mark.parametrize("kind", [Bernoulli, Categorical, Gaussian, Poisson])
@pytest.mark.parametrize(
    ("outputs", "match"),
    [
        (OrderedDict(logits=Z), "got OrderedDict. If the model returns more .* outputs=lambda o: o.logits"),
        ((Z, Z), "got tuple"),
        (None, "got NoneType"),
        (Z.long(), "a floating-point type, got torch.int64"),
        (Z.to(torch.complex64), "got torch.complex64"),
    ],
)
def test_outputs_of_another_type(kind: type[Likelihood], outputs: object, match: str) -> None:
    with pytest.raises(OutputError, match=match):
        kind().check(outputs)


@pytest.mark.parametrize("shape", [(3,), (), (4, 0)])
def test_logits_need_a_batch_and_classes(shape: tuple[int, ...]) -> None:
    with pytest.raises(OutputError, match=r"reads logits \[N, C, ...\], got shape"):
        Categorical().check(torch.zeros(shape))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "match"),
    [
        (
            Categorical(),
            Z,
            torch.tensor([0, 1, 3, 2, 1]),
            r"from 0 to 2 .*size 3.* or ignore_index=-100; got 3",
        ),
        (Categorical(), Z, torch.tensor([0, -1, 0, 2, 1]), r"from 0 to 2 .* got -1"),
        (Categorical(ignore_index=7), Z, torch.tensor([0, 7, 0, 9, 1]), r"ignore_index=7; got 9"),
        (
            Categorical(),
            Z,
            torch.zeros(5, 1).long(),
            r"class indices \(5,\) for logits \(5, 3\), got \(5, 1\)",
        ),
        (Categorical(), MAP, torch.zeros(2, 3).long(), r"\(2, 4\) .* flatten both, logits.flatten\(0, -2\)"),
        (Categorical(), Z, torch.zeros(5), r"need the logits' shape \(5, 3\), got \(5,\); .* call .long\(\)"),
        (Categorical(), Z, torch.zeros(5, dtype=torch.bool), "integer class indices, got torch.bool"),
        (Categorical(), Z, torch.zeros(5, 3) - 0.1, "must not be negative, got -0.1"),
        (Categorical(), Z, torch.full((5, 3), math.nan), "must not be negative, got nan"),
        (
            Categorical(ignore_index=1),
            Z,
            torch.zeros(5, 3),
            "ignore_index=1 has no meaning for class probabilities",
        ),
        (Bernoulli(), Z, torch.zeros(5), r"the outputs' shape \(5, 3\), got \(5,\); they are not broadcast"),
        (Bernoulli(), Z, torch.full((5, 3), 1.5), r"targets in \[0, 1\], got 1.5"),
        (Bernoulli(), Z, torch.full((5, 3), -1), r"targets in \[0, 1\], got -1"),
        (Bernoulli(), Z, torch.full((5, 3), math.nan), r"targets in \[0, 1\], got nan"),
        (Bernoulli(), Z, Z.to(torch.complex64), "expects real targets, got torch.complex64"),
        (Gaussian(), Z, torch.zeros(5, 1), r"\(5, 3\), got \(5, 1\); they are not broadcast: reshape"),
        (Gaussian(), torch.zeros(5, 1), torch.zeros(5), r"\(5, 1\), got \(5,\); .* outputs.squeeze\(-1\)"),
        (Poisson(), Z, torch.zeros(3), r"\(5, 3\), got \(3,\)"),
        (Poisson(), Z, torch.full((5, 3), -2.0), "counts, which are at least 0, got -2"),
    ],
)
@pytest.mark.parametrize("method", ["check", "loss", "log_prob", "signals"])
def test_targets(likelihood: Likelihood, outputs: Tensor, targets: Tensor, match: str, method: str) -> None:
    options = {"kind": "empirical"} if method == "signals" else {}
    with pytest.raises(TargetError, match=match):
        getattr(likelihood, method)(outputs, targets, **options)


@pytest.mark.parametrize("kind", [Bernoulli, Categorical, Gaussian, Poisson])
@pytest.mark.parametrize(("targets", "name"), [([0, 1], "list"), (1.0, "float")])
def test_targets_of_another_type(kind: type[Likelihood], targets: object, name: str) -> None:
    with pytest.raises(TargetError, match=f"{kind.__name__} expects its targets in a tensor, got {name}"):
        kind().check(Z, targets)


def test_targets_that_the_fisher_depends_on_are_checked_for_it() -> None:
    bad = torch.tensor([0, 1, 3, 2, 1])
    with pytest.raises(TargetError, match="got 3"):
        Categorical().fisher_product(Z, Z, bad)
    with pytest.raises(TargetError, match="got 3"):
        Categorical().signals(Z, bad)
    with pytest.raises(TargetError, match="got 2"):
        Bernoulli(pos_weight=torch.ones(3)).fisher_product(Z, Z, Z + 2)
    with pytest.raises(TargetError, match=r"got \(3,\)"):
        Bernoulli().fisher_product(Z, Z, torch.zeros(3))
    Bernoulli().fisher_product(Z, Z, Z + 2)  # values that H does not depend on cost no pass over memory


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Categorical(reduction="none"), "must be 'mean' or 'sum', got 'none'"),
        (lambda: Gaussian(reduction="batchmean"), "must be 'mean' or 'sum', got 'batchmean'"),
        (lambda: Bernoulli(reduction="none"), "got 'none'"),
        (lambda: Poisson(reduction="none"), "got 'none'"),
        (lambda: HeteroscedasticGaussian(reduction="none"), "got 'none'"),
        (lambda: HeteroscedasticGaussian(eps=0.0), "eps must be positive, got 0.0"),
        (lambda: Categorical(weight=-torch.ones(3)), "weight must be non-negative, its least entry is -1"),
        (lambda: Categorical(weight=torch.ones(3, 1)), r"one number a class, \[C\], got shape \(3, 1\)"),
        (lambda: Categorical(label_smoothing=1.5), r"must be in \[0, 1\], got 1.5"),
        (lambda: Bernoulli(weight=torch.tensor([1.0, math.nan])), "weight must be non-negative, .* nan"),
        (
            lambda: Bernoulli(pos_weight=-torch.ones(3)),
            "pos_weight must be non-negative, its least entry is -1",
        ),
    ],
)
def test_options_out_of_range(build: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build()


def test_weights_that_do_not_fit_the_outputs() -> None:
    with pytest.raises(
        OutputError, match=r"weights of 4 classes, but the logits \(5, 3\) have 3 in dimension 1"
    ):
        Categorical(weight=torch.ones(4)).check(Z)
    with pytest.raises(OutputError, match=r"pos_weight of shape \(5,\) can't be broadcast .* \(5, 3\)"):
        Bernoulli(pos_weight=torch.ones(5)).check(Z)
    with pytest.raises(OutputError, match=r"weight of shape \(2, 5, 3\) can't be broadcast"):
        Bernoulli(weight=torch.ones(2, 5, 3)).check(Z)


@pytest.mark.parametrize("vector", [Z[0], torch.zeros(5, 3, 2), (Z,), (Z, Z)])
def test_a_vector_of_another_shape(vector: Tensor | tuple) -> None:
    with pytest.raises(
        OutputError, match=r"the outputs' shapes \[\(5, 3\)\], after any leading dimensions; got \["
    ):
        Gaussian().fisher_product(Z, vector)


def test_a_vector_of_another_structure() -> None:
    with pytest.raises(OutputError, match="the vector must have the outputs' shapes"):
        HeteroscedasticGaussian().fisher_product((Z, Z + 1), Z)


def test_a_likelihood_can_not_be_changed_and_takes_its_options_by_name() -> None:
    with pytest.raises(AttributeError):
        Categorical().reduction = "sum"
    with pytest.raises(TypeError):
        Categorical("sum")
    with pytest.raises(TypeError, match="abstract"):
        Likelihood()
