"""Each example runs, small, and bears out what its page says."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab import equations, ising

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = Path(__file__).parents[2] / "docs" / "uses"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def drawn(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


class Complex(nn.Module):
    """Log ψ from a network with two outputs: its real part and its phase."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(self.net(x))


def test_a_laplace_approximation_is_better_calibrated_than_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    scores = main_of("laplace")(train=500, draws=30, epochs=20, plot=tmp_path / "a.png")
    point, linear = scores["MAP (the network itself)"], scores["Laplace, linearised"]
    assert linear.loglik > point.loglik
    assert linear.ece < 0.5 * point.ece
    assert linear.accuracy > point.accuracy - 0.02
    assert drawn(tmp_path / "a.png")


def test_planted_mistakes_come_out_on_top(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    precision = main_of("influence")(train=1000, planted=50, repeats=1, steps=50, plot=tmp_path / "a.png")
    assert precision["influence, kfac"] > 0.7
    assert precision["influence, kfac"] > precision["influence with F = I"] + 0.1
    assert drawn(tmp_path / "a.png")


def test_consolidated_weights_forget_less(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    outcomes = main_of("continual")(examples=300, epochs=8, seeds=(1,), plot=tmp_path / "a.png")
    without = outcomes["without"]
    assert without.forgetting > 0.2
    for name in ("EWC, diagonal", "EWC, kfac"):
        assert outcomes[name].forgetting < 0.5 * without.forgetting
        assert outcomes[name].final > without.final + 0.05
    assert drawn(tmp_path / "a.png")


def test_merged_models_know_more_than_the_mean_of_their_weights(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    accuracy = main_of("merging")(seeds=(0, 1), steps=60, plot=tmp_path / "a.png")
    for name in ("merged, diagonal", "merged, kfac", "merged, dense"):
        assert accuracy[name] > accuracy["mean of the weights"]
        assert accuracy[name] > accuracy["trained on 0 to 4"] + 0.2
    assert drawn(tmp_path / "a.png")


def test_standard_errors_of_a_poisson_regression_are_those_of_statsmodels(tmp_path: Path) -> None:
    pytest.importorskip("statsmodels")
    differences = main_of("poisson")(plot=tmp_path / "a.png")
    assert set(differences) == {"covariance", "standard errors", "robust covariance"}
    assert all(difference < 1e-6 for difference in differences.values())
    assert drawn(tmp_path / "a.png")


def test_a_trust_region_learns_to_balance_the_pole(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    runs = main_of("policy")(
        seeds=(3,), samples=24_000, rates=(0.02,), lambdas=(0.95,), plot=tmp_path / "a.png"
    )
    (ours,), (adam,) = runs["natural gradient", 0.95], runs["Adam, 0.02", 0.95]
    assert ours.samples == adam.samples == [4_000, 8_000, 12_000, 16_000, 20_000, 24_000]
    assert ours.returns[-1] > 100
    assert ours.returns[-1] > 1.5 * adam.returns[-1] > 1.5 * adam.returns[0]
    assert drawn(tmp_path / "a.png")


def test_the_spectrum_rises_and_then_falls_with_the_loss(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    moments = main_of("spectrum")(steps=(0, 10, 80), train=400, plot=tmp_path / "a.png")["natgrad"]
    start, early, late = moments
    assert early.effective > start.effective
    assert late.effective < early.effective
    assert late.loss < 0.05 * start.loss
    assert all(float(m.values.sum()) == pytest.approx(m.trace) for m in moments)
    assert drawn(tmp_path / "a.png")


def test_four_equations_are_solved_by_every_method(tmp_path: Path) -> None:
    runs = main_of("equations")(seconds=0.2, n=9, rates=(1e-2,), plot=tmp_path / "a.png")
    assert len(runs) == 4 * 6
    assert all(math.isfinite(error) for run in runs.values() for error in run.errors)
    assert drawn(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["Poisson, 2-D", "heat"])
def test_the_exact_natural_gradient_solves_equations_to_many_digits(name: str) -> None:
    example = runpy.run_path(str(EXAMPLES / "equations.py"))
    with torch.random.fork_rng():
        run = example["train"](
            example["EQUATIONS"][name],
            lambda net: example["by_natgrad"](net, metric="exact"),
            seconds=math.inf,
            seed=0,
            n=20,
            most=150,
        )
    assert run.errors[-1] < 1e-5


def test_the_equations_have_the_solutions_that_errors_are_taken_against() -> None:
    """By differences of second order: h² u⁗ / 12 beside k² u."""
    h = 1e-3
    x = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for solution, operator in (
        ("cylindrical_wave", lambda u, xx, t, tt: (xx + tt) / equations.K**2 + u),
        ("cooling", lambda u, xx, t, tt: t - 0.25 * xx),
        ("product_of_sines", lambda u, xx, t, tt: (xx + tt) / (2 * math.pi**2) + u),
    ):
        u = getattr(equations, solution)
        e, f = torch.tensor([[h, 0.0]], dtype=x.dtype), torch.tensor([[0.0, h]], dtype=x.dtype)
        xx, tt = ((u(x + d) - 2 * u(x) + u(x - d)) / h**2 for d in (e, f))
        t = (u(x + f) - u(x - f)) / (2 * h)
        assert float(operator(u(x), xx, t, tt).abs().max()) < 1e-4


def test_the_ising_chain_reaches_the_ground_state(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    runs = main_of("ising")(sizes=(6,), seeds=(0,), chains=300, steps=60, plot=tmp_path / "a.png")
    ends = {name: run.errors[-1] for (_, _, name), (run,) in runs.items()}
    assert -1e-12 < ends["SPRING"] < 1e-5
    assert ends["stochastic reconfiguration"] < 1e-5
    assert ends["SPRING"] < 0.1 * ends["Adam"]
    assert drawn(tmp_path / "a.png")


def test_the_ising_chain_is_measured_rightly() -> None:
    """Local energies weighted with |ψ|² give ⟨H⟩, chains come to |ψ|², and the ring's energy is the closed form."""
    pytest.importorskip("scipy")
    metropolis = runpy.run_path(str(EXAMPLES / "ising.py"))["Metropolis"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        log_psi = ising.LogPsi(6)
    s = ising.configurations(6)
    with torch.no_grad():
        p = (2 * log_psi(s)).softmax(0)
    mean, variance = ising.energy(log_psi, 6, 0.7)
    energies = ising.local_energies(log_psi, s, 0.7)
    assert float(p @ energies) == pytest.approx(mean, rel=1e-12)
    assert float(p @ (energies - mean).square()) == pytest.approx(variance, rel=1e-9)
    drawn_states = metropolis(20_000, 6, 0).sample(log_psi, 60)
    counts = torch.bincount(
        ((1 - drawn_states) / 2 @ 2.0 ** torch.arange(6, dtype=s.dtype)).long(), minlength=64
    )
    assert float(((counts - 20_000 * p).square() / (20_000 * p)).sum()) < 63 + 5 * (2 * 63) ** 0.5
    # Jordan–Wigner: −2 Σ |cos(k/2)| over k = π(2j + 1)/n at h = J = 1 is −2 / sin(π/2n).
    assert ising.ground_energy(6, 1.0) == pytest.approx(-2 / math.sin(math.pi / 12), rel=1e-12)


def test_curves_are_fitted_to_certified_digits_and_lines_in_one_step(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("mpmath")
    names, conditions = ("Misra1a", "BoxBOD", "Thurber", "MGH10, log b", "Rosenbrock"), (1.0, 1e4, 1e10)
    runs, errors = main_of("fitting")(names, conditions, seeds=(0,), plot=tmp_path / "a.png")
    assert len(runs) == 9
    for (name, start), both in runs.items():
        ours, theirs = both["natgrad"], both["scipy"]
        assert ours.digits > 6.5, name
        if (name, start) == ("BoxBOD", 1):  # where MINPACK ends on a plateau
            continue
        assert theirs.digits > 6.5, name
        assert ours.squares == pytest.approx(theirs.squares, rel=1e-9, abs=1e-20)
        if (name, start) != ("Misra1a", 2):
            assert ours.reached()[0] <= theirs.reached()[0], name
    for condition, error, reference in zip(conditions, errors["rectangular"], errors["lstsq"]):
        assert error < 1e-15 * (condition + 10)
        assert error < 100 * reference
    assert errors["gram"][1] > 100 * errors["rectangular"][1]
    assert math.isnan(errors["dense"][2])
    assert drawn(tmp_path / "a.png")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_complex_amplitudes_learn_signs_as_well(momentum: float) -> None:
    """A Heisenberg ring of six spins without Marshall's sign rule: its ground state has both signs."""
    n, h = 6, 64
    numbers = torch.arange(h)
    spins = 1.0 - 2 * (numbers[:, None] >> torch.arange(n) & 1).double()
    H = torch.zeros(h, h, dtype=torch.float64)
    for i in range(n):
        j = (i + 1) % n
        bond = spins[:, i] * spins[:, j]
        H[numbers, numbers] += bond
        swapped = numbers ^ ((1 << i) | (1 << j))
        H[numbers, swapped] += torch.where(bond < 0, 2.0, 0.0)
    s_z = spins.sum(1) == 0
    H, spins = H[s_z][:, s_z], spins[s_z]
    exact = float(torch.linalg.eigvalsh(H)[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(n, 24), nn.Tanh(), nn.Linear(24, 2)).double()
    log_psi = Complex(net)
    optimizer = natgrad.NaturalGradient(log_psi, metric="exact", lr=0.02, damping=1e-3, momentum=momentum)
    for _ in range(400):
        with torch.no_grad():
            psi = log_psi(spins).exp()
        energies = (H.to(psi.dtype) @ psi) / psi
        energy = optimizer.step(natgrad.reconfigure(log_psi, spins, energies, psi.abs().square()))
    assert exact - 1e-9 < float(energy)
    assert (float(energy) - exact) / abs(exact) < 1e-3


@pytest.mark.parametrize(
    ("name", "needs", "small"),
    [
        ("with_lightning", "lightning", {"epochs": 3, "rates": ("1e-2",)}),
        ("with_trainer", "transformers", {"steps": 40, "rates": (1e-2,)}),
        ("with_accelerate", "accelerate", {"epochs": 4, "rates": (1e-2,)}),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:::(torch|lightning|pytorch_lightning|transformers|accelerate|torchmetrics)"
)
def test_natgrad_trains_inside_other_tools(name: str, needs: str, small: dict, tmp_path: Path) -> None:
    pytest.importorskip(needs)
    pytest.importorskip("sklearn")
    if needs != "lightning":  # its settings are those of the process
        pytest.importorskip("accelerate.state").AcceleratorState._reset_state(True)
    with torch.random.fork_rng():
        ours, theirs = main_of(name)(**small, plot=tmp_path / "a.png").values()
    assert len(ours) == len(theirs)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours[-1] < 0.6 * ours[0]
    assert drawn(tmp_path / "a.png")


def test_every_example_has_its_page_and_the_page_its_picture() -> None:
    examples = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {path.stem for path in PAGES.glob("*.md")} == examples
    for name in examples:
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert f"python examples/{name}.py" in text
        assert f"](../images/{name}.png)" in text
        assert (PAGES.parent / "images" / f"{name}.png").exists()
