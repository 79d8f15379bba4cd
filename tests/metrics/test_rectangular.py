"""metric="rectangular" is the Fisher information of the definition, through the singular values of its rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import natgrad.operators.rectangular as operators
from natgrad import ConfigError
from natgrad.metrics import Gram, Rectangular
from oracle.problems import problem

DTYPE = torch.float64


def test_small_singular_values_keep_their_digits(show: Callable) -> None:
    """Inputs that nearly depend on one another: what is left is below rounding in JJᵀ, and not in J."""
    model = nn.Linear(2, 1, bias=False).double()
    source = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(8, 2, dtype=DTYPE, generator=source)).Q.unbind(1)
    x, y = torch.stack([u, u + 1e-10 * v], 1), torch.zeros(8, 1, dtype=DTYPE)
    truth = torch.tensor([2.0, -3.0], dtype=DTYPE)
    errors = []
    for metric in (Rectangular(), Gram()):
        operator = show(metric, model, nn.MSELoss(reduction="sum")).observe(x, y).operator()
        target = operator.rows.matmul({"weight": truth.view(1, 1, 2)})[0]
        found = operator.dual_solve(target, 0.0)["weight"].view(2)
        errors.append(float((found - truth).norm()))
    assert errors[0] < 1e-4  # 1e-16 times the condition number of J
    assert errors[1] > 0.1


def test_what_would_not_fit_is_refused(show: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem("linear", "ce")
    shown = show(Rectangular(), one.model, one.loss)
    shown.observe(one.x, one.y)
    monkeypatch.setattr(operators, "LARGEST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"bytes.*gram"):
        shown.estimate.solve({n: torch.zeros_like(p) for n, p in one.model.named_parameters()}, 0.1, 0)
