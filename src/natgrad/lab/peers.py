"""Who takes part in a race: natgrad, and the optimisers that it is measured against.

An `Entrant` knows how to build its optimiser for a model and which learning rates are fair to try. Peers get the
rate that a search found for the problem (`Task.rates`) or, with ``--tune``, a grid of five around it; natgrad
gets neither.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import natgrad
from natgrad.errors import ConfigError, UnknownNameError
from natgrad.lab.extras import require
from natgrad.lab.problem import LossFn, Task

Build = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Entrant:
    """One optimiser of a race.

    Attributes:
        name: what the user types.
        label: what figures and tables say.
        build: function (model, loss_fn, rate, seed) → optimiser; natgrad's takes settings by keyword, too.
        rate: the learning rate, or None for an optimiser that finds its own.
        pinned: True where the user fixed the rate (``adam@3e-4``): no grid for it then.
        ours: True for natgrad's own.
        evaluates: True where a step evaluates the loss several times, by a closure.
    """

    name: str
    label: str
    build: Build
    rate: float | None = None
    pinned: bool = False
    ours: bool = False
    evaluates: bool = False

    def grid(self) -> tuple[float, ...]:
        """Five rates on the 1–3–10 ladder, centred on the default; empty where there is nothing to tune."""
        if self.rate is None or self.pinned:
            return ()
        centre = round(2 * math.log10(self.rate))
        return tuple(_ladder(centre + offset) for offset in range(-2, 3))

    def at(self, rate: float | None) -> Entrant:
        """The same optimiser with another rate."""
        return replace(self, rate=rate)


def neighbour(rate: float, up: bool) -> float:
    """The next rate on the ladder."""
    return _ladder(round(2 * math.log10(rate)) + (1 if up else -1))


def _ladder(half_decades: int) -> float:
    """…, 0.001, 0.003, 0.01, … : 10^(k/2) with √10 written as 3."""
    decade, odd = divmod(half_decades, 2)
    return float(f"{3 if odd else 1}e{decade}")


def share_of_rate(spent: float) -> float:
    """The part of its rate that a peer gets: rising over the first twentieth of the budget, then half a cosine."""
    rise = 0.05
    if spent < rise:
        return (spent + 0.01) / (rise + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (spent - rise) / (1 - rise)))


def _natgrad(metric: str, elsewhere: str | None = None) -> Build:
    """With a metric for losses, and perhaps another one for residuals and policies."""

    def build(
        model: nn.Module, loss_fn: LossFn, rate: float | None, seed: int, **settings: Any
    ) -> torch.optim.Optimizer:
        chosen = metric if isinstance(loss_fn, nn.Module) else elsewhere or metric
        settings = {"lr": rate, **settings}
        made: torch.optim.Optimizer = natgrad.NaturalGradient(
            model, loss_fn, metric=chosen, seed=seed, **settings
        )
        return made

    return build


def _torch(name: str, **options: Any) -> Build:
    def build(model: nn.Module, loss_fn: LossFn, rate: float | None, seed: int) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        made: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, lr=rate, **options)
        return made

    return build


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the hidden matrices, AdamW on everything else, as its authors use it.

    Muon orthogonalises the momentum of 2-d weights and is not defined on biases; embeddings and the last linear map
    are left to AdamW, too. Its update is scaled to AdamW's
    root mean square (``match_rms_adamw``), so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        outer = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        maps = [id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
        outer |= set(maps[-1:] if len(maps) > 1 else ())
        matrices = [p for p in parameters if p.dim() == 2 and id(p) not in outer]
        rest = [p for p in parameters if p.dim() != 2 or id(p) in outer]
        muon = torch.optim.Muon  # absent before torch 2.9: `unavailable` has asked
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, weight_decay=0.0))
        super().__init__(parameters, {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def _muon(model: nn.Module, loss_fn: LossFn, rate: float | None, seed: int) -> torch.optim.Optimizer:
    assert rate is not None
    return MuonWithAdamW(model, rate)


def _soap(model: nn.Module, loss_fn: LossFn, rate: float | None, seed: int) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    soap = require("pytorch_optimizer", "SOAP", extra="peers").SOAP
    made: torch.optim.Optimizer = soap(parameters, lr=rate)
    return made


def _lbfgs(model: nn.Module, loss_fn: LossFn, rate: float | None, seed: int) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        [p for p in model.parameters() if p.requires_grad],
        history_size=100, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip


_ENTRANTS: dict[str, Entrant] = {
    entrant.name: entrant
    for entrant in (
        Entrant("natgrad", "natgrad", _natgrad("kfac", elsewhere="exact"), ours=True),
        Entrant("natgrad-kfac", "natgrad, K-FAC", _natgrad("kfac"), ours=True),
        Entrant("natgrad-diagonal", "natgrad, diagonal", _natgrad("diagonal"), ours=True),
        Entrant("natgrad-tempered", "natgrad, tempered", _natgrad("tempered", elsewhere="exact"), ours=True),
        Entrant("natgrad-dense", "natgrad, dense", _natgrad("dense"), ours=True),
        Entrant("adam", "Adam", _torch("Adam"), rate=1e-3),
        Entrant("adamw", "AdamW", _torch("AdamW"), rate=1e-3),
        Entrant("nadam", "NAdam", _torch("NAdam"), rate=1e-3),
        Entrant("rmsprop", "RMSprop", _torch("RMSprop", momentum=0.9), rate=1e-4),
        Entrant("sgd", "SGD", _torch("SGD", momentum=0.9), rate=1e-2),
        Entrant("nesterov", "SGD, Nesterov", _torch("SGD", momentum=0.9, nesterov=True), rate=1e-2),
        Entrant("muon", "Muon", _muon, rate=1e-3),
        Entrant("soap", "SOAP", _soap, rate=3e-3),
        Entrant("lbfgs", "L-BFGS, 20 a step", _lbfgs, evaluates=True),
    )
}


def entrants(wanted: Iterable[str], problem: Task) -> tuple[Entrant, ...]:
    """The entrants of ``["natgrad", "adam", "sgd@0.1"]``, each with the problem's rate for it.

    Raises:
        UnknownNameError: a name that is no optimiser's; offers the nearest.
        ConfigError: no name at all, one twice, or a rate that is no positive number.
    """
    chosen: list[Entrant] = []
    for text in wanted:
        name, at, written = text.strip().partition("@")
        if name not in _ENTRANTS:
            raise UnknownNameError("optimiser", name, _ENTRANTS)
        entrant = _ENTRANTS[name]
        if at:
            entrant = replace(
                entrant, rate=_rate(text, written), pinned=True, label=f"{entrant.label} @ {written}"
            )
        elif entrant.rate is not None:
            entrant = entrant.at(problem.rates.get(name, entrant.rate))
        elif entrant.ours and problem.settings:
            rest = dict(problem.settings)
            rate = rest.pop("lr") if isinstance(rest["lr"], float) else None
            build = functools.partial(entrant.build, **rest)
            entrant = replace(entrant, build=build, rate=rate, pinned=True)
        chosen.append(entrant)
    if not chosen:
        raise ConfigError("a race needs at least one optimiser")
    if len({(e.name, e.rate) for e in chosen}) < len(chosen):
        raise ConfigError("an optimiser is named twice; give the second one another rate, such as adam@3e-4")
    return tuple(chosen)


def _rate(text: str, written: str) -> float:
    try:
        rate = float(written)
    except ValueError:
        rate = math.nan
    if not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"{text!r}: the rate after @ must be a positive number")
    return rate


def names() -> list[str]:
    """The names of all entrants."""
    return list(_ENTRANTS)


def unavailable(entrant: Entrant, batches: bool = False) -> str | None:
    """Why an entrant can't run here, or None where it can.

    Args:
        entrant: who asks.
        batches: whether each step takes other examples than the one before.
    """
    if entrant.evaluates and batches:
        return "its line search needs the same examples in each step"
    if entrant.name == "soap" and importlib.util.find_spec("pytorch_optimizer") is None:
        return 'SOAP is pytorch_optimizer\'s: pip install "natgrad[peers]"'
    if entrant.name != "muon":
        return None
    if not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no torch.optim.Muon (2.9 or later has)"
    slow = _bfloat16_slowdown()
    if slow > 4:
        return f"torch.optim.Muon computes in bfloat16, whose matrix products are {slow:.0f}× slower than float32 here"
    return None


def _bfloat16_slowdown(size: int = 256) -> float:
    """How much longer a bfloat16 matrix product takes than one in float32 (least of three of each)."""

    def least(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, a.T)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return least(torch.bfloat16) / least(torch.float32)
