"""A run that is saved and restored in a new process goes on to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.optim.runs import METRICS, MODES, Run, batches, net

ROOT = Path(__file__).parents[2]


def saved(run: Run) -> dict:
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("steps", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_the_next_steps_in_a_new_process_are_the_same(mode: str, steps: int, tmp_path: Path) -> None:
    """One process restores them all: starting it takes the most time."""
    ends = {}
    for metric in METRICS:
        run = Run.of(metric, mode, net(dropout=0.2))
        run.train(batches(7))
        torch.save(saved(run), tmp_path / f"{metric}.pt")
        ends[metric] = run.train(batches(steps, 12, seed=7)), run.optimizer.damping
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), mode, str(steps)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    dampings = json.loads(done.stdout)
    for metric, (end, damping) in ends.items():
        assert torch.equal(torch.load(tmp_path / f"{metric}.end.pt"), end), metric
        assert dampings[metric] == damping, metric


def restore(folder: Path, mode: str, steps: int) -> None:
    torch.set_num_threads(1)
    dampings = {}
    for metric in METRICS:
        run = Run.of(metric, mode, net(dropout=0.2, seed=5), seed=3)
        state = torch.load(folder / f"{metric}.pt", weights_only=True)
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        torch.save(run.train(batches(steps, 12, seed=7)), folder / f"{metric}.end.pt")
        dampings[metric] = run.optimizer.damping
    print(json.dumps(dampings))


if __name__ == "__main__":
    restore(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
