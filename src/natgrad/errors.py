"""Every exception that natgrad raises on purpose.

NatgradError
├── UnsupportedLossError (TypeError)      a loss with no likelihood
├── OutputError (ValueError)              outputs that the likelihood can't read, or that were not found
├── TargetError (ValueError)              targets out of range, or of the wrong shape or type
├── NonFiniteError (ArithmeticError)      a loss, gradient or factor that is not finite
├── NotPositiveDefiniteError (ArithmeticError)  a factor that no fallback could factorise
├── EmptyError (ValueError)               no data, or no trainable parameter
├── ModelChangedError (RuntimeError)      parameters that joined, left or changed shape after construction
├── StateError (ValueError)               a state_dict of another model or version
├── StepError (RuntimeError)              a step that was not preceded by what it needs
├── VectorError (ValueError)              a vector that does not lie in the operator's parameter space
├── UnknownNameError (ValueError)         an unknown problem, metric or optimiser; offers the nearest names
├── ConfigError (ValueError)              an argument out of range or in conflict with another
├── TaylorRuleError (NotImplementedError) a function that natgrad.pde can't carry derivatives through
└── RunError (OSError)                    a race folder that can't be read or written

Each also derives from the built-in named beside it, so that ordinary `except` clauses work. A parameter that no
rule covers is no error: it is announced once by `CoverageWarning`. Nor is an iteration that ended before it was as
exact as asked: `ConvergenceWarning` says how far it came. Nor is a step on residuals for which nothing lowers the
loss: it moves nothing, and whoever goes on after it gets a `StallWarning`.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

_WRAPPERS = ("natgrad", "torch", "jaxtyping")


class NatgradError(Exception):
    """Base of every error that natgrad raises on purpose."""


class UnsupportedLossError(NatgradError, TypeError):
    """The loss has no likelihood, so it has no Fisher information."""


class OutputError(NatgradError, ValueError):
    """The model's outputs can't be read by the likelihood, or were not found."""


class TargetError(NatgradError, ValueError):
    """The targets are out of range, or of the wrong shape or type."""


class NonFiniteError(NatgradError, ArithmeticError):
    """A loss, gradient or factor is not finite. No parameter was changed."""


class NotPositiveDefiniteError(NatgradError, ArithmeticError):
    """A factor could not be factorised by any stage of the fallback.

    Attributes:
        layer: the name of the layer (or block) it belongs to.
        factor: which factor of that layer, such as ``"A"`` or ``"G"``.
        least_eigenvalue: its least eigenvalue, or NaN where that could not be computed.
    """

    def __init__(
        self, layer: str, factor: str, least_eigenvalue: float, advice: str = "raise the damping"
    ) -> None:
        self.layer, self.factor, self.least_eigenvalue = layer, factor, least_eigenvalue
        super().__init__(
            f"factor {factor} of {layer} is not positive definite (least eigenvalue {least_eigenvalue:.3g}); {advice}"
        )


class EmptyError(NatgradError, ValueError):
    """There is no data, or no trainable parameter."""


class ModelChangedError(NatgradError, RuntimeError):
    """A parameter joined, left or changed shape after the optimiser was built."""


class StateError(NatgradError, ValueError):
    """A state_dict belongs to another model, configuration or version."""


class StepError(NatgradError, RuntimeError):
    """`step()` was called without what it needs: a backward pass, a batch, a closure."""


class VectorError(NatgradError, ValueError):
    """A vector does not lie in the operator's parameter space."""


class ConfigError(NatgradError, ValueError):
    """An argument is out of range, or in conflict with another."""


class TaylorRuleError(NatgradError, NotImplementedError):
    """A model calls a function that derivatives can't be carried through: it has no rule, or mixes examples."""


class RunError(NatgradError, OSError):
    """A race folder can't be read or written."""


class UnknownNameError(NatgradError, ValueError):
    """A name that is not known; the message offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class CoverageWarning(UserWarning):
    """Some parameters are covered by no rule of the tape and take the declared fallback."""


class ConvergenceWarning(UserWarning):
    """An iterative solution is not as exact as it was asked to be."""


class StallWarning(UserWarning):
    """Nothing that a step on residuals tried lowered the loss: a minimum, rounding, or a start that leads nowhere."""


def announce(message: str, category: type[Warning] = CoverageWarning) -> None:
    """Gives a warning at the user's line, whatever wraps natgrad's functions."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _WRAPPERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
