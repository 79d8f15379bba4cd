"""The problems by name, and how a user's own is found.

Your own problem is a function that returns a `natgrad.lab.Problem`: ``natgrad race my_module:my_problem``.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, NatgradError, UnknownNameError
from natgrad.lab import cartpole, data, equations, fitting, ising
from natgrad.lab.networks import (
    CharTransformer,
    ResNet,
    VisionTransformer,
    autoencoder_784,
    normal_weights,
    perceptron,
    small_cnn,
)
from natgrad.lab.problem import Problem, Task, correct


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
        return normal_weights(nn.Sequential(model), seed)

    return Problem(
        name="ill-conditioned-regression",
        title="least squares with 64 weights and a condition number of 10⁶, in float64",
        make_model=make_model, loss_fn=nn.MSELoss(), train=(inputs, targets),
        unit="nats per observation", scale=0.5, floor=optimum,
        batch_size=len(inputs), target=1e-6, steps=500, evaluate_every=5,
        rates={"sgd": 1.0, "adam": 1.0, "adamw": 1.0, "muon": 0.3},
    )  # fmt: skip


def fashion_cnn() -> Problem:
    """A convolutional network on the 60,000 images of Fashion-MNIST (Debian's dataset-fashion-mnist)."""
    train, test = data.fashion_mnist()
    return Problem(
        name="fashion-cnn",
        title="a convolutional network classifies the 60,000 images of Fashion-MNIST",
        make_model=functools.partial(small_cnn, channels=(16, 32)),
        loss_fn=nn.CrossEntropyLoss(), train=train, test=test, unit="nats per image",
        batch_size=250, judged=10_000, target=0.35, steps=480, evaluate_every=80, scores={"accuracy": correct},
        schedule=True,
    )  # fmt: skip


def resnet() -> Problem:
    """A residual net of 20 layers with BatchNorm on 4,000 MNIST digits."""
    train, test = data.split(*data.mnist_digits(), train=4000)
    return Problem(
        name="resnet",
        title="a residual net of 20 layers with BatchNorm classifies 4,000 MNIST digits",
        make_model=lambda seed: ResNet(side=28, stride=2),
        loss_fn=nn.CrossEntropyLoss(), train=train, test=test, unit="nats per image",
        batch_size=100, target=0.03, steps=200, evaluate_every=20, scores={"accuracy": correct}, schedule=True,
    )  # fmt: skip


def vit() -> Problem:
    """A small vision transformer, four layers, on 4,000 MNIST digits."""
    train, test = data.split(*data.mnist_digits(), train=4000)
    return Problem(
        name="vit",
        title="a vision transformer of four layers classifies 4,000 MNIST digits",
        make_model=lambda seed: VisionTransformer(side=28, patch=7),
        loss_fn=nn.CrossEntropyLoss(), train=train, test=test, unit="nats per image",
        batch_size=100, target=0.2, steps=400, evaluate_every=40, scores={"accuracy": correct}, schedule=True,
    )  # fmt: skip


def chars() -> Problem:
    """A causal transformer of four layers on 1 MB of Shakespeare, character by character."""
    train, test, alphabet = data.plays(context=64)
    return Problem(
        name="chars",
        title="a transformer of four layers reads 1 MB of Shakespeare, character by character",
        make_model=lambda seed: CharTransformer(len(alphabet), context=64),
        loss_fn=nn.CrossEntropyLoss(), train=train, test=test, unit="nats per character",
        batch_size=32, judged=500, target=2.3, steps=400, evaluate_every=40, scores={"accuracy": correct},
        schedule=True,
    )  # fmt: skip


def tabular() -> Problem:
    """A perceptron with two hidden layers on scikit-learn's breast-cancer data."""
    train, test = data.split(*data.breast_cancer(), train=450)
    return Problem(
        name="tabular",
        title="a 30-64-64-2 network diagnoses 450 tumours",
        make_model=functools.partial(perceptron, (30, 64, 64, 2)),
        loss_fn=nn.CrossEntropyLoss(), train=train, test=test, unit="nats per patient",
        batch_size=90, target=0.05, steps=60, evaluate_every=5, scores={"accuracy": correct}, schedule=True,
    )  # fmt: skip


REGISTRY: dict[str, Callable[[], Task]] = {
    "mnist": mnist,
    "mnist-cnn": mnist_cnn,
    "mnist-autoencoder": mnist_autoencoder,
    "curves-autoencoder": curves_autoencoder,
    "digits": digits,
    "ill-conditioned-regression": ill_conditioned_regression,
    "fashion-cnn": fashion_cnn,
    "resnet": resnet,
    "vit": vit,
    "chars": chars,
    "tabular": tabular,
    "poisson-2d": equations.poisson_2d,
    "poisson-5d": equations.poisson_5d,
    "heat": equations.heat,
    "helmholtz": equations.helmholtz,
    "misra1a": fitting.nist_misra1a,
    "boxbod": fitting.nist_boxbod,
    "thurber": fitting.nist_thurber,
    "mgh09": fitting.nist_mgh09,
    "mgh10": fitting.nist_mgh10,
    "linear-gaussian": fitting.linear_gaussian,
    "ising": ising.ising,
    "cartpole": cartpole.cartpole,
}
STUDIES = ("two-coordinates",)  # raced along a flow rather than against peers: natgrad.lab.coordinates


def load_problem(name: str) -> Task:
    """The problem of a name, or of ``module:factory`` (the current directory is importable).

    Raises:
        UnknownNameError: no problem has that name; offers the nearest ones.
        ConfigError: the module or factory can't be used; says why.
    """
    if ":" in name:
        made = call_factory(name)
        if not isinstance(made, Task):
            raise ConfigError(
                f"{name} gave a {type(made).__name__}; it must give a natgrad.lab.Problem or ResidualProblem"
            )
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
    if isinstance(found, (Task, nn.Module)) or not callable(found):
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
