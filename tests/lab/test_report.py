from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from natgrad.errors import RunError
from natgrad.lab.figures import excess_figure, tuning_figure
from natgrad.lab.formats import duration, listed, number, operations, power, size
from natgrad.lab.peers import Entrant, entrants
from natgrad.lab.plan import Budget
from natgrad.lab.problem import Problem
from natgrad.lab.race import Race
from natgrad.lab.report import report_lines, write_report
from natgrad.lab.runs import read_race
from natgrad.lab.summary import ratio_text, summarise, table


@pytest.fixture
def raced(problem: Problem, fake: Entrant, tmp_path: Path) -> Path:
    field = (fake, *entrants(["adam", "sgd"], problem))
    Race(problem, field, tmp_path, Budget(steps=20, evaluate_every=5), seeds=(0, 1), tune=True).run()
    return tmp_path


def test_the_page_holds_the_tables_numbers_and_every_figure(raced: Path) -> None:
    path = write_report(raced)
    page = path.read_text()
    words = re.sub(r"</?small>", "", page)
    summary = summarise(*read_race(raced))
    heads, rows = table(summary)
    for text in (summary.headline, *summary.remarks, *heads, *(cell for row in rows for cell in row)):
        assert html.escape(text) in words
    assert [s.ours for s in summary.standings] == [True, False, False]
    figures = ("loss-vs-seconds", "loss-vs-steps", "adaptation", "tuning")
    assert sorted(p.stem for p in raced.glob("*.png")) == sorted(figures)
    assert page.count("<svg") == len(figures)
    for name in figures:
        assert f"id={name}>" in page
        assert (raced / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_self_contained_and_its_ids_are_unique(raced: Path) -> None:
    page = write_report(raced).read_text()
    links = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page)) | set(
        re.findall(r"@import|<script|<link", page)
    )
    assert not links
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page):
        assert "".join(used) in ids


def test_writing_the_page_again_changes_nothing(raced: Path) -> None:
    first = write_report(raced).read_text()
    without_ids = re.sub(r"[mpi][0-9a-f]{10}", "", first)
    assert re.sub(r"[mpi][0-9a-f]{10}", "", write_report(raced).read_text()) == without_ids


def test_the_terminals_table_says_what_the_page_says(raced: Path) -> None:
    text = report_lines(raced)
    _, rows = table(summarise(*read_race(raced)))
    for row in rows:
        assert re.search(r"\s+".join(re.escape(cell) for cell in row), text)


# ------------------------------------------------------------------- numbers, from runs written by hand


def write_race(folder: Path, curves: dict[str, list[tuple[int, float, float]]], **race: Any) -> Path:
    """A race folder with the given evaluations (step, seconds, excess); ours are the names with natgrad in them."""
    named = [name for name in curves if "/" not in name]
    record = {
        "problem": "written", "title": "a problem written by hand", "unit": "nats", "floor": 0.0, "target": 1.0,
        "examples": 10, "parameters": 3, "batch_size": 5, "steps": 100, "seconds": None, "seeds": [0], "scores": [],
        "entrants": [
            {"name": n, "label": n, "rate": None if "natgrad" in n else 0.1, "pinned": False,
             "ours": "natgrad" in n, "grid": []}
            for n in named
        ],
        "left_out": {},
    } | race  # fmt: skip
    (folder / "race.json").write_text(json.dumps(record))
    for key, evaluations in curves.items():
        name, _, seed = key.partition("/")
        run = folder / "runs" / key.replace("/", "-seed")
        run.mkdir(parents=True)
        rate = None if "natgrad" in name else 0.1
        (run / "config.json").write_text(
            json.dumps({"optimizer": name, "rate": rate, "seed": int(seed or 0)})
        )
        told = [{"kind": "evaluation", "step": a, "seconds": b, "excess": c} for a, b, c in evaluations]
        told += [{"kind": "step", "step": a, "seconds": b, "loss": c} for a, b, c in evaluations if a]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
        status = "finished" if math.isfinite(evaluations[-1][2]) else "diverged"
        (run / "result.json").write_text(json.dumps({"status": status, "step": evaluations[-1][0]}))
    return folder


def test_times_to_target_are_interpolated_in_the_logarithm(tmp_path: Path) -> None:
    quick = [(0, 0.0, 100.0), (10, 2.0, 10.0), (20, 4.0, 0.1)]  # passes 1 halfway between 10 and 0.1
    slow = [(0, 0.0, 100.0), (40, 4.0, 1.0), (50, 5.0, 0.5)]
    summary = summarise(*read_race(write_race(tmp_path, {"natgrad": quick, "adam": slow})))
    ours, theirs = summary.standings
    assert ours.steps is not None
    assert ours.seconds is not None
    assert ours.steps.median == 15
    assert ours.seconds.median == pytest.approx(3.0)
    assert theirs.steps is not None
    assert theirs.steps.median == 40
    assert summary.ratio(ours, "steps") == "0.375"
    assert summary.ratio(ours, "seconds") == "0.75"
    assert summary.ratio(theirs, "seconds") == "1"
    assert (
        summary.headline
        == "natgrad reached an excess of 1 nats 1.33× sooner than adam (rate 0.1): 3 s against 4 s."
    )
    assert "In steps: 15 steps against 40 steps of adam (rate 0.1), 2.67× fewer." in summary.remarks


def test_losing_is_said_as_plainly(tmp_path: Path) -> None:
    slow, quick = [(0, 0.0, 10.0), (10, 9.0, 1.0)], [(0, 0.0, 10.0), (30, 3.0, 1.0)]
    summary = summarise(*read_race(write_race(tmp_path, {"natgrad": slow, "adam": quick})))
    assert (
        summary.headline
        == "natgrad lost: adam (rate 0.1) reached an excess of 1 nats 3× sooner, in 3 s against 9 s."
    )
    assert summary.best_peer is not None
    assert summary.best_peer.label == "adam"


@pytest.mark.parametrize(
    ("ours", "theirs", "headline", "ratio"),
    [
        (0.5, 2.0, "no peer did within its 20 steps (20 s)", "< 0.5"),
        (2.0, 0.5, "natgrad lost: adam (rate 0.1) reached an excess of 1 nats in 20.0 s; natgrad did not", "> 0.5"),
        (2.0, 3.0, "Nobody reached an excess of 1 nats. The lowest excess at the end is natgrad’s: 2 nats.", "–"),
        (2.0, 1.5, "The lowest excess at the end is adam (rate 0.1)’s: 1.50 nats.", "–"),
    ],
)  # fmt: skip
def test_what_was_not_reached_gives_bounds(
    ours: float, theirs: float, headline: str, ratio: str, tmp_path: Path
) -> None:
    curves = {
        "natgrad": [(0, 0.0, 4.0), (9, 9.9, 3.9), (10, 10.0, ours)],
        "adam": [(0, 0.0, 4.0), (19, 19.9, 3.9), (20, 20.0, theirs)],
    }
    summary = summarise(*read_race(write_race(tmp_path, curves)))
    assert headline in summary.headline
    assert summary.ratio(summary.standings[0], "seconds").startswith(ratio[:3])


def test_bounds_never_claim_more_than_the_shortest_run_shows() -> None:
    assert ratio_text(3.0, 9.0, math.inf, 12.0) == "< 0.25"
    assert ratio_text(math.inf, 9.0, 3.0, 12.0) == "> 3"
    assert ratio_text(math.inf, 9.0, math.inf, 12.0) == "–"


def test_the_median_over_seeds_counts_a_seed_that_never_got_there(tmp_path: Path) -> None:
    there, never = [(0, 0.0, 10.0), (10, 1.0, 1.0)], [(0, 0.0, 10.0), (10, 1.0, 2.0)]
    lost = [(0, 0.0, 10.0), (3, 0.3, math.inf)]
    curves = {
        "natgrad": there,
        "natgrad/1": there,
        "natgrad/2": never,
        "adam": there,
        "adam/1": never,
        "adam/2": lost,
    }
    named = {"seeds": [0, 1, 2]}
    summary = summarise(*read_race(write_race(tmp_path, curves, **named)))
    ours, theirs = summary.standings
    assert ours.steps is not None
    assert (ours.steps.median, ours.steps.high) == (10, math.inf)
    assert theirs.steps is not None
    assert theirs.steps.median == math.inf
    assert "adam diverged at step 3 on 1 of 3 seeds." in summary.remarks
    cells = table(summary)[1]
    assert "10 (10–∞)" in cells[0]
    assert "not reached" in cells[1]


def test_remarks_warn_of_what_spoils_a_comparison(tmp_path: Path) -> None:
    there = [(0, 0.0, 10.0), (10, 1.0, 1.0)]
    folder = write_race(tmp_path, {"natgrad": there, "adam": there}, left_out={"muon": "no bfloat16"})
    (folder / "runs" / "adam" / "result.json").unlink()
    for name, commit in (("adam", "aaa"), ("natgrad", "bbb")):
        (folder / "runs" / name / "environment.json").write_text(json.dumps({"commit": commit}))
    remarks = " ".join(summarise(*read_race(folder)).remarks)
    for told in (
        "--tune",
        "muon was left out: no bfloat16",
        "Unfinished: adam",
        "different commits of natgrad (aaa and bbb)",
    ):
        assert told in remarks
    assert "One seed only" in remarks


def test_a_problem_without_a_target_and_one_without_peers_have_their_page_too(
    problem: Problem, fake: Entrant, tmp_path: Path
) -> None:
    aimless = replace(problem, target=None, test=None)
    Race(aimless, (fake,), tmp_path, Budget(steps=3)).run()
    page = write_report(tmp_path).read_text()
    assert "The lowest excess at the end is natgrad’s" in page
    assert "÷ best peer</th>" not in page


def test_what_cannot_be_reported_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not there"):
        write_report(tmp_path / "none")
    with pytest.raises(RunError, match="holds no race"):
        write_report(tmp_path)
    write_race(tmp_path, {"natgrad": [(0, 0.0, 1.0)]})
    (tmp_path / "runs" / "natgrad" / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="no run of this race has been evaluated"):
        write_report(tmp_path)
    (tmp_path / "race.json").write_text("{")
    with pytest.raises(RunError, match=r"race\.json can't be read"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (60.0, "60"),
        (51.66, "51.7"),
        (0.03714, "0.0371"),
        (1234.5, "1,234"),
        (2.5e-9, "2.5·10⁻⁹"),
        (0.0, "0"),
        (1.0, "1"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_units() -> None:
    assert [duration(0.0123), duration(75.0), duration(1200.0)] == ["12.3 ms", "75 s", "20 min"]
    assert [size(12), size(51_900_000), size(2.5e9)] == ["12 B", "51.9 MB", "2.5 GB"]
    assert operations(1.54e10) == "15.4 GFLOP"
    assert power(4.5e-10) == "4.5·10⁻¹⁰"
    assert listed(["a", "b", "c"]) == "a, b and c"


def test_a_measure_that_may_be_zero_is_drawn_on_a_linear_axis_to_its_end(tmp_path: Path) -> None:
    told = {"measure": "shortfall in return", "unit": "points of 500", "logarithmic": False, "target": 25.0}
    curves = {
        "natgrad": [(0, 0.0, 480.0), (10, 1.0, 30.0), (20, 2.0, 0.0)],
        "adam": [(0, 0.0, 480.0), (20, 2.0, 9.0)],
    }
    summary = summarise(*read_race(write_race(tmp_path, curves, **told)))
    (axes,) = excess_figure(summary, "step").axes
    tuned = replace(summary.standings[1], trials={0.1: 9.0, 1.0: 0.0})
    (beside,) = tuning_figure(replace(summary, standings=(summary.standings[0], tuned))).axes
    assert [9.0, 0.0] in [list(line.get_ydata()) for line in beside.lines]
    assert axes.get_yscale() == beside.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylabel() == "Shortfall in return, points of 500"
    assert any(list(line.get_ydata()) == [480.0, 30.0, 0.0] for line in axes.lines)
    assert summary.standings[0].steps is not None
    assert summary.standings[0].steps.median == 12  # 5 of 30 points below the evaluation before, linearly
    assert table(summary)[0][-1] == "shortfall at the end"
