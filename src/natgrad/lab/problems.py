"""The problems that optimisers race on: data, model, loss, and what counts as done.

A problem is a value. Its loss is the one that is trained; everything is reported in `unit` as

    excess  =  scale · loss  −  floor

where `floor` is the least value that the loss can take (the entropy of the data, or a known optimum), so that an
excess of zero is perfection and a logarithmic axis means something.

Your own problem is a function that returns a `Problem`: ``natgrad race my_module:my_problem``.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import ConfigError, EmptyError, NatgradError, UnknownNameError
from natgrad.lab import data

Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """One thing to train, and how its progress is told.

    Attributes:
        name: short name, used for folders.
        title: one line that says what is trained on what.
        make_model: builds the model for a seed. Equal seeds must give equal weights; torch's global generator is
            seeded too before the call, so a factory may ignore its argument.
        loss_fn: a `torch.nn` loss called as ``loss_fn(outputs, targets)``, with a batch mean (or sum) inside.
        train: inputs and targets, first dimension the examples.
        test: the same, held out; None where the problem is about optimisation alone.
        unit: unit of ``scale · loss``, such as ``"nats per image"``.
        scale: what turns the loss into that unit.
        floor: the least value of ``scale · loss`` on the training set, in `unit`.
        batch_size: examples per step, unless the user says otherwise.
        target: the excess (in `unit`) that the race is timed to; None means that nobody is timed.
        steps: how long a race lasts, unless the user says otherwise.
        evaluate_every: steps between two evaluations on the whole training set (the first ones lie closer).
        scores: name → function (outputs, targets) → one number per example, averaged over the test set.
        rates: peer → the learning rate that it gets without ``--tune``, found by a search on this problem.
    """

    name: str
    title: str
    make_model: Callable[[int], nn.Module]
    loss_fn: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None = None
    unit: str = "nats"
    scale: float = 1.0
    floor: float = 0.0
    batch_size: int = 128
    target: float | None = None
    steps: int = 200
    evaluate_every: int = 10
    scores: Mapping[str, Score] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs, targets = self.train
        if len(inputs) == 0:
            raise EmptyError(f"problem {self.name!r} has no training data")
        if len(inputs) != len(targets):
            raise ConfigError(f"problem {self.name!r} has {len(inputs)} inputs but {len(targets)} targets")
        if not self.name or any(c in self.name for c in "/\\:"):
            raise ConfigError(f"a problem's name becomes a folder's: {self.name!r} won't do")

    def build(self, seed: int) -> nn.Module:
        """The model of a seed; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_model(seed)


# ------------------------------------------------------------------------------------------------ models


def autoencoder_784(seed: int) -> nn.Sequential:
    """784-1000-500-250-30 and its mirror image: tanh, linear code, linear output (logits).

    The network of Hinton & Salakhutdinov (2006) with the tanh units of Martens & Grosse (2015), but with dense
    initial weights: normal with variance 1/fan-in, biases zero.
    """
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(fan_in, fan_out))
        if index not in (3, 7):  # the code and the output are linear
            layers.append(nn.Tanh())
    return _normal_weights(nn.Sequential(*layers), seed)


def perceptron(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    """A multilayer perceptron with tanh units, weights normal with variance 1/fan-in, biases zero."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return _normal_weights(nn.Sequential(*layers[:-1]), seed)


def small_cnn(seed: int) -> nn.Sequential:
    """Two 5×5 convolutions (8 and 16 channels) with pooling, then 256-64-10; about 20,000 parameters."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    return _normal_weights(model, seed, gain=2**0.5)


def _normal_weights(model: nn.Sequential, seed: int, gain: float = 1.0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (gain / fan_in**0.5))
            else:
                parameter.zero_()
    return model


def correct(outputs: Float[Tensor, "n c"], targets: Tensor) -> Tensor:
    """1 where the most probable class is the target, else 0."""
    return (outputs.argmax(1) == targets).double()


# ---------------------------------------------------------------------------------------------- problems


def mnist() -> Problem:
    """An MLP 784-256-128-10 on 4,000 of the 5,000 real digits; the other 1,000 are held out."""
    train, test = data.split(*data.mnist_digits(), train=4000)
    return Problem(
        name="mnist",
        title="a 784-256-128-10 network classifies 4,000 MNIST digits",
        make_model=functools.partial(perceptron, (784, 256, 128, 10)),
        loss_fn=nn.CrossEntropyLoss(), train=train, test=test, unit="nats per image",
        batch_size=500, target=0.01, steps=200, scores={"accuracy": correct},
        rates={"sgd": 0.3, "adam": 1e-2, "adamw": 1e-2, "muon": 3e-2},
    )  # fmt: skip


def mnist_cnn() -> Problem:
    """A small convolutional network on the same digits."""
    train, test = data.split(*data.mnist_digits(), train=4000)
    return Problem(
        name="mnist-cnn",
        title="a small convolutional network classifies 4,000 MNIST digits",
        make_model=small_cnn,
        loss_fn=nn.CrossEntropyLoss(), train=train, test=test, unit="nats per image",
        batch_size=500, target=0.03, steps=150, scores={"accuracy": correct},
        rates={"sgd": 0.1, "adam": 1e-2, "adamw": 1e-2, "muon": 3e-2},
    )  # fmt: skip


def _autoencoder(
    name: str, title: str, images: Tensor, target: float, steps: int, rates: dict[str, float]
) -> Problem:
    # A mean over all elements times the number of pixels is a sum over pixels and a mean over images: the weight
    # makes the trained loss itself nats per image, so that λ has the scale that the literature quotes.
    pixels = float(images.shape[1])
    return Problem(
        name=name, title=title, make_model=autoencoder_784,
        loss_fn=nn.BCEWithLogitsLoss(weight=torch.tensor(pixels)), train=(images, images),
        unit="nats per image", floor=data.bernoulli_entropy(images),
        batch_size=1000, target=target, steps=steps, rates=rates,
    )  # fmt: skip


def mnist_autoencoder() -> Problem:
    """The deep autoencoder 784-1000-500-250-30 on all 5,000 real digits."""
    return _autoencoder(
        "mnist-autoencoder", "a deep autoencoder (784-1000-500-250-30 and back) on 5,000 MNIST digits",
        data.mnist_digits()[0], target=75.0, steps=100, rates={"sgd": 3e-3, "adam": 1e-3, "adamw": 1e-3, "muon": 3e-2},
    )  # fmt: skip


def curves_autoencoder() -> Problem:
    """The deep autoencoder on 20,000 generated images of smooth curves."""
    return _autoencoder(
        "curves-autoencoder", "a deep autoencoder (784-1000-500-250-30 and back) on 20,000 images of smooth curves",
        data.curve_images(), target=10.0, steps=200, rates={"sgd": 3e-3, "adam": 1e-3, "adamw": 1e-3, "muon": 1e-2},
    )  # fmt: skip


def digits() -> Problem:
    """A 64-64-10 network on scikit-learn's 8×8 digits: seconds, not minutes."""
    train, test = data.split(*data.small_digits(), train=1400)
    return Problem(
        name="digits",
        title="a 64-64-10 network classifies 1,400 digits of 8×8 pixels",
        make_model=functools.partial(perceptron, (64, 64, 10)),
        loss_fn=nn.CrossEntropyLoss(), train=train, test=test, unit="nats per image",
        batch_size=200, target=0.01, steps=300, scores={"accuracy": correct},
        rates={"sgd": 1.0, "adam": 3e-2, "adamw": 3e-2, "muon": 3e-2},
    )  # fmt: skip


def ill_conditioned_regression() -> Problem:
    """Linear least squares, 64 weights, Hessian of condition number 10⁶, float64, exact optimum known."""
    inputs, targets, optimum = data.ill_conditioned_data()

    def make_model(seed: int) -> nn.Module:
        model = nn.Linear(inputs.shape[1], 1, bias=False, dtype=torch.float64)
        return _normal_weights(nn.Sequential(model), seed)

    return Problem(
        name="ill-conditioned-regression",
        title="least squares with 64 weights and a condition number of 10⁶, in float64",
        make_model=make_model, loss_fn=nn.MSELoss(), train=(inputs, targets),
        unit="nats per observation", scale=0.5, floor=optimum,
        batch_size=len(inputs), target=1e-6, steps=500, evaluate_every=5,
        rates={"sgd": 1.0, "adam": 1.0, "adamw": 1.0, "muon": 0.3},
    )  # fmt: skip


REGISTRY: dict[str, Callable[[], Problem]] = {
    "mnist": mnist,
    "mnist-cnn": mnist_cnn,
    "mnist-autoencoder": mnist_autoencoder,
    "curves-autoencoder": curves_autoencoder,
    "digits": digits,
    "ill-conditioned-regression": ill_conditioned_regression,
}
STUDIES = ("two-coordinates",)  # raced along a flow rather than against peers: natgrad.lab.coordinates


def load_problem(name: str) -> Problem:
    """The problem of a name, or of ``module:factory`` (the current directory is importable).

    Raises:
        UnknownNameError: no problem has that name; offers the nearest ones.
        ConfigError: the module or factory can't be used; says why.
    """
    if ":" in name:
        made = call_factory(name)
        if not isinstance(made, Problem):
            raise ConfigError(f"{name} gave a {type(made).__name__}; it must give a natgrad.lab.Problem")
        return made
    if name not in REGISTRY:
        raise UnknownNameError("problem", name, [*REGISTRY, *STUDIES])
    return REGISTRY[name]()


def call_factory(path: str) -> object:
    """Imports ``module:attribute`` with the current directory on the path, and calls it if it can be called.

    Raises:
        ConfigError: the module can't be imported, has no such attribute, or the call failed. The message carries
            the cause and where in the user's file it arose.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{path!r} is not of the form module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.split(".")[0] == error.name.split(".")[0]:
            raise ConfigError(
                f"no module {module_name!r} in {here} or among the installed packages"
            ) from error
        raise ConfigError(f"importing {module_name} failed: {error}") from error
    except Exception as error:
        raise ConfigError(f"importing {module_name} failed: {_where(error)}") from error
    if not hasattr(module, attribute):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownNameError(f"function of {module_name}", attribute, names)
    found = getattr(module, attribute)
    if isinstance(found, (Problem, nn.Module)) or not callable(found):
        return found
    try:
        return found()
    except NatgradError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}() failed: {_where(error)}") from error


def _where(error: BaseException) -> str:
    """One line: the error, and the deepest frame of it (the user's own, most often)."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, SyntaxError):
        return text
    return f"{text} ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
