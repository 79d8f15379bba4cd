"""The folder of a race on disk: one folder a run, readable by people and by `natgrad report`.

    FOLDER/race.json                     problem, optimisers in order, target, what was left out and why
    FOLDER/runs/adam-lr0.001-seed0/
        config.json                      everything that decides the run's result
        environment.json                 python, torch, threads, cpu, natgrad's version and git commit
        metrics.jsonl                    one JSON object a line, flushed as it goes
        checkpoint.pt                    while the run is unfinished
        result.json                      once it is finished: its presence is what "finished" means

Lines of metrics.jsonl have ``"kind": "step"`` (batch loss, seconds, and λ, α, μ, ρ of natgrad) or ``"kind":
"evaluation"`` (loss and excess on the whole training set, scores on the test set). Seconds count training only.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from natgrad.errors import RunError

Record = dict[str, Any]


class RunFolder:
    """Writes one run. Opening it finds out whether the run is new, unfinished or finished.

    Args:
        path: the run's folder; made if missing.
        config: what decides the run's result, as plain JSON values.

    Raises:
        RunError: the folder can't be written, or holds a run of another configuration.
    """

    def __init__(self, path: Path, config: Record) -> None:
        self.path, self.config = path, config
        self._stream: TextIO | None = None
        _guard(path, lambda: path.mkdir(parents=True, exist_ok=True))
        stored = read_json(path / "config.json")
        if stored is None:
            write_json(path / "config.json", config)
        elif stored != json.loads(json.dumps(config)):
            differ = [
                k for k in {**stored, **config} if stored.get(k) != json.loads(json.dumps(config.get(k)))
            ]
            told = ", ".join(f"{k}: {stored.get(k)!r} there, {config.get(k)!r} now" for k in differ[:3])
            raise RunError(f"{path} holds a run of another configuration ({told}); choose another --folder")

    @property
    def result(self) -> Record | None:
        """What the run came to, or None while it is unfinished. A failed run counts as unfinished."""
        result = read_json(self.path / "result.json")
        return None if result is None or result.get("status") == "failed" else result

    def begin(self, checkpoint: Record | None) -> None:
        """Opens the metrics for writing: afresh, or from where the checkpoint was taken."""
        write_json(self.path / "environment.json", environment())
        path = self.path / "metrics.jsonl"

        def opened() -> TextIO:
            if checkpoint is None:
                return open(path, "w", encoding="utf-8")
            os.truncate(path, checkpoint["offset"])
            return open(path, "a", encoding="utf-8")

        self._stream = _guard(path, opened)

    def append(self, record: Record) -> None:
        """Writes one line and flushes it."""
        stream = self._stream
        assert stream is not None, "begin() comes first"

        def write() -> None:
            stream.write(json.dumps(_finite(record)) + "\n")
            stream.flush()

        _guard(self.path, write)

    def save_checkpoint(self, state: Record) -> None:
        """Keeps what is needed to go on, and how long the metrics were then. Written aside, then moved."""
        assert self._stream is not None, "begin() comes first"
        state = {**state, "offset": self._stream.tell()}
        aside = self.path / "checkpoint.tmp"

        def write() -> None:
            torch.save(state, aside)
            os.replace(aside, self.path / "checkpoint.pt")

        _guard(self.path, write)

    def load_checkpoint(self) -> Record | None:
        """The last checkpoint, or None where there is none that can be read (the run then starts again)."""
        path = self.path / "checkpoint.pt"
        if not path.exists() or not (self.path / "metrics.jsonl").exists():
            return None
        try:
            state: Record = torch.load(path, weights_only=True)
            return state if (self.path / "metrics.jsonl").stat().st_size >= state["offset"] else None
        except Exception:  # torn, of another torch, or with a state that only code could rebuild
            return None

    def finish(self, result: Record) -> None:
        """Writes the result and drops the checkpoint."""
        self.close()
        write_json(self.path / "result.json", result)
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the metrics."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


@dataclass(frozen=True)
class Run:
    """One run as read back from its folder."""

    path: Path
    config: Record
    environment: Record
    steps: list[Record] = field(repr=False)
    evaluations: list[Record] = field(repr=False)
    result: Record | None

    @property
    def status(self) -> str:
        """``"finished"``, ``"diverged"``, ``"failed"`` or ``"unfinished"``."""
        return "unfinished" if self.result is None else str(self.result["status"])


def read_race(folder: Path) -> tuple[Record, list[Run]]:
    """The race's own record and its runs, in the order of their names.

    Raises:
        RunError: the folder isn't there or holds no race.
    """
    race = read_json(folder / "race.json")
    if race is None:
        what = "holds no race" if folder.is_dir() else "is not there"
        raise RunError(f"{folder} {what} (no race.json); run `natgrad race PROBLEM --folder {folder}` first")
    runs = []
    for path in sorted((folder / "runs").glob("*/config.json")):
        run = path.parent
        lines = _read_lines(run / "metrics.jsonl")
        runs.append(
            Run(
                path=run,
                config=read_json(path) or {},
                environment=read_json(run / "environment.json") or {},
                steps=[r for r in lines if r.get("kind") == "step"],
                evaluations=[r for r in lines if r.get("kind") == "evaluation"],
                result=read_json(run / "result.json"),
            )
        )
    return race, runs


def write_json(path: Path, value: Record) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
        RunError: the place can't be written.
    """
    aside = path.with_suffix(".tmp")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(_finite(value), indent=2) + "\n", encoding="utf-8")
        os.replace(aside, path)

    _guard(path, write)


def environment() -> Record:
    """What the numbers depend on besides the configuration."""
    try:
        from natgrad import __version__ as version
    except ImportError:
        version = "unknown"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "platform": platform.platform(),
        "natgrad": version,
        "commit": _commit(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of natgrad's source, ``+changes`` if the tree is not clean; None for an installed package."""
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if (
        git("ls-files", "--error-unmatch", "runs.py") is None
    ):  # inside some other repository's virtual environment
        return None
    commit = git("rev-parse", "--short=12", "HEAD")
    return (
        commit
        if commit is None or not git("status", "--porcelain", "--", str(source.parent))
        else f"{commit}+changes"
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes a string, so that every reader can parse the file."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def read_json(path: Path) -> Record | None:
    """A JSON object, or None where there is no such file.

    Raises:
        RunError: the file is there but can't be read.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} can't be read: it holds no JSON object")
    return value


def _read_lines(path: Path) -> list[Record]:
    """The records of a JSON-lines file; a last line cut off by an interruption is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}, is no JSON: {error}") from error
    return records


def _guard(path: Path, action: Any) -> Any:
    """Runs an action on the disk; an OSError becomes a RunError that names the place."""
    try:
        return action()
    except OSError as error:
        raise RunError(
            f"{path} can't be written: {error.strerror or error}; choose another --folder"
        ) from error
