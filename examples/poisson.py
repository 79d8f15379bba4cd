"""Standard errors of a Poisson regression, from the Fisher information: the Cramér–Rao bound.

No unbiased estimate of θ has a covariance below (N F)⁻¹, and the maximum-likelihood estimate attains it as N grows
(Cramér 1946; Rao 1945). With kind="empirical", F̂ is the second moment of the scores, and (N F)⁻¹ (N F̂) (N F)⁻¹ is the
sandwich that stays right where the counts are no Poisson counts (White 1980, "HC0").

The data: 20,190 person-years of the RAND health insurance experiment, and how often a doctor was seen in each.

    python examples/poisson.py [--plot FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab.extras import require


class Fit(NamedTuple):
    """A fitted regression: names, estimates [k], covariances [k, k]."""

    names: list[str]
    estimate: Tensor
    covariance: Tensor
    robust: Tensor


def main(plot: Path | None = None) -> dict[str, float]:
    """Fits, prints the table, and returns the largest relative differences to statsmodels."""
    X, y, names = visits()
    ours = fit(X, y, names)
    theirs, robust = statsmodels_fit(X, y)
    errors, sandwich = ours.covariance.diagonal().sqrt(), ours.robust.diagonal().sqrt()
    print(f"{len(y):,} person-years; log E[visits] = θᵀx\n")
    print(f"{'':<8}{'estimate':>10}{'standard error':>16}{'robust':>10}")
    for name, value, error, wide in zip(names, ours.estimate, errors, sandwich, strict=True):
        print(f"{name:<8}{float(value):>10.4f}{float(error):>16.5f}{float(wide):>10.5f}")
    differences = {
        "covariance": relative(ours.covariance, torch.as_tensor(theirs.cov_params())),
        "standard errors": relative(errors, torch.as_tensor(theirs.bse)),
        "robust covariance": relative(ours.robust, torch.as_tensor(robust.cov_params())),
    }
    print("\nlargest difference to statsmodels, relative to the largest entry:")
    for name, difference in differences.items():
        print(f"    {name:<20}{difference:.1e}")
    if plot:
        draw(ours, plot)
    return differences


def fit(X: Tensor, y: Tensor, names: list[str]) -> Fit:
    """Fisher scoring, which is natural gradient descent with α = 1, and the covariances at its end."""
    model = nn.Linear(X.shape[1], 1, bias=False, dtype=X.dtype)  # z = Xθ, the logarithm of the mean
    nn.init.zeros_(model.weight)
    loss_fn = nn.PoissonNLLLoss(log_input=True)
    with torch.no_grad():
        model.weight[0, 0] = y.mean().log()  # the column of ones: start at the mean
    for _ in range(25):
        (gradient,) = torch.autograd.grad(loss_fn(model(X), y), [model.weight])
        F = natgrad.fisher(model, loss_fn, (X, y), metric="dense")
        step = F.natural_gradient({"weight": gradient})
        with torch.no_grad():
            model.weight -= step["weight"]
        if float(F.norm(step)) < 1e-14:
            break
    N = len(y)
    F = natgrad.fisher(model, loss_fn, (X, y), metric="dense")
    empirical = natgrad.fisher(model, loss_fn, (X, y), metric="dense", kind="empirical")
    covariance = F.inv().to_dense() / N  # F is per example, so N·F is the information in all of them
    return Fit(
        names, model.weight[0].detach(), covariance, covariance @ (N * empirical.to_dense()) @ covariance
    )


def visits() -> tuple[Tensor, Tensor, list[str]]:
    """Regressors with a column of ones [N, 10], counts [N, 1], and the regressors' names."""
    frame = require("statsmodels.datasets", "the data and the comparison").randhie.load_pandas().data
    names = [name for name in frame.columns if name != "mdvis"]
    X = torch.as_tensor(frame[names].to_numpy(dtype="float64").copy())
    y = torch.as_tensor(frame["mdvis"].to_numpy(dtype="float64").copy())[:, None]
    return torch.cat([torch.ones(len(X), 1, dtype=X.dtype), X], dim=1), y, ["const", *names]


def statsmodels_fit(X: Tensor, y: Tensor):
    """The same by statsmodels, with its covariance and with the robust one."""
    api = require("statsmodels.api", "the comparison")
    model = api.GLM(y[:, 0].numpy(), X.numpy(), family=api.families.Poisson())
    return model.fit(tol=1e-12, maxiter=100), model.fit(tol=1e-12, maxiter=100, cov_type="HC0")


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two entries, relative to the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def draw(fit: Fit, path: Path) -> None:
    """Each estimate with intervals of 95 %."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import FAINT, styled

    with styled():
        figure = Figure(figsize=(6.0, 3.8), layout="constrained")
        axes = figure.subplots()
        names, at = fit.names[1:], range(len(fit.names) - 1)
        wide, narrow = (1.96 * c.diagonal().sqrt()[1:] for c in (fit.robust, fit.covariance))
        axes.errorbar(fit.estimate[1:], at, xerr=wide, fmt="none", ecolor="#0072B2", elinewidth=1.6, capsize=3,
                      label="robust (sandwich)")  # fmt: skip
        axes.errorbar(fit.estimate[1:], at, xerr=narrow, fmt="o", ms=4, color="#D55E00", elinewidth=4,
                      label="Cramér–Rao, (N F)⁻¹")  # fmt: skip
        axes.axvline(0, color=FAINT, linewidth=0.9, dashes=(4, 3), zorder=0)
        axes.set_yticks(list(at), names)
        axes.invert_yaxis()
        axes.set_xlabel("effect on log E[visits], with 95 % intervals")
        axes.legend(loc="upper right")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="standard errors of a Poisson regression")
    parser.add_argument("--plot", type=Path, help="draw estimates and intervals into this file")
    main(plot=parser.parse_args().plot)
