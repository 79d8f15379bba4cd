"""Saving a run and going on with it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from natgrad.errors import StateError
from natgrad.optim.info import StepInfo
from natgrad.steps import Alarm, Confirmation, Promise, Witness

if TYPE_CHECKING:
    from natgrad.optim.plumbing import Plumbing

VERSION = 2


def save_state(optimizer: Plumbing, base: dict[str, Any]) -> dict[str, Any]:
    """The base class' state dict with everything that natgrad keeps beside it."""
    curvature = optimizer._curvature
    fallback = curvature.fallback_optimizer
    base["natgrad"] = {
        "version": VERSION,
        "shapes": {name: tuple(p.shape) for name, p in optimizer._members.parameters.items()},
        "metrics": [repr(metric) for metric, _, _ in curvature.estimates],
        "step": optimizer._step,
        "batch": optimizer._batch,
        "skipped": optimizer._skipped,
        "damping": optimizer.damping,
        "witness": None if optimizer._witness is None else dataclasses.astuple(optimizer._witness),
        "promise": None if optimizer._promise is None else dataclasses.astuple(optimizer._promise),
        "confirmation": dataclasses.astuple(optimizer._confirmation),
        "alarm": (optimizer._alarm.mean, optimizer._alarm.deviation, optimizer._alarm.count),
        "undone": optimizer.info.undone,
        "generator": curvature.generator.get_state(),
        "estimates": [estimate.state_dict() for _, estimate, _ in curvature.estimates],
        "blocks": [dict(tape.blocks) for _, _, tape in curvature.estimates],
        "uncovered": [dict(tape.uncovered) for _, _, tape in curvature.estimates],
        "fallback": None if fallback is None else (curvature.fallback_names, fallback.state_dict()),
    }
    base["natgrad"]["blocks"] = [
        {name: vars(block).copy() for name, block in blocks.items()} for blocks in base["natgrad"]["blocks"]
    ]
    return base


def load_state(
    optimizer: Plumbing, state: Mapping[str, Any], load_base: Callable[[dict[str, Any]], None]
) -> None:
    """Restores what `save_state` gave; checks that it fits before anything is changed."""
    own = state.get("natgrad")
    if own is None:
        raise StateError('this state has no "natgrad" entry: it was saved by another optimiser')
    if own.get("version") != VERSION:
        raise StateError(f"this state has version {own.get('version')}; this natgrad reads version {VERSION}")
    missing = save_state(optimizer, {})["natgrad"].keys() - own.keys()
    if missing:
        raise StateError(f"this state is incomplete: it lacks {', '.join(sorted(missing))}")
    shapes = {name: tuple(p.shape) for name, p in optimizer._members.parameters.items()}
    if own["shapes"] != shapes:
        differ = [n for n in {**own["shapes"], **shapes} if own["shapes"].get(n) != shapes.get(n)]
        raise StateError(
            "this state belongs to another model: "
            + "; ".join(
                f"{n} is {own['shapes'].get(n, 'absent')} there and {shapes.get(n, 'absent')} here"
                for n in differ[:4]
            )
        )
    metrics = [repr(metric) for metric, _, _ in optimizer._curvature.estimates]
    if own["metrics"] != metrics:
        raise StateError(f"this state was saved with the metrics {own['metrics']}, not {metrics}")
    try:
        # A copy: torch would keep the very tensors, and share them with the run that they came from.
        load_base(copy.deepcopy({key: value for key, value in state.items() if key != "natgrad"}))
    except ValueError as error:
        raise StateError(f"this state does not fit the parameter groups: {error}") from error
    optimizer._step, optimizer._batch, optimizer._skipped = own["step"], own["batch"], own["skipped"]
    optimizer.damping = own["damping"]
    optimizer._witness = None if own["witness"] is None else Witness(*own["witness"])
    optimizer._promise = None if own["promise"] is None else Promise(*own["promise"])
    optimizer._confirmation = Confirmation(*own["confirmation"])
    optimizer._alarm = Alarm(*own["alarm"])
    optimizer.info = StepInfo(
        step=own["step"], damping=own["damping"], skipped=own["skipped"], undone=own["undone"]
    )
    optimizer._watcher.clear()
    optimizer._curvature.load(own)
