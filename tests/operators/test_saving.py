"""Files of operators: what they hold, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from natgrad.errors import ConfigError, StateError
from natgrad.operators import Dense, Diagonal, LinearOperator, load_operator
from oracle.operators import DTYPE, blocks, diagonal, eigen, linear_with_bias


def rewritten(saved: LinearOperator, file: Path, **metadata: str) -> Path:
    """Saves an operator, then changes the file's metadata."""
    saved.save(file)
    with safe_open(str(file), framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
        held = dict(opened.metadata()) | metadata
    save_file(tensors, str(file), metadata={key: value for key, value in held.items() if value})
    return file


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    operator = blocks(0, 2, 3).operator
    operator.save(tmp_path / "F.safetensors")
    with safe_open(str(tmp_path / "F.safetensors"), framework="pt") as file:
        assert sorted(file.keys()) == ["0.A", "0.G", "1.matrix"]
        metadata = file.metadata()
    description = json.loads(metadata["operator"])
    assert metadata["natgrad"] == "1"
    assert description["class"] == "BlockDiagonal"
    assert description["space"] == [["b", [2]], ["scale", []], ["w", [2, 3]], ["t", [2]]]
    assert [part["class"] for part in description["meta"]["parts"]] == [
        "Kronecker",
        "Dense",
        "ScaledIdentity",
    ]


def test_tensors_that_share_memory_or_lie_by_columns_come_back_whole(tmp_path: Path) -> None:
    case = diagonal(0, 2, 3)
    space = case.operator.space
    shared = torch.ones(space.numel, dtype=DTYPE)
    Diagonal(space, space.unflatten(shared)).save(tmp_path / "shared")
    assert torch.equal(load_operator(tmp_path / "shared").diagonal(), shared)
    operator = eigen(0, 3, 4).operator  # eigenvectors come by columns from LAPACK
    assert not operator.U_A.is_contiguous()  # type: ignore[attr-defined]
    operator.save(tmp_path / "columns")
    back = load_operator(str(tmp_path / "columns"), device="cpu")
    assert back.U_A.stride() == operator.U_A.stride()  # type: ignore[attr-defined]


def test_a_saved_operator_needs_no_gradient(tmp_path: Path) -> None:
    space = diagonal(0, 1, 1).operator.space
    Dense(space, torch.eye(3, dtype=DTYPE).requires_grad_()).save(tmp_path / "F")
    assert not load_operator(tmp_path / "F").to_dense().requires_grad


def test_what_is_no_operator_is_refused_by_name(tmp_path: Path) -> None:
    operator, file = linear_with_bias(0, 2, 2).operator, tmp_path / "F.safetensors"
    for name in ("Mystery", "Wrapper"):  # the latter is abstract
        description = {"class": name, "space": [["w", [1]]], "meta": {}}
        with pytest.raises(StateError, match=rf"'{name}' is no operator.*BlockDiagonal.*Kronecker.*Sum$"):
            load_operator(rewritten(operator, file, operator=json.dumps(description)))
    with pytest.raises(StateError, match=r"version '7'.*reads '1'"):
        load_operator(rewritten(operator, file, natgrad="7"))
    with pytest.raises(StateError, match=r"holds no operator.*LinearOperator\.save"):
        load_operator(rewritten(operator, file, operator=""))
    without = {"class": "Dense", "space": [["w", [1]]], "meta": {}}
    with pytest.raises(StateError, match="can't be made.*matrix"):
        load_operator(rewritten(operator, file, operator=json.dumps(without)))
    with pytest.raises(StateError, match="can't be made"):
        load_operator(rewritten(operator, file, operator="{"))
    with pytest.raises(StateError, match="can't be made"):
        load_operator(rewritten(operator, file, operator="[]"))
    file.write_bytes(b"no safetensors file at all")
    with pytest.raises(StateError, match="no safetensors file"):
        load_operator(file)
    with pytest.raises(OSError, match="missing"):
        load_operator(tmp_path / "missing")


def test_a_missing_extra_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = diagonal(0, 1, 1).operator
    operator.save(tmp_path / "F")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for ask in (lambda: operator.save(tmp_path / "G"), lambda: load_operator(tmp_path / "F")):
        with pytest.raises(ConfigError, match=r"safetensors is needed.*natgrad\[lab\]"):
            ask()
