"""EKFAC with a power: Δ = −(F̂ + λI)⁻ᵖ ∇h, between the gradient and the natural gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import EKFAC, ConfigError, Tempered
from natgrad.metrics import ekfac, layers
from natgrad.metrics.scores import partial_traces
from natgrad.metrics.squares import add_squares
from natgrad.operators.layerrows import Use
from natgrad.operators.readings import Positions
from natgrad.steps import AdaptiveStep, ConstantDamping
from natgrad.tape.records import Block

DTYPE = torch.float64
CE = nn.CrossEntropyLoss()


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).to(DTYPE)


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, dtype=DTYPE, generator=source), torch.randint(3, (n,), generator=source)


def power_of(F: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(F)
    return (vectors * values.pow(exponent)) @ vectors.T


def gradients(model: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(2)
    return {n: torch.randn(p.shape, dtype=DTYPE, generator=source) for n, p in model.named_parameters()}


@pytest.mark.parametrize("power", [0.0, 0.5, 2 / 3, 1.0])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_it_solves_with_a_power_of_the_operator(power: float, kind: str, show: Callable) -> None:
    """Linear maps in their eigenbasis, a normalisation's scale and shift entry by entry."""
    model = net()
    shown = show(EKFAC(kind=kind, power=power), model, CE)
    shown.observe(*data())
    operator, gradient, damping = shown.estimate.operator(), gradients(model), 0.01
    solved = shown.estimate.solve(gradient, damping, 0)
    F = operator.to_dense() + damping * torch.eye(operator.space.numel, dtype=DTYPE)
    expected = power_of(F, -power) @ operator.space.flatten(gradient)
    torch.testing.assert_close(operator.space.flatten(solved), expected)


class Tokens(nn.Module):
    """A layer that three tokens share, and one that sees their mean."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.shared, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(x)).mean(1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_a_layer_with_many_positions_fewer_examples_are_looked_at(
    reduction: str, show: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in three of 11 here: what enters is theirs, scaled to the batch; a layer with one position sees them all."""
    monkeypatch.setattr(layers, "ENOUGH", 3)
    monkeypatch.setattr(ekfac, "TEMPERED_POSITIONS", 1)
    source = torch.Generator().manual_seed(1)
    x, y = torch.randn(11, 3, 2, dtype=DTYPE, generator=source), torch.randint(3, (11,), generator=source)
    model, loss = Tokens().to(DTYPE), nn.CrossEntropyLoss(reduction=reduction)
    thinned, whole = (show(EKFAC(kind="exact", power=0.5, examples=n), model, loss) for n in (11, None))
    stay = show(EKFAC(kind="exact", power=0.5, examples=None), model, loss)
    thinned.observe(x, y)
    whole.observe(x, y)
    stay.observe(x[::3], y[::3])
    share = 1.0 if reduction == "mean" else 4 / 11
    found, of_some, of_all = (shown.estimate.operator().blocks for shown in (thinned, stay, whole))
    torch.testing.assert_close(found[0].to_dense(), of_some[0].to_dense() / share)
    torch.testing.assert_close(found[1].to_dense(), of_all[1].to_dense())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[0].to_dense(), of_all[0].to_dense(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("power", [0.3, 2 / 3, 1.0])
def test_its_squared_length_bounds_the_fisher_norm(power: float, show: Callable) -> None:
    model = net()
    shown = show(EKFAC(kind="exact", power=power), model, CE)
    shown.observe(*data())
    operator, gradient, damping = shown.estimate.operator(), gradients(model), 0.01
    direction = {n: -d for n, d in shown.estimate.solve(gradient, damping, 0).items()}
    flat = operator.space.flatten(direction)
    length = flat @ operator.to_dense() @ flat
    bound = shown.estimate.squared_length(direction, gradient)
    assert bound >= length * (1 - 1e-9)
    if power < 1:
        assert bound == pytest.approx(float(length))
    some = {n: d for n, d in direction.items() if n != "0.bias"}
    assert shown.estimate.squared_length(some, gradient) > 0


def test_the_kl_clip_holds_for_every_power() -> None:
    x, y = data(40)
    for power in (0.5, 1.0):
        model = net()
        optimizer = natgrad.NaturalGradient(
            model, CE, metric=EKFAC(kind="exact", power=power), lr=natgrad.FixedStep(50.0, kl_clip=1e-4)
        )
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        CE(model(x), y).backward()
        optimizer.step()
        moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        operator = optimizer._curvature.estimates[0][1].operator()
        assert 0.5 * float(operator.inner(moved, moved)) <= 1e-4 * (1 + 1e-9)


def test_what_it_brings_along() -> None:
    model = net()
    optimizer = natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), metric="tempered")
    assert (
        optimizer.step_size
        == AdaptiveStep.tempered()
        == AdaptiveStep(0.0, settle=0, coarse=0, calm=5, steady=True, nesterov=True)
    )
    assert optimizer.damping_rule == ConstantDamping(1e-7)
    assert Tempered() == Tempered(kind="empirical", sharing="scores", power=2 / 3)
    assert Tempered().tempered
    assert EKFAC(power=0.5).tempered
    assert not EKFAC().tempered
    own = natgrad.NaturalGradient(
        net(), nn.CrossEntropyLoss(), metric="tempered", lr=AdaptiveStep(), damping=0.1
    )
    assert own.step_size == AdaptiveStep()
    assert own.damping == 0.1


@pytest.mark.parametrize("power", [-0.1, 1.1, float("nan")])
def test_a_power_beyond_the_two_ends_is_refused(power: float) -> None:
    with pytest.raises(ConfigError, match="power"):
        EKFAC(power=power)


def test_a_step_minimises_the_model_along_its_direction() -> None:
    """α = −∇hᵀΔ / Δᵀ(F+λI)Δ with the F of the batch, Δ from the definition; then the part that is taken."""
    x, y = data(30)
    model = net()
    size = AdaptiveStep(0.0, settle=0, coarse=0, calm=None, fraction=1.0)
    optimizer = natgrad.NaturalGradient(
        model, CE, metric=EKFAC(kind="exact", power=0.5), lr=size, damping=1e-3
    )
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    F = natgrad.fisher(model, CE, [(x, y)], metric="dense", kind="exact").to_dense()
    ekfac = natgrad.fisher(model, CE, [(x, y)], metric="ekfac", kind="exact").to_dense()
    CE(model(x), y).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    eye = 1e-3 * torch.eye(len(g), dtype=DTYPE)
    direction = -power_of(ekfac + eye, -0.5) @ g
    alpha = -(g @ direction) / (direction @ (F + eye) @ direction)
    optimizer.step()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(after - before, alpha * direction, rtol=1e-5, atol=1e-9)


def optimizer_of(groups: tuple[str, str], metric: str, **options: object) -> natgrad.NaturalGradient:
    model = net()
    params = [
        {"params": model[0].parameters(), "metric": groups[0]},
        {"params": [*model[1].parameters(), *model[3].parameters()], "metric": groups[1]},
    ]
    return natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), params, metric=metric, **options)


def test_the_groups_metrics_decide_the_steps() -> None:
    assert optimizer_of(("tempered", "tempered"), "kfac").step_size == AdaptiveStep.tempered()
    assert optimizer_of(("tempered", "euclidean"), "kfac").step_size == AdaptiveStep.tempered()
    assert optimizer_of(("kfac", "diagonal"), "tempered").step_size == AdaptiveStep()
    for mixed in (("tempered", "kfac"), ("kfac", "tempered")):
        with pytest.raises(ConfigError, match="other units"):
            optimizer_of(mixed, "kfac")


def test_residuals_and_policies_refuse_it() -> None:
    with pytest.raises(ConfigError, match="exact"):
        natgrad.NaturalGradient(net(), metric="tempered")
    with pytest.raises(ConfigError, match="exact"):
        natgrad.NaturalGradient(net(), CE, metric="tempered", lr=natgrad.TrustRegion())


class Scaled(nn.Module):
    """A parameter that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=DTYPE))
        self.head = nn.Linear(2, 4).to(DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) @ torch.diag(self.scale).exp()


def test_what_no_rule_covers_is_tempered_too() -> None:
    """−(g² N + λ)⁻ᵖ g in the first step."""
    x, y = data()
    model, loss = Scaled(), nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss, metric="tempered")
    loss(model(x), y).backward()
    g, before = model.scale.grad.clone(), model.scale.detach().clone()
    with pytest.warns(UserWarning, match="scale"):
        optimizer.step()
    moved = model.scale.detach() - before
    expected = -g / (len(x) * g.square() + 1e-7).pow(2 / 3)
    torch.testing.assert_close(moved / moved.norm(), expected / expected.norm())


@pytest.mark.parametrize(("metric", "missed"), [("tempered", False), (EKFAC(kind="empirical"), True)])
def test_early_steps_all_enter_the_second_moments(metric: object, missed: bool) -> None:
    """Even where nothing moves; later steps need not."""
    x, y = data()
    model, loss = net(), nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss, metric=metric, lr=AdaptiveStep.tempered())
    seen = []
    for _ in range(40):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        kept = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        with torch.no_grad():
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)
        seen.append(optimizer.info.observed)
    assert all(seen[:33]) is not missed
    assert not all(seen[33:])


def test_eigenvalues_come_from_other_signs_than_their_basis(show: Callable) -> None:
    """White scores have no leading directions. A basis of few sums finds some in their noise, and would again."""
    model = Tokens().float()
    shown = show(Tempered(), model, nn.CrossEntropyLoss())
    source = torch.Generator().manual_seed(0)
    block = Block("shared.weight", None, "linear", 1, 24, 24)
    inputs, signals = (torch.randn(64, *sides, generator=source) for sides in ((200, 24), (1, 24, 200)))
    layer = layers.Layer(block, (Use(Positions(inputs), (signals,), False),))
    for_basis, handed = shown.estimate._signed_sums(layer)
    inner, outer = partial_traces(layer, for_basis)
    U_A, U_G = (torch.linalg.eigh(factor)[1] for factor in (inner, outer))

    def spread(sums: Tensor) -> float:
        S = torch.zeros(1, 24, 24)
        add_squares(S, sums, U_A, U_G, 1.0)
        return float(S[0, 12:, 12:].mean() / S[0, :12, :12].mean())

    assert spread(for_basis) > 1.8
    assert spread(handed) == pytest.approx(1.0, abs=0.25)


def test_a_look_at_many_positions_is_an_unbiased_estimate(show: Callable) -> None:
    """Of S's trace: within four standard errors over many signs."""
    source = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, 2, dtype=DTYPE, generator=source), torch.randint(3, (40,), generator=source)
    model, loss = Tokens().to(DTYPE), nn.CrossEntropyLoss()
    whole = show(Tempered(examples=None), model, loss)
    whole.observe(x, y)
    exact = float(whole.estimate.operator().trace())
    traces = []
    for step in range(60):
        some = show(Tempered(), model, loss)
        some.observe(x, y, step=step)
        traces.append(float(some.estimate.operator().trace()))
    found = torch.tensor(traces, dtype=DTYPE)
    assert found.std() > 1e-3 * exact
    assert abs(found.mean() - exact) < 4 * found.std() / 60**0.5


class Words(nn.Module):
    """A table of seven words, of which a batch looks up three."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.table(words).mean(1))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_word_that_no_look_has_seen_gets_a_part_of_the_others_mean(power: float, show: Callable) -> None:
    """In the solve alone, and where the power is less than 1: else its step grows as λ⁻ᵖ."""
    model = Words().to(DTYPE)
    shown = show(EKFAC(kind="exact", power=power), model, CE)
    source = torch.Generator().manual_seed(1)
    shown.observe(torch.randint(3, (12, 5), generator=source), torch.randint(3, (12,), generator=source))
    gradient, damping = gradients(model), 1e-12
    step = shown.estimate.solve(gradient, damping, 0)["table.weight"]
    block = next(b for b in shown.estimate.operator().blocks if "table.weight" in b.space.names)
    assert block.U_G is None
    S = block.values.squeeze(0)
    assert not S[3:].any()
    smoothed = S + (ekfac.SMOOTHING * S.mean(0) if power < 1 else 0.0)
    U = block.U_A.squeeze(0)
    expected = ((gradient["table.weight"] @ U) / (smoothed + damping).pow(power)) @ U.T
    torch.testing.assert_close(step, expected)
