"""The Fisher information, measured against the packages that compute the same thing.

    python benchmarks/fisher.py              # all parts, about six minutes on two cores
    python benchmarks/fisher.py gram memory  # some: diagonal, product, kfac, ekfac, dense, gram, memory

Workloads: N = 512 examples in float32; a convolutional network on 28×28 images with 10 classes, an MLP 784-128-10, and
for dense matrices an MLP 64-32-10. natgrad and each peer take turns, so that noise hits all alike; what they return is
compared before anything is timed. Peers: `pip install --no-deps -r tests/peers/requirements.txt`. Results go to
benchmarks/results/fisher-<part>.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natgrad

RESULTS = Path(__file__).parent / "results"
N, REPEATS = 512, 7
PATIENCE = 10_000  # milliseconds, after which a task takes no further turn
LOSS = nn.CrossEntropyLoss
GOAL, TOLERANCE = 2.0, 1e-4
Task = Callable[[], Any]


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """About 40,000 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    return model, torch.randn(N, 1, 28, 28), torch.randint(10, (N,))


def mlp(*sizes: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(N, sizes[0]), torch.randint(sizes[-1], (N,))


def networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    return {"CNN": cnn(), "MLP": mlp(784, 128, 10)}


# --------------------------------------------------------------------------------------------------- parts


def diagonal() -> list[dict[str, Any]]:
    """The exact diagonal, against BackPACK's DiagGGNExact."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    rows = []
    for name, (model, x, y) in networks().items():
        theirs_model, theirs_loss = extend(copy.deepcopy(model)), extend(LOSS())

        def theirs(m: nn.Module = theirs_model, f: Any = theirs_loss, x: Tensor = x, y: Tensor = y) -> Tensor:
            m.zero_grad()
            with backpack(DiagGGNExact()):
                f(m(x), y).backward()
            return torch.cat([p.diag_ggn_exact.reshape(-1) for p in m.parameters()])

        def ours(m: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            return natgrad.fisher(m, LOSS(), (x, y), metric="diagonal", batch_size=N).diagonal()

        rows.append(_race(f"exact diagonal, {name}", ours, {"BackPACK": theirs}, _close(ours(), theirs())))
    return rows


def product() -> list[dict[str, Any]]:
    """Products with 1 and 10 vectors, against curvlinops' GGN; building our operator is counted apart, and with it."""
    from curvlinops import GGNLinearOperator

    rows = []
    for name, (model, x, y) in networks().items():
        size = sum(p.numel() for p in model.parameters())

        def theirs_build(m: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Any:
            return GGNLinearOperator(m, LOSS(), list(m.parameters()), [(x, y)], check_deterministic=False)

        def build(m: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Any:
            return natgrad.fisher(m, LOSS(), (x, y), metric="matrixfree", batch_size=N)

        F, theirs_F = build(), theirs_build()
        rows.append(_race(f"building, {name}", build, {"curvlinops": theirs_build}, None, goal=None))
        for count in (1, 10):
            V = torch.randn(size, count)
            rows.append(
                _race(
                    f"product with {count}, {name}",
                    lambda F=F, V=V: F @ V,
                    {"curvlinops": lambda T=theirs_F, V=V: T @ V},
                    _close(F @ V, theirs_F @ V),
                )
            )
            rows.append(
                _race(
                    f"building and product with {count}, {name}",
                    lambda build=build, V=V: build() @ V,
                    {"curvlinops": lambda build=theirs_build, V=V: build() @ V},
                    _close(build() @ V, theirs_build() @ V),
                    goal=None,
                )
            )
    return rows


def _factors(kind: str, ours_metric: str, operator: str) -> list[dict[str, Any]]:
    import curvlinops

    rows = []
    for name, (model, x, y) in networks().items():
        options = {
            "check_deterministic": False,
            "fisher_type": "type-2" if kind == "exact" else "mc",
            "separate_weight_and_bias": False,
        }

        def theirs(m: nn.Module = model, x: Tensor = x, y: Tensor = y, options: Any = options) -> Any:
            F = getattr(curvlinops, operator)(m, LOSS(), list(m.parameters()), [(x, y)], **options)
            return F, F.trace  # it computes its factors when they are first asked for

        def ours(m: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Any:
            F = natgrad.fisher(m, LOSS(), (x, y), metric=ours_metric, kind=kind, batch_size=N)
            return F, F.trace()

        peers: dict[str, Task] = {"curvlinops": theirs}
        if ours_metric == "kfac":
            peers["BackPACK"] = _backpack_factors(model, x, y, kind)
        error = None  # other samples
        if kind == "exact":
            (F, trace), (theirs_F, theirs_trace) = ours(), theirs()
            V = torch.randn(F.shape[0], 3)
            # EKFAC's bases are free where a factor has equal eigenvalues, such as zeros; its trace is not
            error = _close(F @ V, theirs_F @ V) if ours_metric == "kfac" else _close(trace, theirs_trace)
        rows.append(_race(f"{ours_metric.upper()} {kind}, {name}", ours, peers, error))
    return rows


def _backpack_factors(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> Task:
    from backpack import backpack, extend
    from backpack.extensions import KFAC, KFLR

    extended, loss = extend(copy.deepcopy(model)), extend(LOSS())

    def run() -> None:
        extended.zero_grad()
        with backpack(KFLR() if kind == "exact" else KFAC()):
            loss(extended(x), y).backward()

    return run


def kfac() -> list[dict[str, Any]]:
    """K-FAC's factors, against curvlinops and BackPACK (KFLR and KFAC)."""
    return _factors("exact", "kfac", "KFACLinearOperator") + _factors("mc", "kfac", "KFACLinearOperator")


def ekfac() -> list[dict[str, Any]]:
    """EKFAC, against curvlinops."""
    return _factors("exact", "ekfac", "EKFACLinearOperator") + _factors("mc", "ekfac", "EKFACLinearOperator")


def dense() -> list[dict[str, Any]]:
    """The whole matrix of a small MLP, against torch.func and nngeometry."""
    from nngeometry.metrics import FIM
    from nngeometry.object.pspace import PMatDense
    from torch.utils.data import DataLoader, TensorDataset

    model, x, y = mlp(64, 32, 10)

    def theirs() -> Tensor:
        J = torch.cat(_jacobians(model, x), dim=2)
        p = model(x).detach().softmax(1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("ncp,ncq->pq", J, torch.einsum("ncd,ndq->ncq", H, J)) / len(x)

    def ours() -> Tensor:
        return natgrad.fisher(model, LOSS(), (x, y), metric="dense", batch_size=N).to_dense()

    def nngeometry() -> Tensor:
        loader = DataLoader(TensorDataset(x, y), batch_size=N)
        return FIM(model, loader, PMatDense, variant="classif_logits").to_torch()

    assert _close(nngeometry(), theirs()) < TOLERANCE
    peers = {"torch.func": theirs, "nngeometry": nngeometry}
    return [_race("dense, MLP 64-32-10", ours, peers, _close(ours(), theirs()))]


def gram() -> list[dict[str, Any]]:
    """The N·C × N·C Gram matrix of a Gaussian likelihood, against torch.func and nngeometry."""
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    rows = []
    for name, (model, x, _) in networks().items():
        target = torch.zeros(len(x), 10)

        def theirs(m: nn.Module = model, x: Tensor = x) -> Tensor:
            # a parameter at a time, as in torch's tutorial on tangent kernels: J is never concatenated
            return sum(J.flatten(0, 1) @ J.flatten(0, 1).T for J in _jacobians(m, x))

        def ours(m: nn.Module = model, x: Tensor = x, t: Tensor = target) -> Tensor:
            return natgrad.fisher(m, nn.MSELoss(reduction="sum"), (x, t), metric="gram", batch_size=N).kernel

        def nngeometry(m: nn.Module = model, x: Tensor = x, t: Tensor = target) -> Any:
            loader = DataLoader(TensorDataset(x, t), batch_size=N)
            collection = LayerCollection.from_model(m)
            return GramMatrix(m, loader, lambda *d: m(d[0]), layer_collection=collection).to_torch()

        # both have rows class by class; the squared error's information in the outputs is 2
        expected = theirs().reshape(len(x), 10, len(x), 10).permute(1, 0, 3, 2)
        assert _close(nngeometry(), expected) < TOLERANCE
        error = _close(ours().reshape(expected.shape) / 2, expected)
        del expected
        rows.append(_race(f"Gram, {name}", ours, {"torch.func": theirs, "nngeometry": nngeometry}, error))
    return rows


def memory() -> list[dict[str, Any]]:
    """Peak memory above that of a forward and backward pass, as N grows."""
    rows = []
    for what in ("diagonal", "gram"):
        megabytes = {n: round(_peak_apart(what, n) - _peak_apart("nothing", n), 1) for n in (256, 512, 1024)}
        model, _, _ = mlp(784, 128, 10)
        size = sum(p.numel() for p in model.parameters())
        jacobian = {count: round(count * 10 * size * 4 / 2**20) for count in megabytes}
        rows.append({"what": f"{what}, MLP", "megabytes": megabytes, "jacobian_megabytes": jacobian})
        say(f"{what}: " + "  ".join(f"N={n}: {m} MB (J {jacobian[n]} MB)" for n, m in megabytes.items()))
    return rows


def _peak_apart(what: str, count: int) -> float:
    command = [sys.executable, __file__, "--peak", what, str(count)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(what: str, count: int) -> float:
    """Megabytes."""
    model, x, y = mlp(784, 128, 10)
    x, y = x.repeat(2, 1)[:count], y.repeat(2)[:count]
    LOSS()(model(x), y).backward()
    if what != "nothing":
        F = natgrad.fisher(model, LOSS(), (x, y), metric=what, batch_size=count)
        assert F.diagonal().sum() > 0 if what == "diagonal" else F.kernel.trace() > 0
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# ------------------------------------------------------------------------------------------------- helpers


def _jacobians(model: nn.Module, x: Tensor) -> list[Tensor]:
    """∂z/∂p [N, C, size] of each parameter p by torch.func."""
    from torch.func import functional_call, jacrev, vmap

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(jacrev(lambda p, one: functional_call(model, p, (one[None],))[0]), (None, 0))(parameters, x)
    return [J.flatten(2) for J in found.values()]


def _close(ours: Tensor, theirs: Tensor) -> float:
    """The relative difference in norm."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    return float((ours - theirs).norm() / theirs.norm())


def _race(
    what: str, ours: Task, peers: dict[str, Task], error: float | None, goal: float | None = GOAL
) -> dict[str, Any]:
    """Medians over turns, milliseconds. `error` is how far results are apart; None where they can't be compared."""
    assert error is None or error < TOLERANCE, f"{what}: the results differ by {error:.1e}"
    tasks = {"natgrad": ours, **peers}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(1 if error is not None else 0, REPEATS + 1):  # what was compared ran before
        for name, task in tasks.items():
            if sum(times[name]) > PATIENCE:
                continue
            start = time.perf_counter()
            task()
            if turn:  # the first run allocates
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min((m, name) for name, m in medians.items() if name != "natgrad")
    ratio = fastest[0] / medians["natgrad"]
    say(f"  {what} …")
    return {
        "what": what,
        "milliseconds": medians,
        "fastest_peer": fastest[1],
        "ratio": ratio,
        "goal": goal,
        "difference": error,
        "times": times,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table where rich is installed, lines elsewhere."""
    cells = [("", "natgrad, ms", "peers, ms", "ratio", "goal", "results differ by")]
    for row in rows:
        ms, goal = dict(row["milliseconds"]), row["goal"]
        own = f"{ms.pop('natgrad'):.1f}"
        peers = "  ".join(f"{name} {value:.1f}" for name, value in ms.items())
        verdict = "" if goal is None else f"{goal:g}×: {'reached' if row['ratio'] >= goal else 'missed'}"
        differ = "not compared" if row["difference"] is None else f"{row['difference']:.0e}"
        cells.append((row["what"], own, peers, f"{row['ratio']:.2f}×", verdict, differ))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in cells:
            say("   ".join(line))
        return
    table = Table(*cells[0])
    for line in cells[1:]:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def say(line: str) -> None:
    print(line, flush=True)


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "diagonal": diagonal,
    "product": product,
    "kfac": kfac,
    "ekfac": ekfac,
    "dense": dense,
    "gram": gram,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak[0], int(arguments.peak[1])))
        return
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}")
    warnings.filterwarnings("ignore")
    RESULTS.mkdir(exist_ok=True)
    for part in arguments.parts or PARTS:
        say(f"── {part}")
        environment = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        }
        rows = PARTS[part]()
        if part != "memory":
            show(rows)
        result = {"environment": environment | {"date": time.strftime("%Y-%m-%d")}, "result": rows}
        (RESULTS / f"fisher-{part}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
