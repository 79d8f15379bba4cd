"""`natgrad report FOLDER`: one self-contained page about a race, and each of its figures as a PNG beside it.

The page needs nothing but itself: styles and figures (SVG) are inside, no script, no font and no image is fetched.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natgrad.errors import RunError
from natgrad.lab import figures
from natgrad.lab.formats import listed, number, power
from natgrad.lab.runs import Record, read_json, read_race
from natgrad.lab.study import Study, studies_from
from natgrad.lab.summary import Summary, measure, noun, summarise, table, titled


@dataclass(frozen=True)
class Plate:
    """A figure with its place on the page."""

    name: str
    heading: str
    caption: str
    figure: Any
    wide: bool = False


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` and the PNGs into a race's folder.

    Returns:
        The page's path.

    Raises:
        RunError: the folder holds no race, nothing was evaluated yet, or it can't be written.
        ConfigError: matplotlib is missing.
    """
    with figures.styled():
        if (folder / "coordinates.json").exists():
            page = _coordinates_page(folder)
        else:
            page = _race_page(folder)
        path = folder / "report.html"
        try:
            path.write_text(page, encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path} can't be written: {error.strerror or error}") from error
    return path


# ------------------------------------------------------------------------------------------------- a race


def _race_page(folder: Path) -> str:
    summary = summarise(*read_race(folder))
    race = summary.race
    seeds = len(race["seeds"])
    bands = f"Median of {seeds} seeds; the band is their range." if seeds > 1 else "One seed."
    target = "" if race.get("target") is None else " Dots mark where the target was reached."
    excess = measure(race) == "excess"
    what = "Loss" if excess else noun(race).capitalize()
    told = "Excess over the least possible loss" if excess else titled(race)
    plates = [
        Plate("loss-vs-seconds", f"{what} against seconds",
              f"{told}. The clock runs while an optimiser trains. {bands}{target}",
              figures.excess_figure(summary, "seconds")),
        Plate("loss-vs-steps", f"{what} against steps",
              f"The same runs, counted in steps of {race['batch_size']:,} {_things(race)}. {bands}{target}",
              figures.excess_figure(summary, "step")),
    ]  # fmt: skip
    adaptation = figures.adaptation_figure(summary)
    if adaptation is not None:
        given = race.get("settings")
        rule = (
            f"with {listed(given)}" if given else "and μ the momentum that minimise the local quadratic model"
        )
        plates.append(
            Plate("adaptation", "The steps that natgrad took" if given else "What natgrad chose for itself",
                  f"λ is the damping in (F + λI)⁻¹, α the step size {rule}, ρ the actual decrease over the one that "
                  "the model predicted.",
                  adaptation, wide=True)
        )  # fmt: skip
    tuning = figures.tuning_figure(summary)
    if tuning is not None:
        plates.append(
            Plate("tuning", "What tuning brought the peers",
                  "Every peer tried a grid of learning rates on the first seed and raced with its best; "
                  "natgrad has none.",
                  tuning)
        )  # fmt: skip
    body = [
        f"<header><p class=kicker>natgrad race · {_text(race['problem'])}</p>",
        f"<h1>{_text(summary.headline)}</h1>",
        f"<p class=lede>{_text(_setting(summary))}</p></header>",
        _table(summary),
        f"<ul class=remarks>{''.join(f'<li>{_text(r)}</li>' for r in summary.remarks)}</ul>",
        _plates(folder, plates),
        _method(summary),
        _environment(summary.standings[0].runs[0].environment, folder),
    ]
    return _page(f"{race['problem']}: a natgrad race", body)


def _setting(summary: Summary) -> str:
    race = summary.race
    title = race["title"][0].upper() + race["title"][1:]
    span = f"{race['steps']:,} steps" if race["steps"] else f"{race['seconds']:g} seconds of training"
    seeds = len(race["seeds"])
    taken = (
        f"batches of {race['batch_size']:,} out of {race['examples']:,}"
        if measure(race) == "excess"
        else f"{race['batch_size']:,} {_things(race)} a step"
    )
    return (
        f"{title}: {race['parameters']:,} parameters, {taken}, "
        f"{span} a run, {seeds} seed{'s' if seeds > 1 else ''}."
    )


def _things(race: Record) -> str:
    return str(race.get("things", "examples" if measure(race) == "excess" else "residuals"))


def _table(summary: Summary) -> str:
    heads, rows = table(summary)
    target = summary.race.get("target")
    race = summary.race
    caption = titled(race) + ("" if target is None else f"; target {number(target)}")
    if len(summary.race["seeds"]) > 1:
        caption += "; medians over seeds, ranges in brackets"
    head = "".join(f"<th scope=col>{_text(h)}</th>" for h in heads)
    body = ""
    for standing, row in zip(summary.standings, rows, strict=True):
        colour = figures.looks(summary)[standing.label][0]
        first = f'<th scope=row><i style="background:{colour}"></i>{_text(row[0])}</th>'
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])
        body += f"<tr{' class=ours' if standing.ours else ''}>{first}{cells}</tr>"
    return (
        f"<div class=scroll><table><caption>{_text(caption)}.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A range over seeds goes on a line of its own, or the table outgrows the page."""
    return re.sub(r"( \(.*\))$", r"<small>\1</small>", _text(text))


def _method(summary: Summary) -> str:
    race = summary.race
    told = (
        "Excess is the loss on the training set less the least value it can take "
        f"({number(race['floor'])} {_text(race['unit'])} here)."
        if measure(race) == "excess"
        else f"What is measured is the {_text(measure(race))}, against "
        f"{_text(race.get('yardstick', 'the known solution'))}."
    )
    average = "natgrad’s adaptive steps are judged at the average of iterates that the optimiser keeps. "
    average = "" if race.get("settings") else average
    same = (
        f"draws its {_text(_things(race))} from its own model by the same random numbers"
        if race.get("sampled")
        else "sees the same batches in the same order"
    )
    if race.get("schedule"):
        told += " Peers’ rates rise over the first twentieth of a run and fall to zero along a cosine."
    return (
        "<section class=notes><h2>How it was measured</h2><p>For each seed every optimiser starts from the same "
        f"weights and {same}. Seconds count forward pass, backward pass and step, not "
        f"evaluation. {average}"
        f"{told} Times to target are interpolated between evaluations; "
        "“÷ best peer” divides by the best of all peers in that column, so below 1 is better than every peer, and "
        "&lt; or &gt; give the bound that is known where one side did not reach the target.</p></section>"
    )


# ---------------------------------------------------------------------------------------- two coordinates


def _coordinates_page(folder: Path) -> str:
    record = read_json(folder / "coordinates.json")
    if record is None:
        raise RunError(f"{folder} holds no study; run `natgrad race two-coordinates` first")
    studies = studies_from(record)
    plates = [
        Plate(f"paths-{study.name}", study.title, study.note, figures.paths_figure(study), wide=True)
        for study in studies
        if study.chart is not None
    ]
    worst = min(s.gradient.distance / max(s.natural.distance, 1e-300) for s in studies)
    held = worst > 1e3
    headline = (
        "Written in other coordinates, gradient descent takes another path. The natural gradient takes the same one."
        if held
        else "The natural gradient’s paths did not coincide here: something is wrong."
    )
    body = [
        "<header><p class=kicker>natgrad · two coordinates</p>",
        f"<h1>{headline}</h1>",
        "<p class=lede>One model, two ways of writing its parameters, one starting point. Where the paths end up must "
        "not depend on how the model was written down; the table says how far they part.</p></header>",
        _distances(studies),
        _plates(folder, plates),
        "<section class=notes><h2>Why</h2><p>The derivative of the loss is a covector: it says how much the loss "
        "changes per unit of each coordinate, so it changes when the units do. Gradient descent steps along it as if "
        "it were a direction. The Fisher information F measures how far apart two settings of the parameters are as "
        "<em>distributions</em>, whatever they are called; F⁻¹∇L is the steepest direction in that distance, and so a "
        "fact about the model. Distances between Gaussians are Fisher–Rao distances; between networks, the root mean "
        "square difference of their predictions on the data.</p></section>",
        _environment(read_json(folder / "environment.json") or {}, folder),
    ]
    return _page("two-coordinates: natgrad", body)


def distance_table(studies: Sequence[Study]) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of text: how far the paths part."""
    heads = ["model", "coordinates", "gradient descent", "natural gradient", "measured as"]
    rows = [
        [s.title, f"{s.coordinates[0]} and {s.coordinates[1]}", number(s.gradient.distance), power(s.natural.distance),
         s.distance_unit.strip("()")]
        for s in studies
    ]  # fmt: skip
    return heads, rows


def _distances(studies: Sequence[Study]) -> str:
    heads, rows = distance_table(studies)
    head = "".join(f"<th scope=col>{_text(h)}</th>" for h in heads)
    body = "".join(
        f"<tr><th scope=row>{_text(r[0])}</th>{''.join(f'<td>{_text(c)}</td>' for c in r[1:])}</tr>"
        for r in rows
    )
    return (
        "<div class=scroll><table class=words><caption>Greatest distance between the two paths.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# ----------------------------------------------------------------------------------------------- the page


def _plates(folder: Path, plates: Sequence[Plate]) -> str:
    parts = []
    for plate in plates:
        png = folder / f"{plate.name}.png"
        try:
            plate.figure.savefig(png, dpi=180)
        except OSError as error:
            raise RunError(f"{png} can't be written: {error.strerror or error}") from error
        parts.append(
            f"<figure{' class=wide' if plate.wide else ''} id={plate.name}><figcaption><h2>{_text(plate.heading)}</h2>"
            f"<p>{_text(plate.caption)}</p></figcaption>{_svg(plate)}</figure>"
        )
    return f"<div class=plates>{''.join(parts)}</div>"


def _svg(plate: Plate) -> str:
    """The figure as an inline SVG whose text is text, in the page's own font."""
    stream = io.StringIO()
    plate.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # ids are unique in a figure only, and the page has several
    text = re.sub(r'(id="|url\(#|href="#)', lambda m: f"{m[1]}{plate.name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font:([^;\"]*?)'[^;\"]*(?=[;\"])", r"font:\1var(--sans)", text)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{_text(plate.heading)}" viewBox="0 0 {width} {height}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)


def _environment(environment: Record, folder: Path) -> str:
    facts = [
        ("processor", environment.get("cpu")), ("threads", environment.get("threads")),
        ("torch", environment.get("torch")), ("python", environment.get("python")),
        ("natgrad", environment.get("natgrad")), ("commit", environment.get("commit")),
        ("started", environment.get("started")), ("folder", folder),
    ]  # fmt: skip
    told = "".join(f"<div><dt>{k}</dt><dd>{_text(str(v))}</dd></div>" for k, v in facts if v is not None)
    return f"<footer><dl>{told}</dl></footer>"


def _text(text: str) -> str:
    return html.escape(str(text))


def _page(title: str, body: Sequence[str]) -> str:
    return (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_CSS}</style>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


_CSS = """
:root { --ink: #1f2328; --faint: #62666d; --rule: #dcdad3; --paper: #fbfaf7; --card: #fff; --accent: #b34a00;
  --sans: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, Charter, "Source Serif 4", Georgia, serif; }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 56px 28px 40px }
.kicker { margin: 0 0 10px; color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: .04em }
h1 { margin: 0; max-width: 26em; font: 600 clamp(26px, 3.6vw, 38px)/1.22 var(--serif); letter-spacing: -.01em;
  text-wrap: balance }
.lede { margin: 16px 0 0; max-width: 46em; color: var(--faint); font-size: 17px }
.scroll { overflow-x: auto; margin: 36px 0 0 }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums lining-nums; font-size: 15px }
caption { caption-side: bottom; text-align: left; padding-top: 8px; color: var(--faint); font-size: 13.5px }
th, td { padding: 9px 12px; text-align: right; white-space: nowrap; font-weight: 400; vertical-align: top }
th:first-child, td:first-child { text-align: left; padding-left: 8px }
td small { display: block; color: var(--faint); font-size: 12.5px; font-weight: 400; line-height: 1.3 }
.words td, .words th { text-align: left }
thead th { color: var(--faint); font-size: 13px; border-bottom: 1.5px solid var(--ink); vertical-align: bottom }
tbody tr { border-bottom: 1px solid var(--rule) }
tbody th i { display: inline-block; width: 18px; height: 4px; margin-right: 10px; border-radius: 2px;
  vertical-align: middle; position: relative; top: -1px }
.ours th, .ours td { font-weight: 650; background: #fdf2ea }
.remarks { margin: 22px 0 0; padding: 0 0 0 1.1em; max-width: 52em; columns: 1; font-size: 15px }
.remarks li { margin: 3px 0 } .remarks li::marker { color: var(--rule) }
.plates { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 24px; margin: 40px 0 }
figure { display: flex; flex-direction: column; justify-content: space-between; margin: 0;
  padding: 22px 22px 14px; background: var(--card); border: 1px solid var(--rule); border-radius: 10px }
figure.wide { grid-column: 1 / -1 }
figcaption p { margin: 4px 0 14px; color: var(--faint); font-size: 14px; max-width: 60em }
h2 { margin: 0; font: 600 18px/1.3 var(--sans) }
figure svg { display: block; width: 100%; height: auto }
.notes { max-width: 52em; color: var(--ink) } .notes p { margin: 8px 0 0; font-size: 15px }
footer { margin-top: 44px; padding-top: 16px; border-top: 1px solid var(--rule); font-size: 13px }
footer dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0 }
footer div { display: flex; gap: 7px } dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 860px) { .plates { grid-template-columns: 1fr } main { padding: 32px 16px } }
@media print { body { background: #fff } figure { break-inside: avoid } main { max-width: none } }
"""


def report_lines(folder: Path) -> str:
    """The headline and the table as plain text, for the terminal."""
    if (folder / "coordinates.json").exists():
        record = read_json(folder / "coordinates.json")
        assert record is not None
        heads, rows = distance_table(studies_from(record))
        return _aligned(heads, rows, left=5)
    summary = summarise(*read_race(folder))
    return f"{summary.headline}\n\n{_aligned(*table(summary))}"


def _aligned(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]

    def line(cells: list[str]) -> str:
        padded = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(heads), "  ".join("─" * w for w in widths), *(line(row) for row in rows)])
