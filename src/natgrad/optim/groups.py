"""Parameters by name, in groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, EmptyError, ModelChangedError
from natgrad.metrics import Euclidean, Metric, metric_from
from natgrad.steps.penalty import L2, check_decay


@dataclass(frozen=True)
class Member:
    """One trainable parameter and the index of its group."""

    name: str
    parameter: nn.Parameter
    group: int


class Membership:
    """Which trainable parameter is where; notices when the model changes.

    Args:
        model: the model.
        params: parameters or groups of them, as torch's optimisers take; all trainable ones if None.
        metric: the metric of groups that name none.
        weight_decay: that of groups that name none.

    Attributes:
        model: the model.
        groups: option dictionaries for `torch.optim.Optimizer`, with their parameters.
        members: name → member, in the model's order.
        metrics: one for each group; equal ones are one object.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        metric: str | Metric,
        weight_decay: float | L2,
    ) -> None:
        self.model = model
        _refuse_flattened(model)
        names = {id(p): name for name, p in model.named_parameters()}
        entries: list[Any] = list(params) if params is not None else list(model.parameters())
        entries = [e for e in entries if not isinstance(e, Tensor) or e.requires_grad]
        if not entries:
            raise EmptyError("the model has no trainable parameter; is every requires_grad False?")
        given = entries if isinstance(entries[0], Mapping) else [{"params": entries}]
        default = metric_from(metric)
        self.groups: list[dict[str, Any]] = []
        self.metrics: list[Metric] = []
        found: dict[str, Member] = {}
        for index, entry in enumerate(given):
            group: dict[str, Any] = dict(entry)
            own = group.pop("metric", None)
            self.metrics.append(default if own is None else metric_from(own))
            members = group["params"]
            members = [members] if isinstance(members, Tensor) else list(members)
            members = [p[1] if isinstance(p, tuple) else p for p in members]  # from named_parameters()
            group["params"] = [p for p in members if p.requires_grad]
            for p in group["params"]:
                if id(p) not in names:
                    raise ConfigError(
                        f"group {index} holds a parameter of shape {tuple(p.shape)} that is not the model's"
                    )
                found[names[id(p)]] = Member(names[id(p)], p, index)
            decay = group.pop("weight_decay", weight_decay)
            if not isinstance(decay, L2):
                check_decay(decay)
            group["weight_decay"] = 0.0 if isinstance(decay, L2) else float(decay)
            group["l2"] = decay.strength if isinstance(decay, L2) else 0.0
            group.setdefault("frozen", False)
            self.groups.append(group)
        if not found:
            raise EmptyError("no group holds a trainable parameter; is every requires_grad False?")
        self.members = {name: found[name] for name in names.values() if name in found}
        _check_kinds(self.members.values())
        some = next(iter(self.members.values())).parameter
        self._kind = some.device, some.dtype
        self._left_out = {key for key, name in names.items() if name not in found}
        self._trainable_left_out = {
            id(p) for p in model.parameters() if p.requires_grad and id(p) in self._left_out
        }
        self._shapes = {name: m.parameter.shape for name, m in self.members.items()}

    def described(self) -> list[dict[str, Any]]:
        """The groups as a constructor takes them: their parameters, metrics and decay; further options are state."""
        return [
            {
                "params": list(group["params"]),
                "metric": metric,
                "weight_decay": L2(group["l2"]) if group["l2"] else group["weight_decay"],
            }
            for group, metric in zip(self.groups, self.metrics, strict=True)
        ]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter."""
        return {name: member.parameter for name, member in self.members.items()}

    @property
    def tempered(self) -> bool:
        """Whether Δ comes from tempered metrics.

        Raises:
            ConfigError: some are and some are not, so that no one step size or damping would suit both.
        """
        powers = {metric.tempered for metric in self.metrics if not isinstance(metric, Euclidean)}
        if len(powers) > 1:
            raise ConfigError(
                "some groups have a tempered metric and some have not: their directions have other units; give all "
                "the same, or build an optimiser for each"
            )
        return powers == {True}

    def buffers(self) -> list[Tensor]:
        """The model's buffers."""
        return list(self.model.buffers())

    def by_metric(self) -> list[tuple[Metric, dict[str, nn.Parameter]]]:
        """Each distinct metric with all of its parameters, whichever groups they are in."""
        result: list[tuple[Metric, dict[str, nn.Parameter]]] = []
        for name, member in self.members.items():
            metric = self.metrics[member.group]
            for known, parameters in result:
                if known == metric:
                    parameters[name] = member.parameter
                    break
            else:
                result.append((metric, {name: member.parameter}))
        return result

    def check_unchanged(self) -> None:
        """Raises ModelChangedError if a trainable parameter joined, left or changed shape since construction."""
        present: set[int] = set()
        for name, p in self.model.named_parameters():
            present.add(id(p))
            member = self.members.get(name)
            if member is not None and member.parameter is p:
                if p.shape != self._shapes[name]:
                    raise ModelChangedError(
                        f"{name} changed its shape from {tuple(self._shapes[name])} to {tuple(p.shape)} after the "
                        "optimiser was built; build a new one"
                    )
                if (p.device, p.dtype) != self._kind:
                    raise ModelChangedError(
                        f"{name} is now {p.dtype} on {p.device}: move the model before the optimiser is built"
                    )
            elif p.requires_grad and id(p) not in self._trainable_left_out:
                raise ModelChangedError(
                    f"{name} became trainable after the optimiser was built, so it would never be updated; "
                    "build the optimiser after the model is complete"
                )
        gone = [name for name, member in self.members.items() if id(member.parameter) not in present]
        if gone:
            raise ModelChangedError(
                f"{', '.join(gone)} left the model after the optimiser was built; build a new one"
            )


def _check_kinds(members: Iterable[Member]) -> None:
    """Raises ConfigError unless parameters have values, on one device, of one type that can be inverted with."""
    first, *others = members
    for one in (first, *others):
        if one.parameter.is_meta:
            raise ConfigError(
                f"{one.name} is on the meta device, without values: call model.to_empty() or load it first"
            )
        if one.parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"{one.name} is {one.parameter.dtype}, and curvature can't be inverted in it: keep the parameters in "
                "float32, and run the forward pass under torch.autocast"
            )
    for one in others:
        for what in ("device", "dtype"):
            mine, its = getattr(first.parameter, what), getattr(one.parameter, what)
            if mine != its:
                raise ConfigError(
                    f"{first.name} is on {mine} and {one.name} on {its}: move the model to one device, or make one "
                    "optimiser for each"
                    if what == "device"
                    else f"{first.name} is {mine} and {one.name} is {its}: make them one, with model.to({mine})"
                )


def _refuse_flattened(model: nn.Module) -> None:
    """Raises ConfigError where parameters lost their shapes."""
    if any(
        type(module).__module__ == "torch.distributed.fsdp.fully_sharded_data_parallel"
        for module in model.modules()
    ):
        raise ConfigError(
            "FullyShardedDataParallel makes one flat parameter of many, in which no layer can be told from another: "
            "use torch.distributed.fsdp.fully_shard (FSDP2), which leaves each parameter its shape"
        )
