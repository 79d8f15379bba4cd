"""The main job, measured: a deep autoencoder on curves-like images (see docs/benchmarks.md).

    python benchmarks/curves.py            # everything but kfac-jax, about a quarter of an hour on two cores
    python benchmarks/curves.py steptime   # one part: convergence, steptime, seconds, memory, jax

Every ratio is taken side by side in one run. Results go to benchmarks/results/curves-<part>.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab.problems import load_problem

RESULTS = Path(__file__).parent / "results"
BATCH = 1000
PROBLEM = load_problem("curves-autoencoder")
IMAGES = PROBLEM.train[0]


class Run:
    """One optimiser on the problem: the same initial weights and batches for every run of a seed."""

    def __init__(self, make: Callable[[nn.Module, nn.Module], torch.optim.Optimizer], seed: int = 0) -> None:
        self.model, self.loss = PROBLEM.build(seed), PROBLEM.loss_fn
        self.optimizer = make(self.model, self.loss)
        self.batches = batches(seed)
        self.steps, self.seconds = 0, 0.0

    def step(self) -> float:
        x = next(self.batches)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model(x), x).backward()
        self.optimizer.step()
        taken = time.perf_counter() - start
        self.steps, self.seconds = self.steps + 1, self.seconds + taken
        return taken

    @torch.no_grad()
    def excess(self, images: int = 5000) -> float:
        parts = IMAGES[:images].split(BATCH)
        return sum(float(self.loss(self.model(x), x)) for x in parts) / len(parts) - PROBLEM.floor


def batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        for index in torch.randperm(len(IMAGES), generator=generator).split(BATCH):
            yield IMAGES[index]


def sgd(model: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def adaptive(initial: float | None = None) -> Callable[[nn.Module, nn.Module], torch.optim.Optimizer]:
    damping = None if initial is None else natgrad.LevenbergMarquardt(initial=initial)
    return lambda model, loss: natgrad.NaturalGradient(model, loss, damping=damping)


def fixed(model: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    return natgrad.NaturalGradient(
        model, loss, metric=natgrad.KFAC(factors=10, inverses=20), lr=1e-3, momentum=0.9, damping=1.0
    )


def adam(lr: float) -> Callable[[nn.Module, nn.Module], torch.optim.Optimizer]:
    return lambda model, loss: torch.optim.Adam(model.parameters(), lr=lr)


def convergence() -> dict[str, Any]:
    """Excess at steps 10 to 200, for three initial dampings and three seeds; nothing else differs."""
    rows = []
    for initial, seed in ((1.0, 0), (0.1, 0), (10.0, 0), (1.0, 1), (1.0, 2)):
        run, excess = Run(adaptive(initial), seed), {}
        while run.steps < 200:
            run.step()
            if run.steps in (10, 25, 50, 75, 100, 125, 150, 175, 200):
                excess[run.steps] = round(run.excess(len(IMAGES)), 3)
        rows.append({"initial_damping": initial, "seed": seed, "excess": excess, "seconds": run.seconds})
        say(f"initial λ {initial:<4} seed {seed}: " + "  ".join(f"{k}: {v:.2f}" for k, v in excess.items()))
    return {"rows": rows, "goal": {"100": 6.5, "200": 2.5}}


def steptime(steps: int = 150, block: int = 10) -> dict[str, Any]:
    """Seconds of a step against SGD with momentum: blocks of steps take turns, so that noise hits all alike."""
    runs = {"sgd": Run(sgd), "adaptive": Run(adaptive()), "fixed": Run(fixed)}
    ratios: dict[str, list[float]] = {"adaptive": [], "fixed": []}
    blocks: dict[str, list[float]] = {name: [] for name in runs}
    runs["sgd"].step()  # the first step allocates
    for _ in range(steps // block):
        for name, run in runs.items():
            blocks[name].append(sum(run.step() for _ in range(block)) / block)
        for name in ratios:
            ratios[name].append(blocks[name][-1] / blocks["sgd"][-1])
    result: dict[str, Any] = {
        "steps": steps,
        "sgd_milliseconds": 1e3 * statistics.median(blocks["sgd"]),
        "goal": {"adaptive": 2.0, "fixed": 1.6},
    }
    for name, values in ratios.items():
        # The first blocks are dear by design, so they count; a block that the machine stalled in, for either side, is
        # set to the median, since a stall of seconds says nothing of an optimiser.
        middle = statistics.median(values)
        calm = [v if k < 3 or 0.5 * middle < v < 2 * middle else middle for k, v in enumerate(values)]
        result[name] = {"amortised": statistics.mean(calm), "median_of_blocks": middle, "blocks": values}
        say(
            f"{name}: {statistics.mean(calm):.2f}× SGD amortised over {steps} steps, median of blocks {middle:.2f}×"
        )
    return result


def seconds(limit: float = 130.0) -> dict[str, Any]:
    """Seconds of training to an excess of 25 and of 10 nats, natgrad against Adam's grid."""
    makers = {"natgrad": adaptive()} | {f"adam {lr:g}": adam(lr) for lr in (3e-4, 1e-3, 3e-3)}
    reached: dict[str, dict[str, float | None]] = {}
    for name, make in makers.items():
        run = Run(make)
        seen: dict[str, float | None] = {"25": None, "10": None, "steps to 25": None, "steps to 10": None}
        every = 1 if name == "natgrad" else 10
        while run.seconds < limit and seen["10"] is None:
            run.step()
            if run.steps % every == 0:
                excess = run.excess(2000)
                for target in ("25", "10"):
                    if seen[target] is None and excess <= float(target):
                        seen[target], seen[f"steps to {target}"] = run.seconds, run.steps
        reached[name] = seen
        say(
            f"{name}: "
            + "  ".join(f"{k}: {'not reached' if v is None else f'{v:.1f}'}" for k, v in seen.items())
        )
    result: dict[str, Any] = {"reached": reached, "limit": limit, "goal": {"25": 0.25, "10": 1 / 6}}
    for target in ("25", "10"):
        peers = [r[target] for name, r in reached.items() if name != "natgrad" and r[target] is not None]
        own = reached["natgrad"][target]
        if own is None:
            say(f"to {target} nats: natgrad did not get there in {limit:g} s")
            continue
        ratio = own / min(peers, default=limit)
        result[f"ratio to {target}"] = {"value": ratio, "bound": not peers}
        say(f"to {target} nats: {'at most ' if not peers else ''}{ratio:.3f} of the best Adam's seconds")
    return result


def memory(steps: int = 30) -> dict[str, Any]:
    """Peak resident memory of a whole process, in MB; each optimiser in its own."""
    result: dict[str, Any] = {"goal": 1.6}
    for name in ("sgd", "natgrad"):
        output = subprocess.run(
            [sys.executable, __file__, "--peak", name, "--steps", str(steps)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        result[name] = float(output.split()[-1])
    result["ratio"] = result["natgrad"] / result["sgd"]
    say(
        f"peak memory: natgrad {result['natgrad']:.0f} MB, SGD {result['sgd']:.0f} MB, {result['ratio']:.2f}×"
    )
    return result


def peak(name: str, steps: int) -> float:
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # making the images takes more than training: forget that peak
    run = Run(sgd if name == "sgd" else adaptive())
    for _ in range(steps):
        run.step()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def say(line: str) -> None:
    print(line, flush=True)


def environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "entropy": PROBLEM.floor,
        "date": time.strftime("%Y-%m-%d"),
    }


def export(path: Path) -> None:
    """Images and initial weights for benchmarks/kfac_jax_curves.py."""
    import numpy as np

    arrays: dict[str, Any] = {"images": IMAGES.numpy(), "floor": PROBLEM.floor}
    layers = [layer for layer in PROBLEM.build(0) if isinstance(layer, nn.Linear)]
    for k, layer in enumerate(layers):
        arrays[f"w{k}"], arrays[f"b{k}"] = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    np.savez(path, **arrays)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "steptime": steptime,
    "convergence": convergence,
    "seconds": seconds,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--export", type=Path, help="write images and initial weights to this .npz file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=30, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak, arguments.steps))
        return
    if arguments.export:
        export(arguments.export)
        return
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}")
    RESULTS.mkdir(exist_ok=True)
    for part in arguments.parts or PARTS:
        say(f"── {part}")
        result = {"environment": environment(), "result": PARTS[part]()}
        path = RESULTS / f"curves-{part}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        say(f"   → {path}")


if __name__ == "__main__":
    main()
