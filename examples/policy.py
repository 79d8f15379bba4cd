"""CartPole by natural policy gradient with a trust region, against the plain policy gradient with Adam.

Both learners are given the same: eight whole episodes of CartPole-v1 from the present policy at a time, and the
advantages of the actions in them (generalised advantage estimation, Schulman et al. 2016, arXiv 1506.02438, with values
that are linear in products of the observation). One takes the step of `natgrad.TrustRegion` with its defaults; the
other takes a step of Adam, at each learning rate of a grid. Each is run with λ = 0.95, which leans on the values, and
with λ = 1, which leans on the rewards alone. The task is solved when the last 100 episodes brought 475 of 500 on
average.

    python examples/policy.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab.extras import require

EPISODES = 8  # a batch
LONGEST = 500  # CartPole-v1's limit of steps, and with a reward of 1 a step the best return
DISCOUNT = 0.99  # γ
LAMBDAS = (0.95, 1.0)
SOLVED = 475.0
RATES = (0.01, 0.02, 0.05, 0.1)
OURS = "natural gradient"

Update = Callable[["Rollout", Tensor], None]


class Rollout(NamedTuple):
    """Whole episodes side by side, T steps at most; `alive` says which steps of the rectangle happened."""

    observations: Tensor  # [T + 1, episodes, 4], the last ones too
    actions: Tensor  # [T, episodes]
    alive: Tensor  # [T, episodes]
    fell: Tensor  # [T, episodes]; an episode that the limit cut did not

    def flat(self) -> tuple[Tensor, Tensor]:
        """Observations [N, 4] and actions [N] of the steps that happened."""
        return self.observations[:-1][self.alive], self.actions[self.alive]


class Run(NamedTuple):
    """What one learner did on one seed."""

    samples: list[int]  # steps of the environment, after each batch
    returns: list[float]  # the mean return of the last 100 episodes
    solved: float  # how many samples it took; infinite where it never was


def main(
    seeds: Sequence[int] = (3, 4, 5),
    samples: int = 150_000,
    rates: Sequence[float] = RATES,
    lambdas: Sequence[float] = LAMBDAS,
    plot: Path | None = None,
) -> dict[tuple[str, float], list[Run]]:
    """Trains both and prints the table; returns the runs by learner and λ."""
    learners = {OURS: trust_region} | {f"Adam, {rate:g}": adam(rate) for rate in rates}
    print(f"samples until {SOLVED:.0f} of {LONGEST} on average over 100 episodes, of at most {samples:,}\n")
    print(f"{'':<18}{'λ':>6}{'median':>10}   {'each seed':<30}{'return at the end':>18}")
    runs: dict[tuple[str, float], list[Run]] = {}
    for name, learner in learners.items():
        for weight in lambdas:
            found = runs[name, weight] = [run(learner, weight, seed, samples) for seed in seeds]
            each = ", ".join(count(r.solved) for r in found)
            last = statistics.median(r.returns[-1] for r in found)
            print(f"{name:<18}{weight:>6g}{count(median(found)):>10}   {each:<30}{last:>18.1f}")
    if plot:
        draw(runs, samples, plot)
    return runs


def median(runs: Sequence[Run]) -> float:
    """Of the samples that it took to solve the task."""
    return statistics.median(run.solved for run in runs)


def trust_region(model: nn.Module) -> Update:
    """The natural policy gradient."""
    optimizer = natgrad.NaturalGradient(
        model, natgrad.Categorical(), metric="exact", lr=natgrad.TrustRegion(kl=0.01)
    )

    def update(rollout: Rollout, advantages: Tensor) -> None:
        optimizer.step(natgrad.policy(model, *rollout.flat(), advantages))

    return update


def adam(rate: float) -> Callable[[nn.Module], Update]:
    """The plain policy gradient."""

    def learner(model: nn.Module) -> Update:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)

        def update(rollout: Rollout, advantages: Tensor) -> None:
            observations, actions = rollout.flat()
            loss = nn.functional.cross_entropy(model(observations), actions, reduction="none") @ advantages
            optimizer.zero_grad()
            (loss / len(advantages)).backward()
            optimizer.step()

        return update

    return learner


def run(learner: Callable[[nn.Module], Update], weight: float, seed: int, samples: int) -> Run:
    """One learner on one seed, with advantages of one λ, until so many samples are used up."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    update = learner(model)
    classic = require("gymnasium.envs.classic_control.cartpole", "the environment")
    environment = classic.CartPoleVectorEnv(num_envs=EPISODES)
    environment.reset(seed=seed)
    baseline, used, returns = torch.zeros(15), 0, []
    curve = Run([], [], float("inf"))
    while used < samples:
        rollout = play(environment, model, generator)
        features = features_of(rollout.observations)
        values = features @ baseline
        advantages = advantages_of(rollout, values, weight)
        # For the next batch: on this one it would have seen the very rewards.
        baseline = fit(features[:-1][rollout.alive], (advantages + values[:-1])[rollout.alive])
        advantages = advantages[rollout.alive]
        update(rollout, (advantages - advantages.mean()) / advantages.std())
        used += int(rollout.alive.sum())
        returns += rollout.alive.sum(0).tolist()
        curve.samples.append(used)
        curve.returns.append(statistics.fmean(returns[-100:]))
        if len(returns) >= 100 and curve.returns[-1] >= SOLVED:
            curve = curve._replace(solved=min(curve.solved, used))
    return curve


def play(environment, model: nn.Module, generator: torch.Generator) -> Rollout:
    """One episode in each of the environments, all from the present policy."""
    observation, _ = environment.reset()
    alive = torch.ones(environment.num_envs, dtype=torch.bool)
    observations, steps = [torch.as_tensor(observation)], []
    with torch.no_grad():
        while alive.any():
            actions = torch.multinomial(model(observations[-1]).softmax(1), 1, generator=generator)[:, 0]
            observation, _, ended, cut, _ = environment.step(actions.numpy())
            observations.append(torch.as_tensor(observation))
            fell = alive & torch.as_tensor(ended)
            steps.append((actions, alive, fell))
            alive = alive & ~fell & ~torch.as_tensor(cut)
    return Rollout(torch.stack(observations), *(torch.stack(parts) for parts in zip(*steps, strict=True)))


def advantages_of(rollout: Rollout, values: Tensor, weight: float) -> Tensor:
    """Σ_k (γλ)ᵏ [r + γV(s′) − V(s)]_{t+k}: with a reward of 1 for each step; λ is the weight."""
    surprises = 1 + DISCOUNT * values[1:] * ~rollout.fell - values[:-1]
    total, found = torch.zeros(values.shape[1]), []
    for surprise, now in zip(surprises.flip(0), rollout.alive.flip(0), strict=True):
        total = now * (surprise + DISCOUNT * weight * total)
        found.append(total)
    return torch.stack(found[::-1])


def features_of(observations: Tensor) -> Tensor:
    """What the values are linear in: the observation's numbers, their products, and one."""
    x = observations.clamp(-5, 5)
    first, second = torch.triu_indices(4, 4)
    return torch.cat([x, x[..., first] * x[..., second], torch.ones_like(x[..., :1])], dim=-1)


def fit(features: Tensor, values: Tensor) -> Tensor:
    """Least squares with a small ridge."""
    X = features.double()
    ridge = 1e-5 * torch.eye(X.shape[1], dtype=X.dtype)
    return torch.linalg.solve(X.mT @ X / len(X) + ridge, X.mT @ values.double() / len(X)).float()


def count(samples: float) -> str:
    """A number of samples, or a dash."""
    return f"{samples:,}" if samples < float("inf") else "–"


def draw(runs: dict[tuple[str, float], list[Run]], samples: int, path: Path) -> None:
    """Returns against samples: ours at its better λ, and Adam at every rate with the better λ of each."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import FAINT, styled

    def score(key: tuple[str, float]) -> tuple[float, float]:
        return median(runs[key]), -statistics.median(r.returns[-1] for r in runs[key])

    best = [
        min((key for key in runs if key[0] == name), key=score) for name in dict.fromkeys(n for n, _ in runs)
    ]
    shades = iter(("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#7A7A7A"))
    with styled():
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for key in reversed(best):
            ours = key[0] == OURS
            colour = "#D55E00" if ours else next(shades)
            ordered = sorted(runs[key], key=lambda r: (r.solved, -r.returns[-1]))
            for run_ in ordered:
                if ours:
                    axes.plot(run_.samples, run_.returns, color=colour, linewidth=0.9, alpha=0.45)
            middle = ordered[len(ordered) // 2]
            axes.plot(middle.samples, middle.returns, color=colour, linewidth=2.8 if ours else 1.7,
                      label=f"{key[0]} (λ = {key[1]:g})")  # fmt: skip
        axes.axhline(SOLVED, color=FAINT, linewidth=0.9, dashes=(4, 3), zorder=0)
        axes.set_xlim(0, samples)
        axes.set_ylim(0, 1.02 * LONGEST)
        axes.set_xlabel("steps of the environment")
        axes.set_ylabel("return, mean of the last 100 episodes")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="lower right")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CartPole by natural policy gradient")
    parser.add_argument("--plot", type=Path, help="draw the learning curves into this file")
    main(plot=parser.parse_args().plot)
