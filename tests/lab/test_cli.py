from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import natgrad
from natgrad import cli
from natgrad.lab import race as race_module

PROBLEM = """
import functools, torch
from torch import nn
from natgrad.lab import Problem

def my_problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    return Problem(
        name="mine", title="my own problem", make_model=lambda seed: nn.Linear(3, 2), loss_fn=nn.CrossEntropyLoss(),
        train=(x, (x.sum(1) > 0).long()), batch_size=10, target=0.6, steps=12, evaluate_every=4,
    )

def wrong_shapes():
    problem = my_problem()
    return Problem(name="wrong", title="w", make_model=lambda seed: nn.Linear(5, 2), loss_fn=problem.loss_fn,
                   train=problem.train, batch_size=10)

def my_model():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 3))
    return model, nn.CrossEntropyLoss(), torch.zeros(5, 2, 10)
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_module.py").write_text(PROBLEM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> Said:
        capsys.readouterr()
        code = cli.main(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Said(code, out, err)

    return run


def test_a_users_own_problem_is_raced_and_reported(say: Any, workplace: Path) -> None:
    said = say("race", "my_module:my_problem", "--optimizers", "adam,sgd@0.5", "--seeds", "2")
    assert said.code == 0, said.err
    folder = workplace / "races" / "mine-12-steps"
    assert f"report: {folder / 'report.html'}" in said.out
    assert "my own problem" in said.out
    assert "steps to target" in said.out
    assert (folder / "report.html").exists()
    assert len(list(folder.glob("runs/*/result.json"))) == 4
    again = say("race", "my_module:my_problem", "--optimizers", "adam,sgd@0.5", "--seeds", "2")
    assert again.code == 0
    assert say("report", str(folder)).code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["race", "mnist-autoencder"], "did you mean 'mnist-autoencoder'"),
        (["race", "my_module:my_problm"], "did you mean 'my_problem'"),
        (["race", "no_module:x"], "no module 'no_module'"),
        (["race", "my_module:my_problem", "--optimizers", "adm"], "did you mean 'adam'"),
        (["race", "my_module:my_problem", "--steps", "-3"], "'-3' must be a whole number above 0"),
        (["race", "my_module:my_problem", "--steps", "3", "--seconds", "4"], "not allowed with"),
        (["race", "my_module:my_problem", "--seeds", "zero"], "--seeds takes a count"),
        (
            ["race", "my_module:my_problem", "--batch-size", "99", "--optimizers", "sgd"],
            "between 1 and the 40",
        ),
        (["race", "my_module:wrong_shapes", "--optimizers", "sgd", "--steps", "2"], "every run failed"),
        (["race"], "name a problem: mnist"),
        (["rcae"], "invalid choice: 'rcae'"),
        (["report", "nowhere"], "nowhere is not there"),
        (["inspect", "my_module:my_problm"], "did you mean"),
        (["inspect", "mnst"], "did you mean 'mnist'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(words: list[str], told: str, say: Any) -> None:
    said = say(*words)
    assert said.code == 2
    assert told in said.err
    assert said.err.startswith("natgrad: ")
    assert said.err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_an_error_not_a_traceback(say: Any, workplace: Path) -> None:
    (workplace / "taken").write_text("a file, not a folder")
    said = say("race", "my_module:my_problem", "--optimizers", "sgd", "--folder", "taken/here")
    assert said.code == 2
    assert "can't be written" in said.err


def test_an_interruption_says_how_to_go_on(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(race_module, "_train", interrupted)
    said = say("race", "my_module:my_problem", "--optimizers", "sgd")
    assert said.code == 130
    assert "Go on with: natgrad race my_module:my_problem --optimizers sgd" in said.err


def test_a_fault_of_our_own_is_one_line_too(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_tell", lambda folder: 1 / 0)
    said = say("report", "races")
    assert said.code == 1
    assert "a fault in natgrad, ZeroDivisionError" in said.err


def test_a_missing_extra_says_how_to_install_it(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = say("race", "my_module:my_problem", "--optimizers", "sgd")
    assert said.code == 2
    assert 'pip install "natgrad[lab]"' in said.err


def test_red_only_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, plain = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    cli._red("no")
    monkeypatch.setattr(sys, "stderr", plain)
    cli._red("no")
    assert shown.getvalue() == "\x1b[31mnatgrad: no\x1b[0m\n"
    assert plain.getvalue() == "natgrad: no\n"


def test_the_list_and_the_version(say: Any) -> None:
    said = say("race", "--list")
    assert said.code == 0
    assert "curves-autoencoder" in said.out
    assert "two-coordinates" in said.out
    assert "muon" in said.out
    assert say("version").out.startswith(f"natgrad {natgrad.__version__} (torch ")


def test_inspect_names_rule_factors_and_cost(say: Any) -> None:
    said = say("inspect", "my_module:my_model", "--batch-size", "64")
    assert said.code == 0, said.err
    for told in (
        "conv1d",
        "7² and 4²",
        "in 0.weight",
        "layer_norm",
        "33² and 3²",
        "a diagonal",
        "64 examples",
    ):
        assert told in said.out


def test_the_demo_races_the_autoencoder(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(cli, "_run", lambda *words, **options: ran.append(words) or 0)
    assert say("demo", "--seconds", "5").code == 0
    problem, names, folder, steps, seconds, seeds = ran[0]
    assert problem.name == "mnist-autoencoder"
    assert (names, str(folder), steps, seconds, seeds) == (
        ["natgrad", "adam", "sgd"],
        "races/demo",
        None,
        5.0,
        (0,),
    )
