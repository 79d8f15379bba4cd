"""The page's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from oracle import taylor as oracle

PAGE = Path(__file__).parents[2] / "docs" / "pde.md"


def test_the_snippets_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks[:2]:
        exec(compile(block, str(PAGE), "exec"), names)
    model, x = names["model"], names["x"]
    second = oracle.second(model, x[:3])
    torch.testing.assert_close(
        names["residual"][:3], second.diagonal(dim1=1, dim2=2).sum(-1) + names["f"][:3]
    )
    torch.testing.assert_close(names["mixed"][:3, 0], second[:, 0, 1])
    assert names["net"][0].weight.grad is not None
    exec(compile(blocks[2], str(PAGE), "exec"), names)
    solution = torch.prod(torch.sin(torch.pi * x), dim=1, keepdim=True)
    assert (model(x) - solution).norm() < 1e-3 * solution.norm()
