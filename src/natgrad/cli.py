"""The command line: race, report, inspect, fisher, demo, version.

No traceback reaches its user: an error raised on purpose is one red line and exit code 2, an interruption says how to
go on and is 130, a fault of natgrad's own is one line that says how to see more, and 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from natgrad.errors import ConfigError, NatgradError

_DESCRIPTION = "Natural gradient descent for PyTorch: race it, read the report, look at a model."
_EXAMPLES = """examples:
  natgrad demo                                          two minutes: a deep autoencoder, natgrad, Adam and SGD
  natgrad race digits                                   seconds: natgrad, Adam and SGD on 8×8 digits
  natgrad race mnist --optimizers natgrad,adam,muon --tune --seeds 3
  natgrad race my_module:my_problem --steps 500         your own problem
  natgrad race two-coordinates                          see the invariance
  natgrad report races/digits-300-steps                 the page again
  natgrad inspect my_module:my_model                    what natgrad would do with a model
  natgrad fisher my_module:my_case --plot spectrum.png  the spectrum of a model's Fisher information
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = _Parser(
        prog="natgrad",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    race = commands.add_parser("race", help="run optimisers on one problem, then report")
    race.add_argument(
        "problem", metavar="PROBLEM", help="a name (`natgrad race --list`) or my_module:my_problem", nargs="?"
    )
    race.add_argument("--list", action="store_true", help="list the problems and the optimisers")
    race.add_argument("--optimizers", "--optimisers", metavar="A,B", default="natgrad,adam,sgd",
                      help="names, each with an optional rate: natgrad,adam,sgd@0.1 (%(default)s)")  # fmt: skip
    budget = race.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=_whole, help="steps a run (default: the problem's)")
    budget.add_argument("--seconds", type=_positive, help="seconds of training a run, instead of steps")
    race.add_argument(
        "--seeds", metavar="N|A,B", default="1", help="how many seeds, or which: 3, or 0,7,9 (default: 1)"
    )
    race.add_argument("--batch-size", type=_whole, help="examples a step (default: the problem's)")
    race.add_argument(
        "--target",
        type=_positive,
        help="excess, or relative error, that is timed to (default: the problem's)",
    )
    race.add_argument(
        "--evaluate-every", type=_whole, help="steps between evaluations (default: the problem's)"
    )
    race.add_argument(
        "--tune", action="store_true", help="every peer tries a grid of rates first; natgrad has none"
    )
    race.add_argument("--folder", type=Path, help="where to write (default: races/PROBLEM-BUDGET)")
    race.add_argument("--threads", type=_whole, help="threads for torch (default: torch's own choice)")
    race.add_argument("--no-report", action="store_true", help="don't write the page at the end")
    race.set_defaults(run=_race)

    report = commands.add_parser("report", help="write the page of a race")
    report.add_argument("folder", metavar="FOLDER", type=Path, help="a race's folder")
    report.set_defaults(run=_report)

    inspect = commands.add_parser(
        "inspect", help="say what natgrad would do with a model, without training it"
    )
    inspect.add_argument("model", metavar="MODULE:FACTORY", help="gives a model, or (model, loss_fn, example_input); "
                         "a problem's name works too")  # fmt: skip
    inspect.add_argument(
        "--batch-size", type=_whole, help="examples a step (default: the example's, or the problem's)"
    )
    inspect.set_defaults(run=_inspect)

    fisher = commands.add_parser(
        "fisher", help="the spectrum of a model's Fisher information, and its hardest layers"
    )
    fisher.add_argument("case", metavar="MODULE:FACTORY",
                        help="gives (model, loss_fn, data); a problem's name works too")  # fmt: skip
    fisher.add_argument("--metric", metavar="NAME", default="kfac",
                        help="the representation: kfac, ekfac, block, diagonal, dense, … (%(default)s)")  # fmt: skip
    fisher.add_argument("--kind", metavar="NAME",
                        help="exact, mc, rademacher or empirical (default: exact; mc beyond 100 outputs)")  # fmt: skip
    fisher.add_argument(
        "--damping",
        metavar="λ",
        type=_positive,
        help="of the effective dimension (default: one over the examples)",
    )
    fisher.add_argument("--examples", metavar="N", type=_whole, help="the first N of the data (default: all)")
    fisher.add_argument(
        "--save", metavar="FILE", type=Path, help="write the operator; natgrad.load_operator reads it"
    )
    fisher.add_argument("--plot", metavar="FILE", type=Path, help="draw the spectrum: a .png, .svg or .pdf")
    fisher.set_defaults(run=_fisher)

    demo = commands.add_parser("demo", help="two minutes: the deep autoencoder on real digits, then the page")
    demo.add_argument(
        "--seconds", type=_positive, default=30.0, help="of training for each of three (default: %(default)g)"
    )
    demo.add_argument(
        "--folder", type=Path, default=Path("races/demo"), help="where to write (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: words after ``natgrad``; the process's own if None.

    Returns:
        The exit code: 0, 2 for an error in what was asked, 130 after an interruption, 1 for a fault of natgrad's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser().parse_args(words)
        return int(options.run(options) or 0)
    except NatgradError as error:
        _red(str(error))
        return 2
    except KeyboardInterrupt:
        again = " ".join(["natgrad", *words])
        ran = words[:1] in (["race"], ["demo"])
        _red(f"interrupted; finished runs are kept. Go on with: {again}" if ran else "interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("NATGRAD_TRACEBACK"):
            traceback.print_exc()
        _red(
            f"a fault in natgrad, {type(error).__name__}: {error}. NATGRAD_TRACEBACK=1 shows where; please report it"
        )
        return 1


def _red(message: str) -> None:
    line = "natgrad: " + " ".join(message.split("\n"))
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\x1b[31m{line}\x1b[0m" if coloured else line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ commands


def _race(options: argparse.Namespace) -> int:
    from natgrad.lab.problems import STUDIES, load_problem

    if options.list or options.problem is None:
        return _list(options)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    if options.problem in STUDIES:
        return _study(options)
    problem = load_problem(options.problem)
    steps, seconds = options.steps, options.seconds
    if not steps and not seconds:
        steps, seconds = (None, problem.seconds) if problem.seconds else (problem.steps, None)
    span = f"{steps}-steps" if steps else f"{seconds:g}-seconds"
    batch = f"-batch-{options.batch_size}" if options.batch_size else ""
    folder = options.folder or Path("races") / f"{problem.name}-{span}{batch}"
    return _run(
        problem, options.optimizers.split(","), folder, steps, seconds, _seeds(options.seeds),
        batch_size=options.batch_size, target=options.target, tune=options.tune,
        evaluate_every=options.evaluate_every, report=not options.no_report,
    )  # fmt: skip


def _run(problem: object, names: Sequence[str], folder: Path, steps: int | None, seconds: float | None,
         seeds: tuple[int, ...], *, batch_size: int | None = None, target: float | None = None, tune: bool = False,
         evaluate_every: int | None = None, report: bool = True) -> int:  # fmt: skip
    from natgrad.lab.live import view_for
    from natgrad.lab.peers import entrants
    from natgrad.lab.plan import Budget
    from natgrad.lab.problem import Task
    from natgrad.lab.race import Race

    assert isinstance(problem, Task)
    if report:
        _needs_matplotlib()  # told before the race, not after it
    race = Race(
        problem, entrants(names, problem), folder, Budget(steps, seconds, evaluate_every or problem.evaluate_every),
        seeds=seeds, batch_size=batch_size, target=target, tune=tune,
    )  # fmt: skip
    race.run(view_for(sys.stdout))
    return _tell(folder) if report else 0


def _demo(options: argparse.Namespace) -> int:
    from natgrad.lab.problems import load_problem

    problem = load_problem("mnist-autoencoder")
    return _run(
        problem, ["natgrad", "adam", "sgd"], options.folder, None, options.seconds, (0,), evaluate_every=5
    )


def _study(options: argparse.Namespace) -> int:
    from natgrad.lab.coordinates import run_studies

    folder = options.folder or Path("races") / options.problem
    _needs_matplotlib()
    run_studies(folder, lambda text: print(text, flush=True))
    return _tell(folder)


def _report(options: argparse.Namespace) -> int:
    return _tell(options.folder)


def _tell(folder: Path) -> int:
    """Writes the page, then prints the table and where the page is."""
    from natgrad.lab.report import report_lines, write_report

    path = write_report(folder)
    print(f"\n{report_lines(folder)}\n\nreport: {path.resolve()}", flush=True)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from natgrad.lab.inspect import inspect_model, render

    print(render(inspect_model(options.model, options.batch_size)), flush=True)
    return 0


def _fisher(options: argparse.Namespace) -> int:
    from natgrad.lab import spectrum, spectrum_view

    if options.plot:
        spectrum_view.require_picture(options.plot)
    if options.save:
        spectrum_view.require_savable(options.save, options.metric)
    found = spectrum.fisher_of(
        options.case, options.metric, options.kind, damping=options.damping, examples=options.examples
    )
    print(spectrum_view.render(found), flush=True)
    if options.save:
        spectrum_view.save_operator(found, options.save)
        print(f"operator: {options.save.resolve()}", flush=True)
    if options.plot:
        spectrum_view.save_figure(found, options.plot)
        print(f"plot: {options.plot.resolve()}", flush=True)
    return 0


def _version(options: argparse.Namespace) -> int:
    import torch

    import natgrad

    print(f"natgrad {natgrad.__version__} (torch {torch.__version__}, python {sys.version.split()[0]})")
    return 0


def _list(options: argparse.Namespace) -> int:
    from natgrad.lab.peers import names
    from natgrad.lab.problems import REGISTRY, STUDIES

    if not options.list:
        raise ConfigError(f"name a problem: {', '.join([*REGISTRY, *STUDIES])}, or my_module:my_problem")
    print("problems:")
    for name, make in REGISTRY.items():
        print(f"  {name:<28}{(make.__doc__ or '').splitlines()[0]}")
    print(f"  {STUDIES[0]:<28}One model in two parametrisations: who takes the same path?")
    print(f"optimisers:\n  {', '.join(names())}; name@rate fixes a learning rate")
    return 0


def _needs_matplotlib() -> None:
    from natgrad.lab.extras import require

    require("matplotlib", "the report")


# --------------------------------------------------------------------------------------------- the grammar


def _number(kind: Callable[[str], float], what: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind("0")
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
        return value

    return convert


_whole = _number(int, "a whole number above 0")
_positive = _number(float, "a number above 0")


def _seeds(text: str) -> tuple[int, ...]:
    """``"3"`` → (0, 1, 2); ``"0,7"`` → (0, 7)."""
    try:
        given = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        given = []
    if not given or min(given) < 0 or ("," not in text and given[0] < 1):
        raise ConfigError(f"--seeds takes a count such as 3, or a list such as 0,7,9; not {text!r}")
    return tuple(given) if "," in text else tuple(range(given[0]))
