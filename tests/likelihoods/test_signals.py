"""Random signals have the Fisher information as their second moment; exact ones keep events apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, OutputError, TargetError
from natgrad.likelihoods import Likelihood, likelihood_from
from natgrad.likelihoods.signs import with_random_signs

DRAWS = 20_000
KINDS = ["mc", "rademacher"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(1))


def assert_within_four_standard_errors(samples: Tensor, expected: Tensor) -> None:
    """The mean of samples [draws, ...] against what it should be, with a floor for what has no variance at all."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert torch.all((samples.mean(0) - expected).abs() <= 4 * error + 1e-12)


# One example's outputs, targets and loss: repeated DRAWS times with reduction "sum", one call makes all the draws.
EXAMPLES = {
    "ce": (nn.CrossEntropyLoss(reduction="sum"), normal(4), torch.tensor(1)),
    "ce-spatial": (nn.CrossEntropyLoss(reduction="sum"), normal(3, 2, 2), torch.tensor([[0, 1], [2, 0]])),
    "ce-weighted": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]), label_smoothing=0.3, reduction="sum"),
        normal(3, 2),
        torch.tensor([1, -100]),
    ),
    "bce": (nn.BCEWithLogitsLoss(reduction="sum"), normal(5), torch.ones(5)),
    "bce-weighted": (
        nn.BCEWithLogitsLoss(
            weight=torch.tensor(0.5), pos_weight=torch.tensor([3.0, 0.2, 1.0]), reduction="sum"
        ),
        normal(2, 3),
        torch.tensor([[0.0, 1.0, 0.4], [1.0, 0.0, 1.0]]),
    ),
    "mse": (nn.MSELoss(reduction="sum"), normal(4), torch.zeros(4)),
    "poisson": (nn.PoissonNLLLoss(reduction="sum"), normal(4), torch.ones(4)),
}


def dense(likelihood: Likelihood, z: Tensor, y: Tensor | None) -> Tensor:
    identity = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)
    return likelihood.fisher_product(z, identity, y).view(z.numel(), z.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_random_signals_have_mean_zero_and_the_fisher_as_second_moment(name: str, kind: str) -> None:
    loss, z, y = EXAMPLES[name]
    likelihood = likelihood_from(loss)
    many_z, many_y = (a.expand(DRAWS, *a.shape) for a in (z, y))
    (signal,) = likelihood.signals(many_z, many_y, kind, generator())
    rows = signal.reshape(DRAWS, -1)
    assert_within_four_standard_errors(rows, torch.zeros(()))
    squares = rows[:, :, None] * rows[:, None, :]  # across events of one example too, where H is zero
    assert_within_four_standard_errors(squares, dense(likelihood, z[None], y[None]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.PoissonNLLLoss])
def test_the_constant_of_the_reduction_is_inside_the_signal(loss: type[nn.Module], kind: str) -> None:
    z = normal(6, 3)
    (mean,) = likelihood_from(loss()).signals(z, kind=kind, generator=generator())
    (total,) = likelihood_from(loss(reduction="sum")).signals(z, kind=kind, generator=generator())
    count = 6 if loss is nn.CrossEntropyLoss else 18
    torch.testing.assert_close(mean * math.sqrt(count), total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_generator_makes_signals_and_samples_repeatable(name: str, kind: str) -> None:
    loss, z, y = EXAMPLES[name]
    likelihood, z, y = likelihood_from(loss), z[None], y[None]
    state = torch.get_rng_state()
    (one,), (two,) = (likelihood.signals(z, y, kind, generator(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(likelihood.sample(z, generator(3)), likelihood.sample(z, generator(3)))
    assert torch.equal(state, torch.get_rng_state())
    likelihood.sample(z)
    assert not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["mc", "rademacher", "exact", "empirical"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_signals_are_detached_and_leave_their_arguments_alone(name: str, kind: str) -> None:
    loss, z, y = EXAMPLES[name]
    z, y = z[None].clone().requires_grad_(), y[None]
    before = z.detach().clone(), y.clone()
    for signal in likelihood_from(loss).signals(z, y, kind):
        assert not signal.requires_grad
        assert (signal.shape, signal.dtype) == (z.shape, z.dtype)
    assert torch.equal(z, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_mc_signal_is_the_score_of_what_sample_draws(name: str) -> None:
    loss, z, _ = EXAMPLES[name]
    likelihood, many = likelihood_from(type(loss)(reduction="sum")), z.expand(50, *z.shape)
    (drawn,) = likelihood.signals(many, kind="mc", generator=generator(5))
    (score,) = likelihood.signals(many, likelihood.sample(many, generator(5)), "empirical")
    torch.testing.assert_close(drawn, score)


def test_rademacher_varies_less_where_the_prediction_is_confident() -> None:
    z = torch.tensor([6.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(DRAWS, 4)
    likelihood = likelihood_from(nn.CrossEntropyLoss(reduction="sum"))
    spread = {}
    for kind in KINDS:
        (signal,) = likelihood.signals(z, kind=kind, generator=generator())
        spread[kind] = signal.square().sum(1).std()
    assert spread["rademacher"] < 0.1 * spread["mc"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_exact_signals_touch_one_coordinates_event_of_each_example(name: str) -> None:
    loss, z, y = EXAMPLES[name]
    z, y = torch.stack([z, 2 * z, -z]), y.expand(3, *y.shape)
    likelihood = likelihood_from(loss)
    for signal in likelihood.signals(z, y, "exact"):
        if isinstance(loss, nn.CrossEntropyLoss):
            assert (signal != 0).any(1).view(3, -1).sum(1).max() == 1
        else:
            assert (signal != 0).flatten(1).sum(1).max() == 1
    rank = (
        z[0].numel() * (z.shape[1] - 1) // z.shape[1]
        if isinstance(loss, nn.CrossEntropyLoss)
        else z[0].numel()
    )
    assert len(list(likelihood.signals(z, kind="exact"))) == rank


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.PoissonNLLLoss])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2)])
def test_exact_signals_of_flattened_examples(loss: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Rows 0–2 belong to one example and rows 3–5 to the other: no signal has two of an example's events."""
    z, likelihood = normal(*shape), likelihood_from(loss())
    signals = list(likelihood.signals(z, kind="exact", examples=2))
    assert len(signals) == (z.numel() // 2 * 2 // 3 if loss is nn.CrossEntropyLoss else z.numel() // 2)
    for signal in signals:
        events = (signal != 0).any(1) if loss is nn.CrossEntropyLoss else signal != 0
        assert events.reshape(2, -1).sum(1).tolist() == [1, 1]
    rows = torch.stack(signals).view(len(signals), 2, -1)
    blocks = torch.einsum("kea,keb->eab", rows, rows)
    H, half = dense(likelihood, z, None), z.numel() // 2
    torch.testing.assert_close(torch.block_diag(*blocks), H)
    assert not H[:half, half:].any()


def test_exact_signals_of_one_example_alone() -> None:
    z = normal(4, 3)
    signals = list(likelihood_from(nn.CrossEntropyLoss()).signals(z, kind="exact", examples=1))
    assert [(s != 0).any(1).sum().item() for s in signals] == [
        1
    ] * 8  # the rank of four events of three classes


@pytest.mark.parametrize("examples", [0, 4, 12, -1])
def test_examples_must_divide_the_rows(examples: int) -> None:
    with pytest.raises(OutputError, match=f"examples={examples} does not divide the 6 rows"):
        likelihood_from(nn.MSELoss()).signals(normal(6, 2), kind="exact", examples=examples)


def test_exact_signals_that_are_all_zero_are_left_out() -> None:
    z, y = normal(2, 3, 2), torch.tensor([[0, -100], [1, -100]])
    signals = list(likelihood_from(nn.CrossEntropyLoss()).signals(z, y, "exact"))
    assert len(signals) == 2  # the second place is ignored in both examples
    z = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    assert len(list(likelihood_from(nn.CrossEntropyLoss()).signals(z, kind="exact"))) == 1


def test_an_impossible_class_is_never_drawn() -> None:
    z = torch.full((50_000, 6), -math.inf)
    z[:, [1, 4]] = 0.0
    drawn = likelihood_from(nn.CrossEntropyLoss()).sample(z, generator())
    assert drawn.unique().tolist() == [1, 4]
    assert abs((drawn == 1).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(50_000)


def test_samples_have_the_familys_moments_and_layout() -> None:
    z = normal(3, 2)
    many = z.expand(DRAWS, 3, 2)
    classes = likelihood_from(nn.CrossEntropyLoss()).sample(many, generator())
    assert (classes.shape, classes.dtype) == ((DRAWS, 2), torch.int64)
    one_hot = nn.functional.one_hot(classes, 3).double()
    assert_within_four_standard_errors(one_hot, z.softmax(0).T)
    for loss, mean in (
        (nn.BCEWithLogitsLoss(), z.sigmoid()),
        (nn.PoissonNLLLoss(), z.exp()),
        (nn.MSELoss(), z),
    ):
        y = likelihood_from(loss).sample(many, generator())
        assert (y.shape, y.dtype) == (many.shape, z.dtype)
        assert_within_four_standard_errors(y, mean)
        if not isinstance(loss, nn.MSELoss):
            assert torch.equal(y, y.round())
    assert_within_four_standard_errors((y - z).square(), torch.ones(()))


def test_a_kind_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'mcmc'; choose one of 'mc', 'rademacher', 'exact', 'empirical'"):
        likelihood_from(nn.MSELoss()).signals(normal(2), kind="mcmc")


def test_the_empirical_fisher_needs_targets() -> None:
    with pytest.raises(TargetError, match="pass targets, or kind='mc'"):
        likelihood_from(nn.MSELoss()).signals(normal(2), kind="empirical")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (31,), (32,), (65,), (7, 9)])
def test_signs_change_nothing_but_the_sign(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.rand(shape, generator=generator()).to(dtype)
    signed = with_random_signs(values, generator())
    assert (signed.shape, signed.dtype) == (values.shape, dtype)
    assert torch.equal(signed.abs(), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_fair_and_independent(dtype: torch.dtype) -> None:
    signs = with_random_signs(torch.ones(DRAWS, 70, dtype=dtype), generator()).double()
    assert abs(signs.mean().item()) < 4 / math.sqrt(signs.numel())
    correlation = signs.T @ signs / DRAWS - torch.eye(70, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(DRAWS)  # 2,415 pairs
    assert abs((signs[1:] * signs[:-1]).mean().item()) < 4 / math.sqrt(signs.numel())
