"""What a user may give as data, and what `fisher` says when it can't be used."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad import ConfigError, EmptyError, NonFiniteError, OutputError, TargetError
from natgrad.information.data import Batches, batch_of
from oracle import fisher as oracle

DTYPE = torch.float64


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(DTYPE)


class TwoInputs(nn.Module):
    """Reads two tensors, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.left(a) * torch.tanh(self.right(b))


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, dtype=DTYPE), torch.randint(2, (n,))


CE = nn.CrossEntropyLoss()


def dense(model: nn.Module, given: Any, **options: Any) -> Tensor:
    return natgrad.fisher(model, options.pop("loss", CE), given, "dense", **options).to_dense()


# ------------------------------------------------------------------------------------------- what may be given


def test_every_form_of_the_same_data_gives_the_same_matrix() -> None:
    model, (x, y) = net(), data()
    F = oracle.fisher(model, CE, x, y)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    forms: dict[str, Any] = {
        "a pair": (x, y),
        "a list of pairs": batches,
        "a tuple of inputs": ((x,), y),
        "lists, as a DataLoader makes them": [[x[:4], y[:4]], [[x[4:]], y[4:]]],
        "a DataLoader": DataLoader(TensorDataset(x, y), batch_size=4),
        "a generator": (b for b in batches),
        "inputs alone": x,
        "batches of inputs alone": [x[:4], (x[4:],)],
        "a dict": {"input": x},
        "a dict and targets": ({"input": x}, y),
        "a mapping of another kind": UserDict(input=x),
        "a shuffling DataLoader": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
    }
    for name, given in forms.items():
        found = dense(model, given)
        torch.testing.assert_close(found, F, msg=lambda m, n=name: f"{n}: {m}")
    pair = namedtuple("pair", "x y")(x, y)
    torch.testing.assert_close(dense(model, pair), F)


def test_several_inputs_by_position_and_by_name() -> None:
    model = TwoInputs().to(DTYPE)
    a, b = torch.randn(5, 3, dtype=DTYPE), torch.randn(5, 2, dtype=DTYPE)
    loss = nn.MSELoss(reduction="sum")
    whole = dense(model, ((a, b), torch.zeros(5, 2, dtype=DTYPE)), loss=loss)
    by_name = dense(model, {"b": b, "a": a, "scale": 1.0}, loss=loss)
    torch.testing.assert_close(by_name, whole)
    cut = dense(model, {"b": b, "a": a, "scale": 1.0}, loss=loss, batch_size=2)
    torch.testing.assert_close(cut, whole)
    listed = dense(
        model, [[[a[:2], b[:2]], torch.zeros(2, 2, dtype=DTYPE)], ({"a": a[2:], "b": b[2:]},)], loss=loss
    )
    torch.testing.assert_close(listed, whole)


def test_a_pair_is_cut_and_flattened_targets_with_it() -> None:
    """Tokens flattened into the rows of the targets belong to their example."""
    embed = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).to(DTYPE)
    x, y = torch.randn(6, 5, 2, dtype=DTYPE), torch.randint(4, (30,))
    y[::7] = -100
    flat = {"outputs": lambda z: z.flatten(0, 1)}
    whole = dense(embed, (x, y), batch_size=6, **flat)
    torch.testing.assert_close(dense(embed, (x, y), batch_size=4, **flat), whole)
    assert len(Batches((x, y), 4)) == 2


def test_outputs_are_found_in_what_the_model_returns() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x), "hidden": x}

    model, (x, y) = Named(), data()
    found = natgrad.fisher(model, CE, (x, y), "dense", outputs=lambda o: o["logits"])
    torch.testing.assert_close(found.to_dense(), oracle.fisher(model.net, CE, x, y))
    with pytest.raises(
        OutputError, match=r"batch 0: .*dict with keys logits, hidden.*natgrad.fisher\(\.\.\., outputs"
    ):
        natgrad.fisher(model, CE, (x, y))


def test_batch_of_says_what_it_needs() -> None:
    x, y = data()
    for item, message in (
        ((x, y, y), "batch 3 is a tuple of 3 items; give .inputs, targets."),
        ("text", "inputs of batch 3 are a str"),
        ((None, y), "inputs of batch 3 are a NoneType"),
    ):
        with pytest.raises(ConfigError, match=message):
            batch_of(item, "batch 3")
    with pytest.raises(EmptyError, match="batch 3 holds no tensor of inputs"):
        batch_of({"a": 1.0}, "batch 3")


# ---------------------------------------------------------------------------------------------- what can't be used


@pytest.mark.parametrize(
    "given",
    [
        [],
        (torch.zeros(0, 3, dtype=DTYPE), torch.zeros(0, dtype=torch.long)),
        [torch.zeros(0, 3, dtype=DTYPE)],
    ],
)
def test_empty_data(given: Any) -> None:
    with pytest.raises(EmptyError, match="no batches|no examples"):
        natgrad.fisher(net(), CE, given)


def test_an_iterator_that_was_used_up() -> None:
    batches = iter([data()])
    natgrad.fisher(net(), CE, batches)
    with pytest.raises(EmptyError, match="used up before; pass the list of its batches"):
        natgrad.fisher(net(), CE, batches)


def test_data_that_is_no_data() -> None:
    x, y = data()
    for given, message in (
        (TensorDataset(x, y), "wrap it in torch.utils.data.DataLoader"),
        (3, "an iterable of batches, not int"),
    ):
        with pytest.raises(ConfigError, match=message):
            natgrad.fisher(net(), CE, given)
    with pytest.raises(ConfigError, match="batch_size=0"):
        natgrad.fisher(net(), CE, (x, y), batch_size=0)


def test_data_of_another_dtype_or_on_another_device() -> None:
    x, y = data()
    with pytest.raises(ConfigError, match="batch 1: the data is torch.float32, the model torch.float64"):
        natgrad.fisher(net(), CE, [(x, y), (x.float(), y)])
    with pytest.raises(ConfigError, match="the data is on meta, the model on cpu"):
        natgrad.fisher(net(), CE, (x.to("meta"), y))
    with pytest.raises(ConfigError, match="the targets are on meta, the model's outputs on cpu"):
        natgrad.fisher(net(), CE, (x, y.to("meta")))


def test_an_error_of_the_models_own_stays_as_it_is() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("mine")

    x, y = data()
    with pytest.raises(RuntimeError, match="^mine$"):
        natgrad.fisher(Broken().to(DTYPE), CE, (x, y))


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "dense", "diagonal", "block", "gram", "matrixfree"])
def test_what_is_not_finite_is_found_in_its_batch(metric: str) -> None:
    x, y = data()
    bad = x.clone()
    bad[1, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="batch 1: the inputs are not finite"):
        natgrad.fisher(net(), CE, [(x, y), (bad, y)], metric)
    with pytest.raises(NonFiniteError, match="batch 1: the targets are not finite"):
        targets = torch.zeros(6, 2, dtype=DTYPE)
        natgrad.fisher(net(), nn.MSELoss(), [(x, targets), (x, targets + torch.nan)], metric)
    model = net()
    with torch.no_grad():
        model[2].bias[0] = torch.inf
    with pytest.raises(NonFiniteError, match="batch 0: the model's outputs are not finite"):
        natgrad.fisher(model, CE, (x, y), metric)


def test_a_likelihood_that_does_not_fit() -> None:
    x, y = data()
    with pytest.raises(TargetError, match="batch 0: Categorical expects class indices from 0 to 1"):
        natgrad.fisher(net(), CE, (x, y + 5))
    with pytest.raises(TargetError, match="batch 1: Gaussian expects targets of the outputs' shape"):
        good = torch.zeros(6, 2, dtype=DTYPE)
        natgrad.fisher(net(), nn.MSELoss(), [(x, good), (x, y)])
    with pytest.raises(TargetError, match="batch 0: the empirical Fisher is made of real gradients"):
        natgrad.fisher(net(), CE, x, kind="empirical")
    with pytest.raises(TargetError, match=r"natgrad.hessian depends on the targets"):
        natgrad.hessian(net(), CE, x)


def test_data_in_which_everything_is_ignored() -> None:
    x, y = data()
    with pytest.raises(EmptyError, match="every event of the data is ignored"):
        natgrad.fisher(net(), CE, (x, torch.full_like(y, -100)))
    part = [(x, torch.full_like(y, -100)), (x, y)]  # one such batch among others counts nothing
    torch.testing.assert_close(dense(net_ := net(), part), oracle.fisher(net_, CE, x, y))


def test_weights_that_do_not_fit() -> None:
    x, y = data()
    for weights, message in (
        (torch.ones(5), "there are 5 weights, but more examples"),
        (torch.ones(7), "there are 7 weights, but 6 examples"),
        (-torch.ones(6), "finite and not negative"),
        (torch.full((6,), torch.nan), "finite and not negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            natgrad.fisher(net(), CE, (x, y), weights=weights)
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    with pytest.raises(ConfigError, match="this DataLoader shuffles"):
        natgrad.fisher(net(), CE, loader, weights=torch.ones(6))
