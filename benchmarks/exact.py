"""The exact natural gradient on residuals: the Gram matrix, and equations solved to many digits.

    python benchmarks/exact.py               # all parts, about 25 minutes on two cores
    python benchmarks/exact.py gram growth   # some: gram, memory, taylor, poisson2, sources, poisson5, growth

float64. Seconds are those of the optimiser's steps; errors are measured on other points, with the clock stopped. The
goals, and what peers reach, are issue 4's. Results go to benchmarks/results/exact-<part>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from natgrad import pde
from natgrad.operators import Gram, rowgram
from natgrad.optim.linearised import Linearised

RESULTS = Path(__file__).parent / "results"
REPEATS = 3
PI = math.pi
Row = dict[str, Any]


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def gram_of(model: nn.Module, closure: Callable[[], Tensor], rows: int) -> Tensor:
    """K of one linearisation: what a step does before it solves."""
    with torch.no_grad():
        return linearised(model, closure, rows).kernel


def linearised(model: nn.Module, closure: Callable[[], Tensor], rows: int) -> Gram:
    """The operator of a step."""
    optimizer = natgrad.NaturalGradient(model, metric="gram", lr=1.0)
    with torch.no_grad(), optimizer._watcher.paused():
        problem = Linearised(
            closure,
            optimizer.likelihood,
            optimizer._members,
            optimizer.param_groups,
            optimizer._curvature,
            0,
            {(("residuals", (rows, 1)),)},  # the check against autograd is made once a run, not once a step
        )
        assert isinstance(problem.operator, Gram)
        return problem.operator


def seconds(task: Callable[[], Any]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------- parts


def gram() -> list[Row]:
    """K of an MLP, against vmap(grad) and then J Jᵀ."""
    model, x = mlp(20, 240, 240, 220, 1), torch.randn(3000, 20)

    def ours() -> Tensor:
        return gram_of(model, lambda: model(x)[:, 0], 3000)

    def explicit() -> Tensor:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def one(values: dict[str, Tensor], point: Tensor) -> Tensor:
            return torch.func.functional_call(model, values, (point[None],))[0, 0]

        rows = torch.func.vmap(torch.func.grad(one), (None, 0))(parameters, x)
        J = torch.cat([r.flatten(1) for r in rows.values()], 1) / len(x) ** 0.5
        return J @ J.mT

    K, other = ours(), explicit()
    difference = float((K - other).norm() / other.norm())
    assert difference < 1e-12, difference
    times = [(seconds(ours), seconds(explicit)) for _ in range(REPEATS)]
    own, theirs = (statistics.median(t) for t in zip(*times, strict=True))
    return [
        {
            "what": f"Gram, N = 3,000, P = {count(model):,}",
            "seconds": own,
            "explicit": theirs,
            "ratio": theirs / own,
            "goal": 60.0,
            "difference": difference,
            "times": times,
        }
    ]


def memory() -> list[Row]:
    """The peak of a process that solves one step of P = 1.2 million at N = 2,000; of one that only builds the model."""
    peaks = {
        what: float(
            subprocess.run(
                [sys.executable, __file__, "--peak", what], capture_output=True, text=True, check=True
            ).stdout
        )
        for what in ("nothing", "step")
    }
    return [
        {
            "what": "one step, N = 2,000, P = 1,248,821",
            "megabytes": peaks["step"],
            "before": peaks["nothing"],
            "goal": 1024.0,
        }
    ]


def peak(what: str) -> float:
    """Megabytes."""
    model, x = mlp(20, 700, 700, 700, 360, 1), torch.randn(2000, 20)
    if what == "step":
        natgrad.NaturalGradient(model, metric="gram", lr=0.1, damping=1e-3).step(
            lambda: model(x)[:, 0] - x[:, 0]
        )
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def taylor() -> list[Row]:
    """K with a Laplacian inside: the orders that natgrad chose by counting, against one order for every layer.

    Layers' Jacobians are formed whole and multiplied with their transposes, as others do it; "half" is natgrad's own
    way of doing that, in chunks and at half of the multiplications.
    """
    rows = []
    for sizes, n in (
        ((2, 700, 700, 700, 380, 1), 1000),
        ((2, 200, 200, 200, 1), 1000),
        ((5, 64, 64, 48, 48, 1), 1000),
    ):
        model, x = mlp(*sizes), torch.rand(n, sizes[0])

        def ours(model: nn.Module = model, x: Tensor = x) -> Tensor:
            return gram_of(model, lambda: pde.laplacian(model, x)[:, 0], len(x))

        def plain(model: nn.Module = model, x: Tensor = x) -> Tensor:
            return _plain(model, lambda: pde.laplacian(model, x)[:, 0], len(x))

        choices: dict[str, Callable[[], Any]] = {"natgrad": ours, "layers' Jacobians": plain}
        for name, pairs in (("layers' Jacobians, half", False), ("pairs of positions", True)):
            choices[name] = lambda pairs=pairs: _forced(pairs, ours)
        K = ours()
        differences = {name: float((task() - K).norm() / K.norm()) for name, task in choices.items()}
        times: dict[str, list[float]] = {name: [] for name in choices}
        for _ in range(REPEATS):
            for name, task in choices.items():
                times[name].append(seconds(task))
        medians = {name: statistics.median(t) for name, t in times.items()}
        others = [t for name, t in medians.items() if name != "natgrad"]
        rows.append(
            {
                "what": f"Laplacian, {'-'.join(map(str, sizes))}, N = {n:,}, P = {count(model):,}",
                "seconds": medians,
                "ratio": medians["layers' Jacobians"] / medians["natgrad"],
                "against the better": min(others) / medians["natgrad"],
                "goal": 20.0 if count(model) > 1e6 else None,
                "difference": max(differences.values()),
                "times": times,
            }
        )
    return rows


def _plain(model: nn.Module, closure: Callable[[], Tensor], rows: int) -> Tensor:
    """K as a sum over layers of the layer's Jacobian times its transpose, each formed whole."""
    operator = linearised(model, closure, rows)
    (batch,) = operator.rows.batches
    total = torch.zeros(rows, rows)
    for layer in batch.layers:
        for part in layer.explicit(slice(None)):
            assert part is not None
            total += part.flatten(1) @ part.flatten(1).mT
    return total * batch.scale**2


def _forced(pairs: bool, task: Callable[[], Tensor]) -> Tensor:
    chosen = rowgram._pairs_are_cheaper
    rowgram._pairs_are_cheaper = lambda entries, rows: pairs  # type: ignore[assignment]
    try:
        return task()
    finally:
        rowgram._pairs_are_cheaper = chosen


def square() -> tuple[Tensor, Tensor]:
    """900 points inside the unit square and 120 on its edges."""
    inner = (torch.arange(30) + 0.5) / 30
    t, zero = torch.linspace(0, 1, 30), torch.zeros(30)
    edges = [torch.stack(pair, 1) for pair in ((t, zero), (t, zero + 1), (zero, t), (zero + 1, t))]
    return torch.cartesian_prod(inner, inner), torch.cat(edges)


def sines(coefficients: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """u = Σ a_ij sin(iπx) sin(jπy), and −Δu."""
    i = torch.arange(1, len(coefficients) + 1)
    weights = coefficients * (i[:, None] ** 2 + i**2) * PI**2

    def series(a: Tensor, x: Tensor) -> Tensor:
        first, second = (torch.sin(PI * x[:, k : k + 1] * i) for k in (0, 1))
        return ((first @ a) * second).sum(1, keepdim=True)

    return (lambda x: series(coefficients, x)), (lambda x: series(weights, x))


@contextmanager
def _stopwatch(spent: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    spent[0] += time.perf_counter() - start


def solve2(seed: int, width: int, coefficients: Tensor, limit: float, stop: float) -> Row:
    """Poisson's equation on the square; when each error was reached."""
    (x, edge), (u, f) = square(), sines(coefficients)
    elsewhere = torch.rand(9000, 2, generator=torch.Generator().manual_seed(99))
    truth, source = u(elsewhere), f(x)
    model = mlp(2, width, 1, seed=seed)
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    spent, reached, steps, error = [0.0], {}, 0, math.inf
    while spent[0] < limit and error > stop and not optimizer.info.stalled:
        with _stopwatch(spent):
            optimizer.step(lambda: {"interior": pde.laplacian(model, x) + source, "boundary": model(edge)})
        steps += 1
        with torch.no_grad():
            error = float((model(elsewhere) - truth).norm() / truth.norm())
        for level in (1e-3, 1e-5, 1e-7, 1e-9):
            if error <= level:
                reached.setdefault(f"{level:.0e}", {"seconds": spent[0], "steps": steps})
    return {
        "seed": seed,
        "width": width,
        "error": error,
        "seconds": spent[0],
        "steps": steps,
        "reached": reached,
    }


def warm_up() -> None:
    solve2(100, 16, torch.ones(1, 1), 0.5, 0.0)


def poisson2() -> list[Row]:
    """u = sin πx sin πy, MLP 2-64-1, ten seeds."""
    warm_up()
    return [solve2(seed, 64, torch.ones(1, 1), 20.0, 1e-9) for seed in range(10)]


def sources() -> list[Row]:
    """Five random right-hand sides of four sines each, widths 32, 64 and 128, nothing changed."""
    warm_up()
    rows = []
    for k, width in itertools.product(range(5), (32, 64, 128)):
        a = torch.randn(2, 2, generator=torch.Generator().manual_seed(1000 + k))
        rows.append(solve2(k, width, a, 30.0, 1e-7) | {"source": k})
    return rows


def poisson5() -> list[Row]:
    """u = Σ cos πxₖ in five dimensions, MLP 5-64-64-48-48-1, 800 + 200 points drawn anew in each step."""
    rows = []
    for seed in range(3):
        source = torch.Generator().manual_seed(500 + seed)
        model = mlp(5, 64, 64, 48, 48, 1, seed=seed)
        optimizer = natgrad.NaturalGradient(model, metric="exact")
        elsewhere = torch.rand(10_000, 5, generator=source)
        truth = _cosines(elsewhere)
        spent, steps, errors = [0.0], 0, {}
        while spent[0] < 120:
            x, edge = torch.rand(800, 5, generator=source), torch.rand(200, 5, generator=source)
            face = torch.randint(5, (200,), generator=source)
            edge[torch.arange(200), face] = torch.randint(2, (200,), generator=source).to(edge.dtype)
            with _stopwatch(spent):
                optimizer.step(
                    lambda x=x, edge=edge, model=model: {
                        "interior": pde.laplacian(model, x) + PI**2 * _cosines(x),
                        "boundary": model(edge) - _cosines(edge),
                    }
                )
            steps += 1
            with torch.no_grad():
                error = float((model(elsewhere) - truth).norm() / truth.norm())
            for mark in (15, 30, 60, 90, 120):
                if spent[0] >= mark:
                    errors.setdefault(str(mark), error)
        rows.append({"seed": seed, "errors": errors, "steps": steps, "seconds": spent[0]})
        say(f"  seed {seed}: " + ", ".join(f"{e:.1e} after {s} s" for s, e in errors.items()))
    return rows


def _cosines(x: Tensor) -> Tensor:
    return torch.cos(PI * x).sum(1, keepdim=True)


def growth() -> list[Row]:
    """Seconds of a step against P at N = 500, and against N at P of about 50,000."""
    rows = []
    for width in (24, 48, 96, 192, 384, 700):
        rows.append(_one_step(width, 500) | {"axis": "P"})
    for n in (125, 250, 500, 1000, 2000, 4000):
        rows.append(_one_step(155, n) | {"axis": "N"})
    for axis, key in (("P", "parameters"), ("N", "rows")):
        points = [r for r in rows if r["axis"] == axis][-4:]
        slope = _slope([r[key] for r in points], [r["seconds"] for r in points])
        say(f"  seconds grow as {key}^{slope:.2f} over the last four points")
        rows.append({"axis": axis, "slope": slope})
    draw(rows)
    return rows


def _one_step(width: int, n: int) -> Row:
    model, x = mlp(10, width, width, width, 1), torch.randn(n, 10)
    optimizer = natgrad.NaturalGradient(model, metric="gram", lr=0.1, damping=1e-3)

    def step() -> None:
        optimizer.step(lambda: model(x)[:, 0] - x[:, 0])

    step()
    return {
        "parameters": count(model),
        "rows": n,
        "seconds": statistics.median(seconds(step) for _ in range(5)),
    }


def _slope(x: list[float], y: list[float]) -> float:
    a, b = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


def draw(rows: list[Row]) -> None:
    """docs/images/exact-growth.png, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label, place in (
        ("P", "parameters", "parameters P, at N = 500 points", axes[0]),
        ("N", "rows", "points N, at P = 50,221", axes[1]),
    ):
        points = [r for r in rows if r["axis"] == axis and "seconds" in r]
        slope = next(r["slope"] for r in rows if r["axis"] == axis and "slope" in r)
        place.loglog([r[key] for r in points], [r["seconds"] for r in points], "o-", color="#1f6f8b")
        place.set(
            xlabel=label, ylabel="seconds of a step", title=f"slope of the last four points: {slope:.2f}"
        )
        ticks = [r[key] for r in points][1 :: 2 if axis == "N" else 1]
        place.set_xticks(ticks, [f"{t:,}" if t < 1e4 else f"{t / 1e3:,.0f} k" for t in ticks], minor=False)
        place.set_xticks([], minor=True)
        place.grid(True, which="both", alpha=0.2)
    target = Path(__file__).parent.parent / "docs" / "images" / "exact-growth.png"
    figure.savefig(target, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------- helpers


def say(line: str) -> None:
    print(line, flush=True)


def describe(row: Row) -> str:
    """One line."""
    if "reached" in row:
        marks = ", ".join(
            f"{k} in {v['seconds']:.2f} s ({v['steps']} steps)" for k, v in row["reached"].items()
        )
        who = f"source {row['source']}, width {row['width']}" if "source" in row else f"seed {row['seed']}"
        return f"  {who}: {marks}; ends at {row['error']:.1e} after {row['seconds']:.1f} s"
    return "  " + ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key != "times"
    )


PARTS: dict[str, Callable[[], list[Row]]] = {
    "gram": gram,
    "memory": memory,
    "taylor": taylor,
    "poisson2": poisson2,
    "sources": sources,
    "poisson5": poisson5,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    if arguments.peak:
        print(peak(arguments.peak))
        return
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}")
    RESULTS.mkdir(exist_ok=True)
    for part in arguments.parts or PARTS:
        say(f"── {part}")
        rows = PARTS[part]()
        for row in rows:
            say(describe(row))
        environment = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        (RESULTS / f"exact-{part}.json").write_text(
            json.dumps({"environment": environment, "result": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
