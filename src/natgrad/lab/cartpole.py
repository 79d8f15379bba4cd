"""CartPole-v1 by policy gradients: a cart is pushed left or right, so that the pole on it stays up.

An episode brings a point for each step until the pole falls or the cart leaves the track, 500 at most. The measure is
what the mean return of episodes that nobody trains on lacks to 500; at 25 the task counts as solved. Each step of a
learner takes equally many steps of the environment, played by its own policy from starts that a seed decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from natgrad.lab.extras import require
from natgrad.lab.problem import LossFn, Task
from natgrad.likelihoods import Categorical
from natgrad.optim import Policy, policy
from natgrad.steps import TrustRegion

LONGEST = 500  # CartPole-v1's limit of steps, and with a reward of 1 a step the best return
SOLVED = 475.0
DISCOUNT = 0.99  # γ
JUDGED = 100  # episodes that the mean return is taken over
_UNSEEN = 2**31 - 1  # their seed; a training's would have to be a third of that number of steps away


class Rollout(NamedTuple):
    """T steps of each of C copies of the environment."""

    observations: Float[Tensor, "T+1 C 4"]
    actions: Int[Tensor, "T C"]
    fell: Bool[Tensor, "T C"]

    @property
    def counts(self) -> Bool[Tensor, "T C"]:
        """All steps but those that only put a fallen copy back to a start."""
        return ~torch.cat([torch.zeros_like(self.fell[:1]), self.fell[:-1]])


class Batch(NamedTuple):
    """The N steps of a rollout that count."""

    observations: Float[Tensor, "N 4"]
    actions: Int[Tensor, " N"]
    advantages: Float[Tensor, " N"]  # of mean 0 and deviation 1


def actor() -> nn.Sequential:
    """Observations [N, 4] to the logits of left and right [N, 2]."""
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))


@torch.no_grad()
def play(model: nn.Module, copies: int, seed: int, steps: int = LONGEST) -> Rollout:
    """Each copy plays so many steps, one episode after the other; the last one is cut off.

    Raises:
        ConfigError: gymnasium is missing.
    """
    module = require("gymnasium.envs.classic_control.cartpole", "CartPole", extra="rl")
    environment = module.CartPoleVectorEnv(num_envs=copies, max_episode_steps=LONGEST)
    generator = torch.Generator().manual_seed(seed)
    observations, actions, fell = [torch.as_tensor(environment.reset(seed=seed)[0])], [], []
    for _ in range(steps):
        actions.append(torch.multinomial(model(observations[-1]).softmax(1), 1, generator=generator)[:, 0])
        observation, _, ended, _, _ = environment.step(actions[-1].numpy())
        observations.append(torch.as_tensor(observation))
        fell.append(torch.as_tensor(ended))
    return Rollout(torch.stack(observations), torch.stack(actions), torch.stack(fell))


def mean_return(model: nn.Module, episodes: int = JUDGED) -> float:
    """Over so many episodes from starts that nobody trains on, always the same."""
    fallen = play(model, episodes, _UNSEEN).fell.cumsum(0)
    return 1 + float((fallen[:-1] == 0).double().sum(0).mean())


def advantages_of(rollout: Rollout, weight: float) -> Float[Tensor, "T C"]:
    """Σ_k (γλ)ᵏ [r + γV(s′) − V(s)]_{t+k}, zero where no step counts; λ is the weight.

    Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438). V is linear in `features_of`, and so the
    advantages are in its weights: these are such that no feature tells the advantages (least-squares temporal
    differences; Boyan 2002). Each copy's V is fitted to the other copies, as on its own it would have seen the rewards.
    """
    features, counts = features_of(rollout.observations).double(), rollout.counts[..., None]
    gained = DISCOUNT * features[1:] * ~rollout.fell[..., None] - features[:-1]
    parts = torch.cat([torch.ones_like(gained[..., :1]), gained], dim=-1)
    total, sums = torch.zeros_like(parts[0]), []
    for part, now in zip(parts.flip(0), counts.flip(0), strict=True):
        total = now * (part + DISCOUNT * weight * total)
        sums.append(total)
    reward, slope = torch.stack(sums[::-1]).split([1, features.shape[-1]], dim=-1)
    b, A = (torch.einsum("tci,tcj->cij", features[:-1], part) for part in (reward, slope))
    b, A = b.sum(0) - b, A - A.sum(0)
    ridge = 1e-5 * counts.sum() * torch.eye(A.shape[-1], dtype=A.dtype)
    return (
        (reward + torch.einsum("tci,cij->tcj", slope, torch.linalg.solve(A + ridge, b))).squeeze(-1).float()
    )


def features_of(observations: Float[Tensor, "... 4"]) -> Float[Tensor, "... 15"]:
    """The observation's numbers, their products, and one."""
    x = observations.clamp(-5, 5)
    first, second = torch.triu_indices(4, 4)
    return torch.cat([x, x[..., first] * x[..., second], torch.ones_like(x[..., :1])], dim=-1)


def batch_of(rollout: Rollout, weight: float) -> Batch:
    """What a policy gradient is made from; λ is the weight."""
    counts = rollout.counts
    advantages = advantages_of(rollout, weight)[counts]
    advantages = (advantages - advantages.mean()) / advantages.std()
    return Batch(rollout.observations[:-1][counts], rollout.actions[counts], advantages)


def surrogate(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """h = −mean π_θ(a|s)/π_old(a|s) A, π_old being the policy as it stands; its gradient is the policy gradient."""
    chosen = model(batch.observations).log_softmax(1).gather(1, batch.actions[:, None])[:, 0]
    return -((chosen - chosen.detach()).exp() * batch.advantages).mean()


@dataclass(frozen=True, eq=False, kw_only=True)
class CartPole(Task):
    """The task as a problem of a race.

    Attributes:
        copies: of the environment; each plays 500 steps for a step of the learner.
        weight: λ of the advantages.
        judged: episodes that an evaluation takes, always from the same starts.
    """

    copies: int = 8
    weight: float = 0.95
    judged: int = JUDGED
    measure: str = "shortfall in return"
    unit: str = "points of 500"
    yardstick: str = f"the greatest possible, {LONGEST}, over {JUDGED} episodes that nobody trains on"
    things: str = "environment steps"
    sampled: bool = True
    logarithmic: bool = False

    @property
    def examples(self) -> int:
        """All of a step's."""
        return self.copies * LONGEST

    @property
    def examples_a_step(self) -> int:
        """Steps of the environment, those that put a fallen copy back included."""
        return self.examples

    @property
    def likelihood(self) -> Categorical:
        """The policy's."""
        return Categorical()

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[int]:
        """The seeds of each step's starts and actions."""
        step = start
        while True:
            yield seed * 1_000_003 + step
            step += 1

    def drawn(self, model: nn.Module, seed: int) -> Batch:
        """What the policy as it stands did."""
        return batch_of(play(model, self.copies, seed), self.weight)

    def loss(self, model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
        """The surrogate, which natgrad steps on, too."""
        return surrogate(model, self.drawn(model, batch))

    def residuals_of(self, model: nn.Module, batch: Any) -> Policy:
        """The natural policy gradient's step."""
        return policy(model, *self.drawn(model, batch))

    def judge(self, twin: nn.Module) -> dict[str, float]:
        """500 less the mean return."""
        shortfall = LONGEST - mean_return(twin, self.judged)
        return {"loss": shortfall, "excess": shortfall}


def cartpole() -> CartPole:
    """CartPole-v1 by natural policy gradient in a trust region; the others take the plain policy gradient."""
    require("gymnasium", "CartPole", extra="rl")
    return CartPole(
        name="cartpole", title="a 4-32-2 policy balances the pole of CartPole-v1",
        make_model=lambda seed: actor(), settings={"lr": TrustRegion(kl=0.02), "damping": 1e-2},
        target=LONGEST - SOLVED, steps=30, evaluate_every=2, rates={"adam": 0.05, "adamw": 0.05, "sgd": 1.0},
    )  # fmt: skip
