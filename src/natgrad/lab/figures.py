"""The report's figures, drawn with matplotlib and without its global state.

Colours are Okabe & Ito's, which stay apart under every common colour blindness; each optimiser also has its own dash,
so that a grey print can be read. natgrad is drawn last and thickest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from natgrad.lab.extras import require
from natgrad.lab.formats import number, power
from natgrad.lab.runs import Record
from natgrad.lab.standings import Curve, Standing
from natgrad.lab.study import Study
from natgrad.lab.summary import Summary, measure, titled

Figure = Any  # matplotlib.figure.Figure: not imported until something is drawn
Axes = Any

INK, FAINT, GRID = "#1f2328", "#6b7280", "#e4e4df"
_OURS = "#D55E00"
_THEIRS = {
    "Adam": "#0072B2", "SGD": "#009E73", "Muon": "#CC79A7", "AdamW": "#56B4E9", "RMSprop": "#E69F00",
    "NAdam": "#7A7A7A", "SGD, Nesterov": "#007A5A", "SOAP": "#9A6B00", "L-BFGS, 20 a step": "#555555",
}  # fmt: skip
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.4)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (3, 1.2)),
    (0, (8, 2)),
)
_STYLE = {
    "font.size": 10.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#9a9a94",
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.labelsize": 10.5,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5,
    "xtick.major.size": 3, "ytick.major.size": 3, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.fontsize": 9.5, "legend.handlelength": 2.4,
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "lines.solid_capstyle": "round", "svg.fonttype": "none", "axes.unicode_minus": True,
}  # fmt: skip


@contextmanager
def styled() -> Iterator[None]:
    """The lab's look, for as long as something is drawn or saved."""
    with require("matplotlib", "figures").rc_context(_STYLE):
        yield


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = require("matplotlib.figure", "figures").Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.06)
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    return figure, list(axes)


def looks(summary: Summary) -> dict[str, tuple[str, Any]]:
    """Label → colour and dash. An optimiser has its colour in every report; dashes tell variants of one apart."""
    chosen: dict[str, tuple[str, Any]] = {}
    ours = theirs = 0
    for standing in summary.standings:
        if standing.ours:
            chosen[standing.label] = (_OURS, _DASHES[ours % len(_DASHES)])
            ours += 1
        else:
            theirs += 1
            colour = _THEIRS.get(standing.label.partition(" @")[0], "#444444")
            chosen[standing.label] = (colour, _DASHES[theirs % len(_DASHES)])
    return chosen


def excess_figure(summary: Summary, quantity: str) -> Figure:
    """Excess (logarithmic) against ``"step"`` or ``"seconds"``: medians over seeds, with their range as a band."""
    race, style = summary.race, looks(summary)
    figure, (axes,) = _figure(5.6, 4.0)
    drawn = []
    for standing in reversed(summary.standings):
        curve = standing.against(quantity)
        colour, dash = style[standing.label]
        drawn.append(_line(axes, curve, colour, dash, standing, race.get("logarithmic", True)))
    _scale(axes, race)
    axes.set_xlabel("steps" if quantity == "step" else "seconds of training")
    axes.set_ylabel(_axis(race, "excess training loss"))
    target = race.get("target")
    if target is not None:
        axes.axhline(target, color=FAINT, linewidth=0.9, dashes=(4, 3), zorder=1)
        above = not race.get("logarithmic", True)  # below there is zero, close by
        axes.annotate(
            f"target {number(target)}", (0.995, target), xycoords=("axes fraction", "data"),
            xytext=(0, 3 if above else -3), textcoords="offset points", ha="right",
            va="bottom" if above else "top", fontsize=9, color=FAINT,
        )  # fmt: skip
        key = "steps" if quantity == "step" else "seconds"
        for standing in summary.standings:
            spread = getattr(standing, key)
            if spread is not None and math.isfinite(spread.median):
                axes.plot(
                    spread.median,
                    target,
                    "o",
                    color=style[standing.label][0],
                    ms=5.5,
                    mec="white",
                    mew=1,
                    zorder=9,
                )
    axes.set_xlim(left=0)
    _legend(axes, drawn[::-1])
    return figure


def _axis(race: Record, excess: str) -> str:
    return f"{excess}, {race['unit']}" if measure(race) == "excess" else titled(race, ", ")


def _scale(axes: Axes, race: Record) -> None:
    """Logarithmic, or from zero."""
    if race.get("logarithmic", True):
        axes.set_yscale("log")
        _plain_decades(axes)
    else:
        axes.set_ylim(bottom=0)


def _line(axes: Axes, curve: Curve, colour: str, dash: Any, standing: Standing, logarithmic: bool) -> Any:
    # a log axis has no room for others
    shown = [i for i, y in enumerate(curve.median) if math.isfinite(y) and (y > 0 or not logarithmic)]
    x = [curve.x[i] for i in shown]
    floor = min((curve.median[i] for i in shown), default=1.0)
    if len(standing.runs) > 1:
        low = [max(curve.low[i], floor * 0.1) for i in shown]
        axes.fill_between(x, low, [curve.high[i] for i in shown], color=colour, alpha=0.16, linewidth=0)
    rate = "" if standing.rate is None or "@" in standing.label else f", rate {standing.rate:g}"
    (line,) = axes.plot(
        x, [curve.median[i] for i in shown], color=colour, linestyle=dash, linewidth=2.6 if standing.ours else 1.8,
        label=f"{standing.label}{rate}",
    )  # fmt: skip
    return line


def _legend(axes: Axes, handles: list[Any]) -> None:
    """Above the axes, in as many columns as fit: a legend over the curves hides what it names."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = min(len(handles), 3 if longest <= 17 else 2)
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.3,
        columnspacing=1.6,
    )  # fmt: skip


def _plain_decades(axes: Axes) -> None:
    """Where the axis spans little, 20, 30, 50 say more than 10¹ and 10²."""
    ticker = require("matplotlib.ticker", "figures")
    low, high = axes.get_ylim()
    if high / low < 3000 and low >= 1e-3:
        subs = (1.0, 2.0, 3.0, 5.0) if high / low < 60 else (1.0, 3.0) if high / low < 600 else (1.0,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def adaptation_figure(summary: Summary) -> Figure | None:
    """What natgrad chose: damping λ, step size α with momentum μ, and the reduction ratio ρ over the steps."""
    ours = next((s for s in summary.standings if s.ours and s.trace("damping") is not None), None)
    if ours is None:
        return None
    colour = looks(summary)[ours.label][0]
    panels: list[tuple[str, list[tuple[str, str, str]], bool]] = [
        ("damping λ", [("damping", colour, "")], True),
        ("step α, momentum μ", [("alpha", colour, "α"), ("momentum", "#0072B2", "μ")], False),
        ("reduction ratio ρ", [("rho", colour, "")], False),
    ]
    traces = {key: ours.trace(key) for _, lines, _ in panels for key, _, _ in lines}
    panels = [p for p in panels if any(traces[key] is not None for key, _, _ in p[1])]
    figure, axes = _figure(3.6 * len(panels) + 0.4, 3.1, len(panels))
    for ax, (title, lines, logarithmic) in zip(axes, panels, strict=True):
        for key, shade, sign in lines:
            curve = traces[key]
            if curve is None:
                continue
            if len(ours.runs) > 1:
                ax.fill_between(curve.x, curve.low, curve.high, color=shade, alpha=0.16, linewidth=0)
            ax.plot(
                curve.x,
                curve.median,
                color=shade,
                linewidth=1.5,
                label=sign,
                marker="." if key == "rho" else "",
                ms=4,
            )
        if logarithmic and min(traces[lines[0][0]].low) > 0:  # type: ignore[union-attr]
            ax.set_yscale("log")
            _plain_decades(ax)
        if title.startswith("reduction"):
            _bounded(ax, traces["rho"], told=not summary.race.get("settings"))
        if len([key for key, _, _ in lines if traces[key] is not None]) > 1:
            ax.legend(loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=2, borderaxespad=0.2)
        ax.set_title(title)
        ax.set_xlabel("steps")
    return figure


def _bounded(axes: Axes, curve: Curve | None, told: bool) -> None:
    """ρ near 1 is what matters: a wild value must not flatten the rest. ¼ and ¾ are the rule's thresholds, if told."""
    assert curve is not None
    if told:
        axes.axhspan(0.25, 0.75, color=GRID, alpha=0.55, linewidth=0, zorder=0)
        axes.annotate(
            "λ stays", (0.99, 0.5), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=8.5,
            color=FAINT,
        )  # fmt: skip
    axes.set_ylim(max(-0.5, min(*curve.median, 0.0) - 0.1), min(2.0, max(*curve.median, 1.0) + 0.15))


def tuning_figure(summary: Summary) -> Figure | None:
    """The excess that each learning rate of a grid ended with on the first seed; natgrad, without one, as a line."""
    tuned = [s for s in summary.standings if s.trials]
    if not tuned:
        return None
    style = looks(summary)
    figure, (axes,) = _figure(5.6, 3.6)
    handles = []
    least = 0.0 if summary.race.get("logarithmic", True) else -math.inf  # a log axis has no room for others
    worst = max((v for s in tuned for v in s.trials.values() if math.isfinite(v)), default=1.0)
    for standing in tuned:
        colour, dash = style[standing.label]
        rates = sorted(standing.trials)
        kept = [r for r in rates if math.isfinite(standing.trials[r]) and standing.trials[r] > least]
        (line,) = axes.plot(kept, [standing.trials[r] for r in kept], color=colour, linestyle=dash, marker="o", ms=4.5,
                            linewidth=1.6, label=standing.label)  # fmt: skip
        handles.append(line)
        lost = [r for r in rates if not math.isfinite(standing.trials[r])]
        axes.plot(lost, [worst] * len(lost), "x", color=colour, ms=7, mew=1.8)
    for standing in summary.standings:
        if standing.ours and standing.rate is None and standing.excess.median > least:
            colour, dash = style[standing.label]
            handles.insert(0, axes.axhline(standing.excess.median, color=colour, linestyle=dash, linewidth=2.4,
                                           label=f"{standing.label}, no rate"))  # fmt: skip
    axes.set_xscale("log")
    _scale(axes, summary.race)
    axes.set_xlabel("learning rate (× marks a run that diverged)")
    axes.set_ylabel(_axis(summary.race, "excess") + " at the end")
    _legend(axes, handles)
    return figure


def paths_figure(study: Study) -> Figure:
    """Gradient descent's and the natural gradient's paths from two parametrisations, over the loss contours."""
    figure, axes = _figure(10.4, 4.9, 2, sharex=True, sharey=True)
    chart, optimum = study.chart, study.optimum
    assert chart is not None, "only a model with two parameters can be drawn"
    assert optimum is not None, "a chart has its optimum"
    for ax, method, title in (
        (axes[0], study.gradient, "gradient descent"),
        (axes[1], study.natural, "natural gradient"),
    ):
        levels = _levels(chart.loss)
        ax.contourf(chart.x, chart.y, chart.loss, levels=levels, cmap=_paper(), extend="both", zorder=0)
        ax.contour(chart.x, chart.y, chart.loss, levels=levels, colors="#b9b4a6", linewidths=0.6, zorder=1)
        first, second = study.coordinates
        (solid,) = ax.plot(
            *_xy(method.first), color="#0072B2", linewidth=4.2, alpha=0.55, label=f"in {first}", zorder=3
        )
        (dashed,) = ax.plot(
            *_xy(method.second),
            color="#D55E00",
            linewidth=1.7,
            linestyle=(0, (4, 2)),
            label=f"in {second}",
            zorder=4,
        )
        ax.plot(*method.first[0], "o", color=INK, ms=5.5, zorder=6)
        ax.plot(*optimum, "*", color=INK, ms=12, mec="white", mew=0.8, zorder=6)
        ax.set_title(title, pad=26)
        ax.legend(
            handles=[solid, dashed], loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, borderaxespad=0.2
        )
        ax.set_xlabel(study.axes[0])
        ax.grid(False)
        ax.set_xlim(chart.x[0], chart.x[-1])
        ax.set_ylim(chart.y[0], chart.y[-1])
        ax.annotate(
            f"farthest apart: {_apart(method.distance)} {study.distance_unit}", (0.975, 0.03), xycoords="axes fraction",
            ha="right", va="bottom", fontsize=9.5,
            bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "none", "alpha": 0.85},
        )  # fmt: skip
    axes[0].set_ylabel(study.axes[1])
    return figure


def _apart(distance: float) -> str:
    return number(distance) if distance >= 1e-3 or distance == 0 else power(distance)


def _xy(path: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [p[0] for p in path], [p[1] for p in path]


def _levels(loss: list[list[float]]) -> list[float]:
    """Levels spaced in the square root above the minimum: even steps towards a quadratic bottom."""
    values = sorted(v for row in loss for v in row)
    low, high = values[0], values[int(0.97 * (len(values) - 1))]
    return [low + (high - low) * ((i + 0.5) / 14) ** 2 for i in range(15)]


def _paper() -> Any:
    colours = require("matplotlib.colors", "figures")
    return colours.LinearSegmentedColormap.from_list("paper", ["#fdfcf8", "#f3efe4", "#e3dccb"])
