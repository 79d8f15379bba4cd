"""Parameter space: order, shapes, and the way between named tensors and flat vectors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad.errors import VectorError
from natgrad.operators import ParameterSpace

SPACE = ParameterSpace({"b": (2,), "w": (2, 3), "s": ()})


def test_a_flat_vector_is_the_parameters_in_order_each_by_rows() -> None:
    named = {
        "w": torch.tensor([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]),
        "s": torch.tensor(9.0),
        "b": torch.tensor([1.0, 2.0]),
    }
    assert SPACE.numel == 9
    assert SPACE.names == ("b", "w", "s")
    assert SPACE.shapes == {"b": (2,), "w": (2, 3), "s": ()}
    assert SPACE.slices == {"b": slice(0, 2), "w": slice(2, 8), "s": slice(8, 9)}
    assert torch.equal(SPACE.flatten(named), torch.arange(1.0, 10.0))
    assert torch.equal(
        SPACE.flatten({n: t.mT.contiguous().mT if t.ndim == 2 else t for n, t in named.items()}),
        torch.arange(1.0, 10.0),
    )  # whatever the strides


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4),
    count=st.integers(0, 3),
)
@settings(max_examples=40)
def test_flatten_and_unflatten_undo_each_other(shapes: list[tuple[int, ...]], count: int) -> None:
    space = ParameterSpace({f"p{i}": shape for i, shape in enumerate(shapes)})
    flat = torch.arange(float(space.numel))
    assert torch.equal(space.flatten(space.unflatten(flat)), flat)
    rows = torch.randn(count, space.numel)
    assert torch.equal(space.flatten_rows(space.unflatten_rows(rows)), rows)


def test_unflatten_gives_views() -> None:
    flat = torch.zeros(9)
    SPACE.unflatten(flat)["w"].fill_(1.0)
    assert flat.sum() == 6


def test_of_tensors_and_of_a_model() -> None:
    model = torch.nn.Linear(3, 2)
    space = ParameterSpace.of(dict(model.named_parameters()))
    assert space == ParameterSpace({"weight": (2, 3), "bias": (2,)})


def test_equality_takes_order_into_account_and_spaces_are_values() -> None:
    assert ParameterSpace({"a": (1,), "b": (2,)}) != ParameterSpace({"b": (2,), "a": (1,)})
    for twin in (copy.deepcopy(SPACE), pickle.loads(pickle.dumps(SPACE)), ParameterSpace(SPACE.shapes)):
        assert twin == SPACE
        assert hash(twin) == hash(SPACE)
    with pytest.raises(AttributeError):
        SPACE.entries = ()  # type: ignore[misc]


def test_labels() -> None:
    assert ParameterSpace({"net.0.weight": (2,), "net.0.bias": (2,)}).label == "net.0"
    assert ParameterSpace({"weight": (2,)}).label == "weight"
    assert SPACE.label == "b and 2 more"


def test_restrict() -> None:
    assert SPACE.restrict(["s", "b"]).shapes == {"s": (), "b": (2,)}
    with pytest.raises(VectorError, match="no parameter 'q'; the space has 'b', 'w', 's'"):
        SPACE.restrict(["q"])


def test_errors_say_which_name() -> None:
    good = SPACE.unflatten(torch.zeros(9))
    for wrong, message in [
        ({"b": good["b"]}, "lacks 'w', 's'"),
        (good | {"weight": good["w"]}, "no parameter 'weight'"),
        (good | {"w": torch.zeros(3, 2)}, r"'w' has shape \(3, 2\), but \(2, 3\)"),
    ]:
        with pytest.raises(VectorError, match=message):
            SPACE.flatten(wrong)
    with pytest.raises(VectorError, match="has 9 entries, but this one has 8"):
        SPACE.unflatten(torch.zeros(8))
