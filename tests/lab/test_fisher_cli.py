from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import natgrad
from natgrad import cli
from natgrad.lab import spectrum, spectrum_view
from natgrad.lab.spectrum import fisher_of, spectrum_of

CASES = """
import torch
from torch import nn
from natgrad.lab import Problem

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
X = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(40) % 3

def case():
    return MODEL, nn.CrossEntropyLoss(), (X, Y)

def batches():
    return MODEL, nn.CrossEntropyLoss(reduction="sum"), [(X[:30], Y[:30]), (X[30:], Y[30:])]

def loader():
    data = torch.utils.data.TensorDataset(X, Y)
    return MODEL, nn.CrossEntropyLoss(), torch.utils.data.DataLoader(data, batch_size=16)

def many_outputs():
    return nn.Linear(4, 101).double(), nn.MSELoss(), (X, torch.zeros(40, 101, dtype=torch.float64))

def problem():
    return Problem(name="mine", title="mine", make_model=lambda seed: nn.Linear(4, 3).double(),
                   loss_fn=nn.CrossEntropyLoss(), train=(X, Y), batch_size=10)

def only_a_model():
    return MODEL

def one_shot():
    return MODEL, nn.CrossEntropyLoss(), iter([(X, Y)])

def unusual_loss():
    return MODEL, nn.TripletMarginLoss(), (X, Y)

def broken_data():
    return MODEL, nn.CrossEntropyLoss(), (X * float("nan"), Y)

def empty():
    return MODEL, nn.CrossEntropyLoss(), []
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cases.py").write_text(CASES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cases", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(("fisher", *words))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def dense_fisher() -> torch.Tensor:
    import cases  # type: ignore[import-not-found]

    model, loss, data = cases.case()
    return natgrad.fisher(model, loss, data, "dense").to_dense()


def test_the_figures_are_those_of_the_dense_matrix() -> None:
    found = fisher_of("cases:case", "dense", damping=0.05)
    values = torch.linalg.eigvalsh(dense_fisher()).flip(0).clamp_min(0)
    assert torch.allclose(found.values, values, atol=1e-12)
    assert found.trace == pytest.approx(float(values.sum()))
    assert found.effective == pytest.approx(float((values / (values + 0.05)).sum()))
    assert found.damped_condition == pytest.approx(float((values[0] + 0.05) / (values[-1] + 0.05)))
    assert found.rank < found.parameters
    assert found.condition == float("inf")
    assert found.examples == 40


def test_layers_are_the_blocks_of_the_matrix_and_the_hardest_comes_first() -> None:
    found, matrix = fisher_of("cases:case", "dense"), dense_fisher()
    by_name = {layer.name: layer for layer in found.layers}
    for name, part in (("0", slice(0, 25)), ("2", slice(25, 43))):
        block = matrix[part, part]
        assert by_name[name].parameters == len(block)
        assert by_name[name].trace == pytest.approx(float(block.trace()))
        assert by_name[name].largest == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]))
    assert found.layers[0].largest == max(layer.largest for layer in found.layers)


@pytest.mark.parametrize(
    "metric", ["kfac", "ekfac", "block", "diagonal", "dense", "gram", "lowrank", "matrixfree"]
)
def test_every_representation_has_a_spectrum(metric: str, say: Any) -> None:
    code, out, err = say("cases:case", "--metric", metric)
    assert code == 0, err
    for told in ("43 parameters on 40 examples", "trace", "effective dimension", "condition", "λ = 0.025"):
        assert told in out


def test_products_alone_give_the_largest_eigenvalues_and_estimates_with_their_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spectrum, "LARGEST", 6)
    exact, free = (fisher_of("cases:case", metric, damping=0.05) for metric in ("dense", "matrixfree"))
    assert len(free.values) == 6
    assert torch.allclose(free.values, exact.values[:6], rtol=1e-6)
    assert not free.complete
    assert free.condition is None
    assert free.damped_condition == pytest.approx((float(exact.values[0]) + 0.05) / 0.05)
    assert free.effective_error > 0
    assert abs(free.effective - exact.effective) < 4 * free.effective_error
    assert "≤" in spectrum_view.render(free, 120)


def test_damping_is_one_over_the_examples_but_one_for_a_sum() -> None:
    assert fisher_of("cases:case").damping == 1 / 40
    summed = fisher_of("cases:batches")
    assert summed.damping == 1.0
    assert summed.effective == pytest.approx(fisher_of("cases:case").effective)


@pytest.mark.parametrize("case", ["cases:case", "cases:batches", "cases:loader", "cases:problem"])
def test_examples_takes_the_first_of_any_data(case: str) -> None:
    found = fisher_of(case, "dense", examples=33)
    import cases

    assert found.examples == 33
    if case in ("cases:case", "cases:loader"):
        part = natgrad.fisher(cases.MODEL, cases.case()[1], (cases.X[:33], cases.Y[:33]), "dense")
        assert found.trace == pytest.approx(float(part.trace()))


def test_many_outputs_are_sampled_unless_asked_otherwise(say: Any) -> None:
    assert fisher_of("cases:many_outputs", "diagonal").kind == "mc"
    _, out, _ = say("cases:many_outputs", "--metric", "diagonal")
    assert "101 outputs an example: signals are sampled" in out
    assert fisher_of("cases:many_outputs", "diagonal", "exact").kind == "exact"


def test_the_operator_is_saved_and_the_spectrum_drawn(say: Any, workplace: Path) -> None:
    code, out, err = say("cases:case", "--save", "f.safetensors", "--plot", "f.png")
    assert code == 0, err
    assert f"operator: {workplace / 'f.safetensors'}" in out
    assert f"plot: {workplace / 'f.png'}" in out
    assert (workplace / "f.png").read_bytes().startswith(b"\x89PNG")
    loaded = natgrad.load_operator(workplace / "f.safetensors")
    assert torch.equal(loaded.to_dense(), fisher_of("cases:case").operator.to_dense())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cases:case", "--metric", "kfak"], "did you mean 'kfac'"),
        (["cases:case", "--kind", "exct"], "unknown kind"),
        (["cases:cas"], "did you mean 'case'"),
        (["mnst"], "did you mean 'mnist'"),
        (["no_module:x"], "no module 'no_module'"),
        (["cases:only_a_model"], "gave a Sequential; it must give (model, loss_fn, data)"),
        (["cases:one_shot"], "is an iterator"),
        (["cases:unusual_loss"], "TripletMarginLoss"),
        (["cases:broken_data"], "batch 0: the inputs are not finite"),
        (["cases:empty"], "the data has no batches"),
        (["cases:case", "--examples", "41"], "--examples 41, but the data of cases:case has 40"),
        (["cases:case", "--examples", "0"], "must be a whole number above 0"),
        (["cases:case", "--damping", "-1"], "must be a number above 0"),
        (["cases:case", "--plot", "f.txt"], "must end in .png"),
        (["cases:case", "--plot", "nowhere/f.png"], "there is no folder"),
        (["cases:case", "--save", "nowhere/f.safetensors"], "there is no folder"),
        (["cases:case", "--save", "."], "is a folder"),
        (["cases:case", "--save", "f.safetensors", "--metric", "matrixfree"], "can't be saved"),
        ([], "the following arguments are required: MODULE:FACTORY"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(words: list[str], told: str, say: Any) -> None:
    code, _, err = say(*words)
    assert code == 2
    assert told in err
    assert err.startswith("natgrad: ")
    assert err.count("\n") == 1


def test_a_file_that_fails_on_writing_is_one_line(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(natgrad.LinearOperator, "save", full)
    code, _, err = say("cases:case", "--save", "f.safetensors")
    assert code == 2
    assert "No space left on device" in err


def test_the_spectrum_needs_damping() -> None:
    operator = fisher_of("cases:case").operator
    with pytest.raises(natgrad.ConfigError, match="must be above 0"):
        spectrum_of(operator, 0.0)


def test_a_bar_is_drawn_in_a_terminal_alone() -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown, plain = Terminal(), io.StringIO()
    for stream in (shown, plain):
        with spectrum._bar(stream) as tell:
            for done in (1, 2, 1, 2):
                tell(done, 2)
    assert "Fisher information" in shown.getvalue()
    assert "sweep 2" in shown.getvalue()
    assert plain.getvalue() == ""
    fisher_of("cases:batches", "ekfac", stream=plain)
    assert plain.getvalue() == ""
