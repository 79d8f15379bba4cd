"""Which torch losses have a likelihood, and what is said of those that have none."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from natgrad.errors import UnsupportedLossError
from natgrad.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
    likelihood_from,
)


def test_options_are_carried_over_and_tensors_by_reference() -> None:
    w = torch.ones(3)
    ce = nn.CrossEntropyLoss(weight=w, label_smoothing=0.1, ignore_index=2, reduction="sum")
    found = likelihood_from(ce)
    assert isinstance(found, Categorical)
    assert (found.label_smoothing, found.ignore_index, found.reduction) == (0.1, 2, "sum")
    assert found.weight is ce.weight

    bce = nn.BCEWithLogitsLoss(weight=w, pos_weight=2 * w)
    found = likelihood_from(bce)
    assert isinstance(found, Bernoulli)
    assert found.weight is bce.weight
    assert found.pos_weight is bce.pos_weight
    assert found.reduction == "mean"

    found = likelihood_from(nn.GaussianNLLLoss(full=True, eps=1e-3, reduction="sum"))
    assert isinstance(found, HeteroscedasticGaussian)
    assert (found.full, found.eps, found.reduction) == (True, 1e-3, "sum")

    found = likelihood_from(nn.PoissonNLLLoss(full=True))
    assert isinstance(found, Poisson)
    assert (found.full, found.reduction) == (True, "mean")
    assert isinstance(likelihood_from(nn.MSELoss()), Gaussian)


def test_a_weight_that_changes_in_place_is_seen() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(2), reduction="sum")
    likelihood, z, y = likelihood_from(loss), torch.zeros(1, 2), torch.tensor([0])
    before = likelihood.fisher_product(z, torch.tensor([[1.0, 0.0]]), y)
    loss.weight.mul_(3)
    torch.testing.assert_close(likelihood.fisher_product(z, torch.tensor([[1.0, 0.0]]), y), 3 * before)


def test_a_likelihood_is_returned_as_it_is() -> None:
    likelihood = Categorical()
    assert likelihood_from(likelihood) is likelihood
    assert likelihood != Categorical()  # by identity, since weights are tensors
    assert len({likelihood, likelihood}) == 1


class Same(nn.CrossEntropyLoss):
    """A subclass with nothing of its own in forward."""


class Other(nn.CrossEntropyLoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(input, target) + input.square().mean()


class Called(nn.MSELoss):
    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        return 2 * super().__call__(*args)


def test_a_subclass_counts_if_its_forward_is_torchs() -> None:
    assert isinstance(likelihood_from(Same(label_smoothing=0.1)), Categorical)
    for own in (Other(), Called()):
        with pytest.raises(UnsupportedLossError, match=f"{type(own).__name__} has a forward of its own"):
            likelihood_from(own)
    patched = nn.MSELoss()
    patched.forward = lambda z, y: (z - y).abs().mean()
    with pytest.raises(UnsupportedLossError, match="has a forward of its own"):
        likelihood_from(patched)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (nn.NLLLoss(), "NLLLoss has no known likelihood; pass CrossEntropyLoss on the logits"),
        (nn.BCELoss(), "pass BCEWithLogitsLoss on the logits"),
        (nn.L1Loss(), "pass MSELoss, or a natgrad Likelihood of your own"),
        (nn.SmoothL1Loss(), "pass MSELoss, or"),
        (nn.HuberLoss(), "pass MSELoss, or"),
        (nn.KLDivLoss(), "CrossEntropyLoss on the logits with class probabilities"),
        (nn.MultiLabelSoftMarginLoss(), "pass BCEWithLogitsLoss"),
        (nn.SoftMarginLoss(), "pass BCEWithLogitsLoss"),
        (
            nn.CTCLoss(),
            r"supported: torch.nn.CrossEntropyLoss, .*torch.nn.PoissonNLLLoss, or a natgrad Likelihood",
        ),
        (nn.Linear(1, 1), "Linear has no known likelihood; supported"),
        (
            F.cross_entropy,
            r"the function cross_entropy has no .* pass torch.nn.CrossEntropyLoss\(...\) with the same",
        ),
        (F.mse_loss, "pass torch.nn.MSELoss"),
        (F.nll_loss, "pass CrossEntropyLoss on the logits"),
        (functools.partial(F.cross_entropy, label_smoothing=0.1), "pass torch.nn.CrossEntropyLoss"),
        (lambda z, y: 0, "pass a torch.nn loss module: a function does not say"),
        (nn.CrossEntropyLoss, r"a class; pass an instance, CrossEntropyLoss\(\)"),
        (Categorical, r"a class; pass an instance, Categorical\(\)"),
        ("cross_entropy", "'cross_entropy' has no known likelihood; supported"),
        (None, "None has no known likelihood"),
        (nn.PoissonNLLLoss(log_input=False), "return log-rates and pass PoissonNLLLoss"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction='none', but .* pass reduction='mean' or 'sum'"),
        (nn.MSELoss(reduction="none"), "pass reduction='mean' or 'sum'"),
    ],
)
def test_other_losses_are_refused_with_advice(loss: object, match: str) -> None:
    with pytest.raises(UnsupportedLossError, match=match) as raised:
        likelihood_from(loss)
    assert isinstance(raised.value, TypeError)
