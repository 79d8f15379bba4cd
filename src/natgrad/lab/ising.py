"""The ground state of the transverse-field Ising chain, by samples of a network's wave function.

    H = −J Σ σᶻᵢσᶻᵢ₊₁ − h Σ σˣᵢ    on a ring of n spins, J = 1; critical at h = 1

A network gives log ψ(s) of a configuration s ∈ {−1, 1}ⁿ. Samples of |ψ|² give the energy and its gradient; the error is
that of the energy of ψ itself, summed over all 2ⁿ configurations, against exact diagonalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from natgrad.lab.extras import require
from natgrad.lab.problem import LossFn, Stepped, Task
from natgrad.optim import reconfigure


class LogPsi(nn.Module):
    """Log ψ of a ring of spins: two circular convolutions that reach all around it.

    The sum over the ring makes ψ the same for every translation of s. No bias, tanh odd and log cosh even: the same
    for −s, too. So is the ground state.
    """

    def __init__(self, n: int, channels: int = 8) -> None:
        super().__init__()
        ring: dict[str, Any] = {
            "kernel_size": n,
            "padding": "same",
            "padding_mode": "circular",
            "bias": False,
        }
        self.first = nn.Conv1d(1, channels, **ring, dtype=torch.float64)
        self.second = nn.Conv1d(channels, channels, **ring, dtype=torch.float64)

    def forward(self, s: Tensor) -> Tensor:
        """Configurations [N, n] to log ψ [N]."""
        z = self.second(torch.tanh(self.first(s[:, None])))
        return torch.logaddexp(z, -z).sum((1, 2))  # log 2 cosh z


@torch.no_grad()
def local_energies(log_psi: nn.Module, s: Tensor, h: float) -> Tensor:
    """⟨s|H|ψ⟩ / ⟨s|ψ⟩ [N]: the bonds, and ψ's ratio for each flipped spin, in one forward pass."""
    n = s.shape[1]
    flipped = s[:, None] * (1 - 2 * torch.eye(n, dtype=s.dtype))
    values = log_psi(torch.cat([s, flipped.flatten(0, 1)]))
    ratios = (values[len(s) :].view(-1, n) - values[: len(s), None]).exp()
    return -(s * s.roll(-1, 1)).sum(1) - h * ratios.sum(1)


def configurations(n: int) -> Tensor:
    """All configurations [2ⁿ, n]; a bit of the row's number that is set is a spin down."""
    return 1.0 - 2 * (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).double()


def ground_energy(n: int, h: float) -> float:
    """The least eigenvalue of H [2ⁿ, 2ⁿ], by Lanczos."""
    sparse, linalg = (require(f"scipy.sparse{m}", "exact diagonalisation") for m in ("", ".linalg"))
    states, s = torch.arange(2**n), configurations(n)
    H = sparse.diags_array(-(s * s.roll(-1, 1)).sum(1).numpy()).tocsr()
    for site in range(n):
        flipped = (states ^ (1 << site)).numpy()
        weight = torch.full((2**n,), -h, dtype=torch.float64).numpy()
        H = H + sparse.csr_array((weight, (states.numpy(), flipped)), shape=H.shape)
    return float(linalg.eigsh(H, k=1, which="SA", tol=1e-13, return_eigenvectors=False)[0])


@torch.no_grad()
def energy(log_psi: nn.Module, n: int, h: float) -> tuple[float, float]:
    """⟨H⟩ of ψ and its variance, over all configurations."""
    s, states = configurations(n), torch.arange(2**n)
    log = torch.cat([log_psi(part) for part in s.split(8192)])
    psi = (log - log.max()).exp()
    psi /= psi.norm()
    image = -(s * s.roll(-1, 1)).sum(1) * psi
    for site in range(n):
        image -= h * psi[states ^ (1 << site)]
    mean = float(psi @ image)
    return mean, float((image - mean * psi).square().sum())


@dataclass(frozen=True, eq=False, kw_only=True)
class SpinChain(Task):
    """The chain as a problem of a race. Samples are drawn from |ψ|² of all configurations, and so are independent.

    Attributes:
        spins: n.
        field: h.
        samples: of each step.
        exact: the ground state's energy.
    """

    spins: int
    field: float
    samples: int
    exact: float
    measure: str = "relative error of the energy"
    unit: str = ""
    things: str = "samples"
    sampled: bool = True

    @property
    def examples(self) -> int:
        """All of a step's."""
        return self.samples

    @property
    def examples_a_step(self) -> int:
        """Samples."""
        return self.samples

    @property
    def likelihood(self) -> None:
        """None: samples come with energies."""
        return None

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[int]:
        """The seeds of each step's samples."""
        step = start
        while True:
            yield seed * 1_000_003 + step
            step += 1

    def drawn(
        self, model: nn.Module, seed: int
    ) -> tuple[Float[Tensor, "k n"], Float[Tensor, " k"], Int[Tensor, " k"]]:
        """Configurations, their local energies, and how often each was drawn."""
        s = configurations(self.spins)
        with torch.no_grad():
            chances = (2 * model(s)).softmax(0)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.multinomial(chances, self.samples, replacement=True, generator=generator)
        kept, counts = rows.unique(return_counts=True)
        return s[kept], local_energies(model, s[kept], self.field), counts

    def loss(self, model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
        """The energy, with the gradient 2⟨(E − ⟨E⟩) ∂ log ψ⟩."""
        s, energies, counts = self.drawn(model, batch)
        share = counts / counts.sum().double()
        mean = share @ energies
        surrogate = (2 * share * (energies - mean) * model(s)).sum()
        return mean + surrogate - surrogate.detach()

    def residuals_of(self, model: nn.Module, batch: Any) -> Stepped:
        """Stochastic reconfiguration on the step's samples."""
        s, energies, counts = self.drawn(model, batch)
        return reconfigure(model, s, energies, counts.double())

    def judge(self, twin: nn.Module) -> dict[str, float]:
        """The energy of ψ, and its relative error."""
        mean, _ = energy(twin, self.spins, self.field)
        return {"loss": mean, "excess": (mean - self.exact) / abs(self.exact)}


def ising() -> SpinChain:
    """A critical chain of ten spins: the energy against exact diagonalisation, by SPRING at a rate set by hand."""
    return SpinChain(
        name="ising", title="a network of 880 weights finds the ground state of ten spins in a transverse field",
        make_model=lambda seed: LogPsi(10), spins=10, field=1.0, samples=1000, exact=ground_energy(10, 1.0),
        settings={"lr": 0.1, "damping": 1e-3, "momentum": 0.9}, target=1e-5, steps=100, evaluate_every=5,
        rates={"adam": 1e-2, "adamw": 1e-2}, schedule=True,
    )  # fmt: skip
