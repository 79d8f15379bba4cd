"""`natgrad.fisher` as a function: what it leaves as it was, its options, and parameters without a rule."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad import (
    ConfigError,
    CoverageWarning,
    EmptyError,
    ModelChangedError,
    UnknownNameError,
    UnsupportedLossError,
)
from natgrad.information.survey import Survey
from natgrad.metrics import ekfac
from natgrad.metrics.named import METRICS
from natgrad.operators import BlockDiagonal, Diagonal, EigenKronecker, Kronecker, ScaledIdentity
from oracle import fisher as oracle

DTYPE = torch.float64
CE = nn.CrossEntropyLoss()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(DTYPE)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).to(DTYPE)


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, dtype=DTYPE), torch.randint(3, (n,))


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        yield


# ------------------------------------------------------------------------------------------- it leaves no trace


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("training", [True, False])
def test_model_gradients_and_random_state_are_left_as_they_were(
    metric: str, training: bool, quiet: Any
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).to(
        DTYPE
    )
    model.train(training)
    x, y = data()
    CE(model(x), y).backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    graphs = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    kind = None if metric == "euclidean" else "mc"
    first = natgrad.fisher(model, CE, loader, metric, kind)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training == training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    assert [p.requires_grad for p in model.parameters()] == graphs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    again = natgrad.fisher(model, CE, loader, metric, kind)
    assert torch.equal(first.to_dense(), again.to_dense())  # chance comes from the seed alone


def test_it_works_where_gradients_are_off() -> None:
    model, (x, y) = net(), data()
    F = oracle.fisher(model, CE, x, y)
    with torch.no_grad():
        torch.testing.assert_close(natgrad.fisher(model, CE, (x, y), "dense").to_dense(), F)
    with torch.inference_mode():
        torch.testing.assert_close(natgrad.fisher(model, CE, (x, y), "dense").to_dense(), F)


@pytest.mark.parametrize("metric", sorted(METRICS.keys() - {"euclidean"}))
def test_under_autocast_the_operator_has_the_parameters_precision(metric: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4), nn.ReLU(), nn.Linear(4, 3)
    )
    x, y = torch.randn(8, 1, 4, 4), torch.randint(3, (8,))
    plain = natgrad.fisher(model, CE, (x, y), metric)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = natgrad.fisher(model, CE, (x, y), metric)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.trace(), plain.trace(), rtol=0.1, atol=0)


def test_dropout_has_the_masks_of_the_seed() -> None:
    model, (x, y) = nn.Sequential(nn.Dropout(0.5), net()), data(8)
    one, other = (natgrad.fisher(model, CE, (x, y), "matrixfree", seed=s).to_dense() for s in (0, 1))
    assert not torch.allclose(one, other)
    replayed = natgrad.fisher(model, CE, (x, y), natgrad.MatrixFree(memory=0), seed=0)
    torch.testing.assert_close(replayed.to_dense(), one)  # the same masks when the model runs again
    torch.testing.assert_close(natgrad.ggn(model, CE, (x, y), seed=0).to_dense(), one)


def test_the_present_mode_counts() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).to(DTYPE)
    x, y = data()
    model.eval()
    F = oracle.fisher(model, CE, x, y)
    torch.testing.assert_close(natgrad.fisher(model, CE, (x, y), "dense").to_dense(), F)
    model.train()
    assert not torch.allclose(natgrad.fisher(model, CE, (x, y), "dense").to_dense(), F)


# --------------------------------------------------------------------------------------------------- its options


def test_the_kind_of_a_name_is_exact_and_of_an_object_its_own() -> None:
    model, (x, y) = net(), data()
    exact = natgrad.fisher(model, CE, (x, y), "kfac").to_dense()
    sampled = natgrad.fisher(model, CE, (x, y), "kfac", "mc").to_dense()
    assert not torch.allclose(exact, sampled)
    assert torch.equal(natgrad.fisher(model, CE, (x, y), natgrad.KFAC()).to_dense(), sampled)
    assert torch.equal(natgrad.fisher(model, CE, (x, y), natgrad.KFAC(kind="exact")).to_dense(), exact)
    assert torch.equal(natgrad.fisher(model, CE, (x, y), natgrad.KFAC(), "exact").to_dense(), exact)


def test_the_optimisers_limit_of_examples_does_not_hold() -> None:
    model, (x, y) = net(), data()
    limited = natgrad.fisher(model, CE, (x, y), natgrad.KFAC(kind="exact", examples=2))
    torch.testing.assert_close(limited.to_dense(), natgrad.fisher(model, CE, (x, y)).to_dense())


def test_the_identity_needs_no_look_at_the_data() -> None:
    operator = natgrad.fisher(net(), CE, iter(()), "euclidean")
    assert isinstance(operator, ScaledIdentity)


def test_some_parameters_by_name_and_as_objects() -> None:
    model, (x, y) = net(), data()
    F = oracle.fisher(model, CE, x, y)
    index = oracle.positions(model, ["0.bias", "2.weight"])
    for params in (["2.weight", "0.bias"], [model[2].weight, model[0].bias]):
        for metric in ("dense", "gram", "matrixfree", "block"):
            found = natgrad.fisher(model, CE, (x, y), metric, params=params)
            assert found.space.names == ("0.bias", "2.weight")  # the model's order
            if metric != "block":
                torch.testing.assert_close(found.to_dense(), F[index[:, None], index])
    weights = natgrad.fisher(model, CE, (x, y), "kfac", params=["0.weight", "2.weight"])
    assert [type(block) for block in weights.blocks] == [Kronecker, Kronecker]
    for wrong, message in (
        (["nope"], "params='nope' is no parameter of the model; it has 0.weight"),
        ([nn.Parameter(torch.zeros(2))], "one of params is no parameter of the model"),
    ):
        with pytest.raises(ConfigError, match=message):
            natgrad.fisher(model, CE, (x, y), params=wrong)


def test_frozen_parameters_are_left_out() -> None:
    model, (x, y) = net(), data()
    F = oracle.fisher(model, CE, x, y)
    index = oracle.positions(model, ["2.weight", "2.bias"])
    model[0].requires_grad_(False)
    torch.testing.assert_close(
        natgrad.fisher(model, CE, (x, y), "dense").to_dense(), F[index[:, None], index]
    )
    with pytest.raises(
        ConfigError, match=re.escape("0.weight does not require a gradient; call .requires_grad_()")
    ):
        natgrad.fisher(model, CE, (x, y), params=["0.weight"])
    model.requires_grad_(False)
    with pytest.raises(EmptyError, match="no trainable parameter"):
        natgrad.fisher(model, CE, (x, y))


def test_progress_is_told() -> None:
    model, (x, y) = net(), data()
    told: list[tuple[int, int | None]] = []
    natgrad.fisher(model, CE, [(x, y), (x, y)], progress=lambda done, total: told.append((done, total)))
    natgrad.fisher(model, CE, iter([(x, y)]), progress=lambda done, total: told.append((done, total)))
    natgrad.fisher(model, CE, (x, y), batch_size=5, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2), (1, None), (1, 2), (2, 2)]


def test_progress_is_shown(capsys: pytest.CaptureFixture) -> None:
    natgrad.fisher(net(), CE, data(), batch_size=4, progress=True)
    assert capsys.readouterr().err == "\rnatgrad.fisher: batch 1 of 2\rnatgrad.fisher: batch 2 of 2\n"


def test_bad_arguments() -> None:
    x, y = data()
    with pytest.raises(UnknownNameError, match="unknown metric 'kfak'; did you mean 'kfac'"):
        natgrad.fisher(net(), CE, (x, y), "kfak")
    with pytest.raises(UnsupportedLossError, match="L1Loss has no known likelihood"):
        natgrad.fisher(net(), nn.L1Loss(), (x, y))


def test_a_dense_matrix_that_would_not_fit_says_how_many_bytes() -> None:
    model = nn.Linear(200, 200)  # 40,200 parameters
    x, y = torch.randn(2, 200), torch.randint(200, (2,))
    for metric in ("dense", "block"):
        with pytest.raises(
            ConfigError, match=rf'"{metric}" would need 6.0 GiB \(6,4\d\d,\d\d\d,\d\d\d bytes\).*"kfac"'
        ):
            natgrad.fisher(model, CE, (x, y), metric)


# ----------------------------------------------------------------------------------- parameters that no rule covers


class Einsum(nn.Module):
    """Scale and shift by a function for which there is no rule."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=DTYPE))
        self.bias = nn.Parameter(torch.zeros(size, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.einsum("nd,d->nd", x, self.weight)
        return scaled + torch.einsum("nd,d->nd", torch.ones_like(x), self.bias)


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal"])
def test_scale_and_shift_have_their_exact_diagonal_without_a_warning(metric: str) -> None:
    model, (x, y) = normed(), data()
    index = oracle.positions(model, ["1.weight", "1.bias"])
    operator = natgrad.fisher(model, CE, [(x[:2], y[:2]), (x[2:], y[2:])], metric)
    torch.testing.assert_close(operator.diagonal()[index], oracle.fisher(model, CE, x, y).diagonal()[index])


def test_the_rest_has_its_exact_diagonal_and_is_announced_once() -> None:
    model, (x, y) = normed(), data()
    model[1] = Einsum(4)
    F = oracle.fisher(model, CE, x, y)
    index = oracle.positions(model, ["1.weight", "1.bias"])
    for metric, kinds in (("kfac", {Kronecker}), ("ekfac", {EigenKronecker}), ("diagonal", None)):
        with pytest.warns(CoverageWarning, match="no rule covers 1.weight, 1.bias") as caught:
            operator = natgrad.fisher(model, CE, [(x[:2], y[:2]), (x[2:], y[2:])], metric)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert operator.space.names == tuple(name for name, _ in model.named_parameters())
        torch.testing.assert_close(operator.diagonal()[index], F.diagonal()[index])
        if kinds is None:
            assert isinstance(operator, Diagonal)
        else:
            assert isinstance(operator, BlockDiagonal)
            assert {type(block) for block in operator.blocks} == kinds | {Diagonal}


@pytest.mark.parametrize("metric", ["dense", "block", "gram", "matrixfree", "lowrank"])
def test_a_metric_that_knows_every_parameter_needs_no_warning(metric: str) -> None:
    natgrad.fisher(normed(), CE, data(), metric)


def test_a_model_without_any_rule() -> None:
    model, (x, y) = Einsum(3), data()
    F = oracle.fisher(model, CE, x, y)
    for kind in ("exact", "mc"):
        with pytest.warns(CoverageWarning):
            found = natgrad.fisher(model, CE, (x, y), "kfac", kind, seed=3)
        assert isinstance(found, Diagonal)
        with pytest.warns(CoverageWarning):
            again = natgrad.fisher(model, CE, (x, y), "diagonal", kind, seed=3)
        torch.testing.assert_close(found.to_dense(), again.to_dense())
        if kind == "exact":
            torch.testing.assert_close(found.diagonal(), F.diagonal())


def test_a_weight_that_also_acts_outside_a_rule_is_one_of_the_rest(quiet: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.linear(x) + x * self.linear.weight.sum(0))

    model, (x, y) = Both().to(DTYPE), data()
    F = oracle.fisher(model, CE, x, y)
    for metric in ("kfac", "ekfac", "diagonal"):
        found = natgrad.fisher(model, CE, (x, y), metric)
        index = oracle.positions(model, ["linear.weight", "linear.bias"])
        torch.testing.assert_close(found.diagonal()[index], F.diagonal()[index])


def test_a_parameter_that_does_nothing_has_no_information(quiet: Any) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, (x, y) = Idle().to(DTYPE), data()
    for metric in ("kfac", "ekfac", "diagonal", "dense", "block", "gram", "matrixfree"):
        found = natgrad.fisher(model, CE, (x, y), metric)
        assert found.space.names == ("used.weight", "used.bias", "idle.weight", "idle.bias")
        assert not found.diagonal()[12:].any()
        assert found.diagonal()[:12].any()


class Moody(nn.Module):
    """Whether its parameter acts by a rule depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x) + self.other(x)
        return z * self.linear.bias if x[0, 0] > 0 else z


def test_a_parameter_that_leaves_its_rule_in_a_later_batch_is_refused() -> None:
    model, (x, y) = Moody().to(DTYPE), data()
    later = [(-x.abs(), y), (x.abs(), y)]
    with pytest.raises(ModelChangedError, match='linear.bias acted by mul.*; use metric="dense"'):
        natgrad.fisher(model, CE, later)
    F = (oracle.fisher(model, CE, *later[0]) + oracle.fisher(model, CE, *later[1])) / 2
    for metric in ("dense", "gram", "matrixfree"):
        torch.testing.assert_close(natgrad.fisher(model, CE, later, metric).to_dense(), F)
    block = natgrad.fisher(model, CE, later, "block")
    for part in block.blocks:
        index = oracle.positions(model, part.space.names)
        torch.testing.assert_close(part.to_dense(), F[index[:, None], index])


# ------------------------------------------------------------------------------------------------ several sweeps


@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_ekfac_looks_twice_where_it_can_not_keep_the_batches(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = net(), data()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    kept = natgrad.fisher(model, CE, batches, "ekfac", kind)
    monkeypatch.setattr(ekfac, "KEPT_BYTES", 200)
    told: list[int] = []
    swept = natgrad.fisher(model, CE, batches, "ekfac", kind, progress=lambda done, _: told.append(done))
    assert told == [1, 2, 1, 2]
    torch.testing.assert_close(swept.to_dense(), kept.to_dense())
    once = natgrad.fisher(
        model, CE, iter(batches), "ekfac", kind
    )  # kept all the same: there is no second time
    torch.testing.assert_close(once.to_dense(), kept.to_dense())


def test_errors_name_who_asked() -> None:
    assert Survey.__dataclass_fields__["asker"].default == "natgrad.fisher"
    model, x = nn.Sequential(nn.Linear(3, 4)).to(DTYPE), torch.randn(2, 3, dtype=DTYPE)
    with pytest.raises(natgrad.OutputError, match="natgrad.ggn"):
        natgrad.ggn(
            nn.LSTM(3, 2).to(DTYPE), CE, (x, torch.zeros(2, dtype=torch.long)), outputs=lambda o: "no"
        )
    with pytest.raises(natgrad.OutputError, match="natgrad.kl"):
        natgrad.kl(model, CE, x, torch.zeros(16, dtype=DTYPE), outputs=lambda o: "no")
