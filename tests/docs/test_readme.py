"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import natgrad

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_snippets_run_in_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(64, 6)
    targets = (inputs @ torch.randn(6, 3)).argmax(1)
    loader = [(inputs, targets)] * 15
    loss_fn = nn.CrossEntropyLoss()
    before = loss_fn(model(inputs), targets).item()
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    points, edge = torch.rand(40, 2), torch.rand(20, 2).round()
    names: dict[str, object] = {"model": model, "loader": loader, "net": net, "points": points, "edge": edge}
    assert len(blocks()) == 6
    for block in blocks():
        exec(compile(block, str(README), "exec"), names)
    assert loss_fn(model(inputs), targets).item() < 0.2 * before
    assert isinstance(names["optimizer"], natgrad.NaturalGradient)


def test_every_metric_of_the_readme_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for name in re.findall(r'metric="(\w+)"', text):
        natgrad.NaturalGradient(nn.Linear(2, 2), nn.MSELoss(), metric=name, lr=0.1)
