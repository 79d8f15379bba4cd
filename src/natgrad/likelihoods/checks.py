"""What every family asks of its outputs, targets and weights, said in one voice."""

from __future__ import annotations

from torch import Tensor

from natgrad.errors import ConfigError, OutputError, TargetError


def check_reduction(reduction: str) -> None:
    """Raise ConfigError unless the reduction is "mean" or "sum"."""
    if reduction not in ("mean", "sum"):
        raise ConfigError(
            f"reduction must be 'mean' or 'sum', got {reduction!r}: the Fisher is that of a scalar loss"
        )


def check_weight(name: str, weight: Tensor | None) -> None:
    """Raise ConfigError if a weight is negative or not a number: H would not be positive semi-definite."""
    bounds = value_range(weight) if weight is not None else None
    if bounds is not None and not bounds[0] >= 0:
        raise ConfigError(f"{name} must be non-negative, its least entry is {bounds[0]:g}")


def check_tensor(family: str, outputs: object, reads: str) -> None:
    """Raise OutputError unless the outputs are one real floating-point tensor."""
    if not isinstance(outputs, Tensor):
        raise OutputError(
            f"{family} reads {reads}, got {type(outputs).__name__}. If the model returns more than that, say where "
            "it is, for example outputs=lambda o: o.logits"
        )
    if not outputs.is_floating_point():
        raise OutputError(f"{family} reads {reads} of a floating-point type, got {outputs.dtype}")


def check_same_shape(family: str, outputs: Tensor, targets: object) -> None:
    """Raise TargetError unless the targets are a real tensor of exactly the outputs' shape: nothing broadcasts."""
    if not isinstance(targets, Tensor):
        raise TargetError(f"{family} expects its targets in a tensor, got {type(targets).__name__}")
    if targets.is_complex():
        raise TargetError(f"{family} expects real targets, got {targets.dtype}")
    if targets.shape != outputs.shape:
        raise TargetError(
            f"{family} expects targets of the outputs' shape {tuple(outputs.shape)}, got {tuple(targets.shape)}; "
            "they are not broadcast: reshape one to the other, for example outputs.squeeze(-1)"
        )


def value_range(values: Tensor) -> tuple[float, float] | None:
    """The least and greatest value, or None where there is none or it can't be read (empty, meta, inside vmap)."""
    if values.numel() == 0 or values.is_meta:
        return None
    try:
        return values.min().item(), values.max().item()
    except RuntimeError:  # vmap has no values to read; a range error is then torch's to find
        return None
