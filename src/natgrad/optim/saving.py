"""Saving a run and going on with it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from natgrad.errors import StateError
from natgrad.optim.info import StepInfo
from natgrad.steps import Alarm, Confirmation, Pace, Promise, Witness

if TYPE_CHECKING:
    from natgrad.optim.plumbing import Plumbing

VERSION = 4
# What is nested. It is kept as tuples of tuples that name tensors by number, and these in a flat list: other tools
# (torch.distributed.checkpoint) rename keys and drop empty containers, but neither of tuples.
NESTED = ("estimates", "blocks", "elements", "remainder", "uncovered", "fallback")


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
        "pace": dataclasses.astuple(optimizer._pace),
        "alarm": (optimizer._alarm.mean, optimizer._alarm.deviation, optimizer._alarm.count),
        "undone": optimizer.info.undone,
        "generator": curvature.generator.get_state(),
        "estimates": [estimate.state_dict() for _, estimate, _ in curvature.estimates],
        "blocks": [dict(tape.blocks) for _, _, tape in curvature.estimates],
        "elements": [dict(tape.elements) for _, _, tape in curvature.estimates],
        "remainder": curvature.remainder.state_dict(),
        "uncovered": [dict(tape.uncovered) for _, _, tape in curvature.estimates],
        "fallback": None if fallback is None else (curvature.fallback_names, fallback.state_dict()),
    }
    base["natgrad"]["blocks"] = [
        {name: vars(block).copy() for name, block in blocks.items()} for blocks in base["natgrad"]["blocks"]
    ]
    own: dict[str, Any] = base["natgrad"]
    tensors: list[Tensor] = []
    own |= {key: _packed(own[key], tensors) for key in NESTED}
    if tensors:
        own["tensors"] = tensors
    return base


def _packed(value: Any, tensors: list[Tensor]) -> tuple[Any, ...]:
    """A value as nested tuples; its tensors join the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor", len(tensors) - 1
    if isinstance(value, dict):
        return "dict", tuple((key, _packed(inner, tensors)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_packed(inner, tensors) for inner in value)
    return "value", value


def _unpacked(packed: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
    """What `_packed` was given."""
    kind, inner = packed
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _unpacked(one, tensors) for key, one in inner}
    if kind == "value":
        return inner
    values = [_unpacked(one, tensors) for one in inner]
    return tuple(values) if kind == "tuple" else values


def load_state(
    optimizer: Plumbing, state: Mapping[str, Any], load_base: Callable[[dict[str, Any]], None]
) -> None:
    """Restores what `save_state` gave; checks that it fits before anything is changed."""
    own = state.get("natgrad")
    if own is None:
        raise StateError(
            'this state has no "natgrad" entry: it was saved by another optimiser, or by a tool that keeps "state" and '
            '"param_groups" alone, as get_optimizer_state_dict does; save optimizer.state_dict() whole'
        )
    if own.get("version") != VERSION:
        raise StateError(f"this state has version {own.get('version')}; this natgrad reads version {VERSION}")
    missing = save_state(optimizer, {})["natgrad"].keys() - own.keys() - {"tensors"}
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
    # torch.distributed.checkpoint writes every key as a string; torch would take such states for nobody's.
    states = {
        int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in state.get("state", {}).items()
    }
    try:
        # A copy: torch would keep the very tensors, and share them with the run that they came from.
        load_base(copy.deepcopy({"state": states, "param_groups": state["param_groups"]}))
    except ValueError as error:
        raise StateError(f"this state does not fit the parameter groups: {error}") from error
    optimizer._step, optimizer._batch, optimizer._skipped = own["step"], own["batch"], own["skipped"]
    optimizer.damping = own["damping"]
    optimizer._witness = None if own["witness"] is None else Witness(*own["witness"])
    optimizer._promise = None if own["promise"] is None else Promise(*own["promise"])
    optimizer._confirmation = Confirmation(*own["confirmation"])
    optimizer._pace = Pace(*own["pace"])
    optimizer._alarm = Alarm(*own["alarm"])
    optimizer.info = StepInfo(
        step=own["step"], damping=own["damping"], skipped=own["skipped"], undone=own["undone"]
    )
    optimizer._watcher.clear()
    nested = {key: _unpacked(own[key], own.get("tensors", ())) for key in NESTED}
    optimizer._curvature.load({**own, **nested})
