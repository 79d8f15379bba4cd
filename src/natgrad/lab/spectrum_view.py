"""What `natgrad fisher` prints, draws and saves."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from natgrad.errors import ConfigError
from natgrad.lab.extras import require
from natgrad.lab.figures import FAINT, styled
from natgrad.lab.formats import number
from natgrad.lab.spectrum import Spectrum

_SHOWN_VALUES, _SHOWN_LAYERS = 8, 12
_PICTURES = (".png", ".svg", ".pdf")


def require_writable(path: Path, what: str) -> None:
    """Sees that a file can be written, before hours are spent on what goes into it.

    Raises:
        ConfigError: its folder is not there or may not be written to, or it is a folder itself.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise ConfigError(f"{what} {path} is a folder; name a file in it")
    if not folder.is_dir():
        raise ConfigError(f"{what} {path} can't be written: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{what} {path} can't be written: permission denied")


def require_savable(path: Path, metric: str) -> None:
    """Sees that an operator of this representation can be saved there.

    Raises:
        ConfigError: it is known by its products alone, safetensors is not there, or as `require_writable`.
    """
    if metric == "matrixfree":
        raise ConfigError(
            "--save: an operator that is known by its products can't be saved; take --metric kfac or lowrank"
        )
    require_writable(path, "--save")
    require("safetensors", "saving operators")


def save_operator(spectrum: Spectrum, path: Path) -> None:
    """Writes F; `natgrad.load_operator` reads it.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        spectrum.operator.save(path)
    except OSError as error:
        raise ConfigError(f"--save {path} can't be written: {error.strerror or error}") from error


def require_picture(path: Path) -> None:
    """Sees that a picture of this name can be drawn.

    Raises:
        ConfigError: it ends on no picture's suffix, or as `require_writable`.
    """
    if path.suffix.lower() not in _PICTURES:
        raise ConfigError(f"--plot {path} must end in {', '.join(_PICTURES)}")
    require_writable(path, "--plot")
    require("matplotlib", "the plot")


def save_figure(spectrum: Spectrum, path: Path) -> None:
    """Draws the spectrum into a file.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        with styled():
            spectrum_figure(spectrum).savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path} can't be written: {error.strerror or error}") from error


def _panels() -> tuple[Any, tuple[Any, Any]]:
    figure = require("matplotlib.figure", "figures").Figure(figsize=(9.6, 4.0), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.06)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    return figure, (left, right)


def spectrum_figure(spectrum: Spectrum) -> Any:
    """Eigenvalues against their rank, both logarithmic, with λ as a line; and the layers' largest beside it."""
    figure, (left, right) = _panels()
    largest = float(spectrum.values[0])
    values = spectrum.values[spectrum.values > largest * torch.finfo(spectrum.operator.dtype).eps]
    ranks = torch.arange(1, len(values) + 1)
    left.plot(ranks, values, color="#D55E00", linewidth=2.2, marker="o" if len(values) < 40 else "", ms=4)
    left.set_xscale("log")
    left.set_yscale("log")
    left.axhline(spectrum.damping, color=FAINT, linewidth=0.9, dashes=(4, 3), zorder=1)
    left.annotate(
        f"λ = {number(spectrum.damping)}: effective dimension {number(spectrum.effective)}",
        (0.02, spectrum.damping), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points",
        fontsize=9, color=FAINT,
    )  # fmt: skip
    left.set_xlabel(f"rank of the eigenvalue, of {spectrum.parameters:,}")
    left.set_ylabel("eigenvalue, nats per parameter²")
    left.set_title(f"{spectrum.metric} Fisher information of {spectrum.title}")
    layers = spectrum.layers[:_SHOWN_LAYERS][::-1]
    bars = right.barh(
        [layer.name for layer in layers], [layer.largest for layer in layers], color="#0072B2", height=0.6
    )
    shares = [layer.trace / (spectrum.trace or 1.0) for layer in layers]
    right.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4, fontsize=9, color=FAINT)
    right.margins(x=0.14, y=0.5 / len(layers))
    right.set_xlabel("largest eigenvalue, nats per parameter²")
    right.grid(visible=False, axis="y")
    right.set_title("layers, with their shares of the trace")
    return figure


# ---------------------------------------------------------------------------------------------- as a table


def render(spectrum: Spectrum, width: int | None = None) -> str:
    """The report for a terminal of the given width (the terminal's own by default)."""
    console_of = require("rich.console", "the table")
    table_of = require("rich.table", "the table").Table
    box = require("rich.box", "the table")
    stream = io.StringIO()
    columns = width or shutil.get_terminal_size((110, 30)).columns
    console = console_of.Console(file=stream, width=columns, highlight=False)
    console.print(
        f"[bold]{spectrum.title}[/]: {spectrum.metric} ({spectrum.kind}) Fisher information of "
        f"{spectrum.parameters:,} parameters on {spectrum.examples:,} examples, in nats per parameter²",
        soft_wrap=True,
    )
    facts = table_of(box=None, show_header=False, padding=(0, 2))
    for name, value, meaning in _facts(spectrum):
        facts.add_row(name, value, f"[dim]{meaning}[/]")
    console.print(facts)
    top = [number(float(value)) for value in spectrum.values[:_SHOWN_VALUES]]
    console.print(f"  largest eigenvalues    {'  '.join(top)}\n", soft_wrap=True)
    table = table_of(box=box.SIMPLE_HEAD, title="layers, the hardest first", title_justify="left")
    table.add_column("layer")
    for heading in ("parameters", "share of trace", "trace per parameter", "largest eigenvalue"):
        table.add_column(heading, justify="right")
    for layer in spectrum.layers[:_SHOWN_LAYERS]:
        share = layer.trace / spectrum.trace if spectrum.trace else 0.0
        table.add_row(
            layer.name, f"{layer.parameters:,}", f"{share:.1%}", number(layer.trace / layer.parameters),
            number(layer.largest),
        )  # fmt: skip
    console.print(table)
    lines = list(spectrum.notes)
    if (more := len(spectrum.layers) - _SHOWN_LAYERS) > 0:
        lines.insert(0, f"{more} more layers, all of smaller eigenvalues.")
    if lines:
        console.print("\n".join(lines), soft_wrap=True)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _facts(spectrum: Spectrum) -> Iterator[tuple[str, str, str]]:
    yield "trace", _doubted(spectrum.trace, spectrum.trace_error), "Σ λᵢ"
    yield (
        "effective dimension", _doubted(spectrum.effective, spectrum.effective_error),
        f"Σ λᵢ / (λᵢ + λ) with λ = {number(spectrum.damping)}",
    )  # fmt: skip
    condition = spectrum.condition
    if condition is None:
        yield "condition number", "–", "λ_min is not known by products alone"
    elif math.isinf(condition):
        yield (
            "condition number",
            "∞",
            f"singular to rounding: rank {spectrum.rank:,} of {spectrum.parameters:,}",
        )
    else:
        yield "condition number", number(condition), "λ_max / λ_min"
    bound = "" if spectrum.complete else "≤ "
    yield "… with damping", f"{bound}{number(spectrum.damped_condition)}", "(λ_max + λ) / (λ_min + λ)"


def _doubted(value: float, error: float) -> str:
    return f"{number(value)} ± {number(error)}" if error else number(value)
