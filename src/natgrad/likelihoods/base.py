"""What a likelihood is: p(y | z) for a model's output z, and the Fisher information in z.

Notation, the same in every family: the loss is h = c Σₙ wₙ nll(zₙ, yₙ) over *events* n (a labelled image, a token, a
pixel, a regressed number), which are independent given z. c comes from the reduction (1/count or 1) and wₙ from the
loss's weights. The Fisher information of that loss in z is block diagonal over events,

    H = c · diagₙ( wₙ E_{y ~ p(y|zₙ)} [∇nll(zₙ, y) ∇nll(zₙ, y)ᵀ] ),

a matrix on outputs, in nats per output². JᵀHJ is then the Fisher information of the parameters, and, where z is the
natural parameter of the family, the generalised Gauss–Newton matrix too (Martens 2020, "New insights and perspectives
on the natural gradient method", JMLR 21).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, OutputError, TargetError

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]
Targets: TypeAlias = Tensor | tuple[Tensor | float, ...]

KINDS = ("mc", "rademacher", "exact", "empirical")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Likelihood(abc.ABC):
    """The distribution of a target given the model's output, and the loss that is its negative log.

    A likelihood never sees a parameter of the model. It is compared by identity, since its weights are tensors.

    The public methods check their arguments and are final. A likelihood of one's own derives from this class, or
    from `DiagonalLikelihood` where H is diagonal, and defines the abstract methods, which have an underscore.

    Attributes:
        reduction: "mean" or "sum", as in the torch loss.
    """

    reduction: str = "mean"

    # How many negative log-likelihoods the loss of an event is; torch's squared error is two.
    _nlls: ClassVar[float] = 1.0

    def loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, ""]:
        """The reduced loss h(z, y): value and gradient of the torch.nn loss that this likelihood maps to.

        Args:
            outputs: z.
            targets: y, as the torch loss takes them, save that integers and booleans may stand for numbers.

        Returns:
            A scalar in nats (for the squared error, in twice that), differentiable in z.

        Raises:
            OutputError: as `check`.
            TargetError: as `check`.
        """
        self.check(outputs, targets)
        return self._loss(outputs, targets)

    def log_prob(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "..."]:
        """Log p(y | z) of each event, in nats: the normalised density, without weights, smoothing or reduction.

        Args:
            outputs: z.
            targets: y. Events that are ignored have 0; soft targets the mixture of the logarithms.

        Returns:
            A number for each event, differentiable in z.

        Raises:
            OutputError: as `check`.
            TargetError: as `check`.
        """
        self.check(outputs, targets)
        return self._log_prob(outputs, targets)

    def sample(self, outputs: Outputs, generator: torch.Generator | None = None) -> Tensor:
        """Targets drawn from p(y | z), laid out as the loss takes them.

        Args:
            outputs: z.
            generator: the source of randomness; torch's default one if None.

        Returns:
            A target for each event: int64 for classes, else of the outputs' dtype.

        Raises:
            OutputError: as `check`.
        """
        self._check_outputs(outputs)
        return self._sample(detached(outputs), generator)

    def check(self, outputs: object, targets: object = None) -> None:
        """Raise a clear error unless the outputs (and the targets, if given) are what this likelihood reads.

        Values are looked at too; inside `torch.vmap`, where they can't be, only types and shapes are.

        Args:
            outputs: what the model returned.
            targets: what the loss was given with them.

        Raises:
            OutputError: outputs of a wrong type, structure, shape or range.
            TargetError: targets of a wrong type, shape or range.
        """
        self._check_outputs(outputs)
        if targets is not None:
            self._check_targets(outputs, targets, values=True)

    def fisher_product(self, outputs: Outputs, vector: Outputs, targets: Targets | None = None) -> Outputs:
        """H v: the Fisher information of the reduced loss in z, times v.

        Args:
            outputs: z; taken as constant.
            vector: v, with the structure and shape of the outputs, or with further leading dimensions `[K, ...]`:
                the product is then taken of each of the K vectors. Differentiable in v.
            targets: the loss's targets, where its weights depend on them; without them every such weight is 1 and
                nothing is ignored.

        Returns:
            H v, of the vector's structure, shape and dtype. H is in nats per output².

        Raises:
            OutputError: outputs, or a vector, of a wrong structure or shape.
            TargetError: targets that don't fit the outputs.
        """
        targets = self._admit(outputs, targets)
        _check_vector(outputs, vector)
        return self._product(detached(outputs), vector, detached(targets))

    def mass(self, outputs: Outputs, targets: Targets | None = None) -> float:
        """Σ wₙ over the events that reduction="mean" divides by: 1/c, with which the means of several batches add up.

        Args:
            outputs: z.
            targets: as in `fisher_product`.

        Raises:
            OutputError, TargetError: as `check`.
        """
        targets = self._admit(outputs, targets)
        return float(self._mass(detached(outputs), detached(targets)))

    def unit(self, outputs: Outputs, examples: int) -> float:
        """One nat per example on the scale of the loss, where no event has a weight.

        Args:
            outputs: z.
            examples: how many examples they hold.

        Raises:
            OutputError: as `check`.
        """
        return self._nlls * examples / (self.mass(outputs) if self.reduction == "mean" else 1.0)

    def divergence(
        self, outputs: Outputs, other: Outputs, targets: Targets | None = None
    ) -> Float[Tensor, "..."]:
        """KL(p(y|z) ‖ p(y|z′)) of each event, in nats, times c wₙ: their sum has H as its Hessian at z′ = z.

        Args:
            outputs: z.
            other: z′, of the same structure and shape.
            targets: as in `fisher_product`.

        Returns:
            A number for each event, in float64.

        Raises:
            OutputError: outputs of a wrong structure or shape.
            TargetError: targets that don't fit the outputs.
            ConfigError: a likelihood of one's own that does not define `_divergence`.
        """
        targets = self._admit(outputs, targets)
        self._check_outputs(other)
        _check_vector(outputs, other)
        # KL is a small difference of large terms: in float32 nothing would be left of it where z′ is near z.
        return self._divergence(_double(outputs), _double(other), detached(targets))

    def signals(
        self,
        outputs: Outputs,
        targets: Targets | None = None,
        kind: str = "mc",
        generator: torch.Generator | None = None,
        examples: int | None = None,
    ) -> Iterator[Outputs]:
        """What is sent back through the model in place of the loss's gradient, to measure curvature.

        With c and wₙ inside them, the signals S of one call satisfy Σ_S S Sᵀ = H within each example.

        Args:
            outputs: z; the signals are detached from it.
            targets: as in `fisher_product`; the empirical Fisher needs them.
            kind:
                "mc": one S, the score of the targets that `sample` draws. S Sᵀ = H in expectation.
                "rademacher": one S = L ε, with L Lᵀ = H and ε independent fair signs (curvature propagation: Martens,
                    Sutskever & Swersky 2012, "Estimating the Hessian by back-propagating curvature"). S Sᵀ = H in
                    expectation, with less variance than "mc" where p(y | z) is confident: a draw then has a rare,
                    large score, whereas L ε always has H's own size.
                "exact": as many signals as H has rank within one example: one for each output coordinate, and for a
                    class of C one fewer than that. Σ S Sᵀ = H exactly.
                "empirical": one S, the score of the given targets. S Sᵀ is the empirical Fisher, not H.
            generator: the source of randomness; torch's default one if None.
            examples: how many examples the outputs hold, when several rows of dimension 0 belong to one (tokens
                `[B·T, C]`: examples=B). Each exact signal is non-zero in one coordinate's event of each example, so
                that no two events of an example share a backward pass. Default: `outputs.shape[0]`.

        Returns:
            An iterator of signals with the outputs' structure, shape and dtype. Exact ones that are all zero are
            left out.

        Raises:
            OutputError: as `check`, or `examples` does not divide dimension 0.
            TargetError: as `check`, or `kind="empirical"` without targets.
            ConfigError: an unknown kind.
        """
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of signal {kind!r}; choose one of {', '.join(map(repr, KINDS))}")
        if kind == "empirical":
            if targets is None:
                raise TargetError(
                    "the empirical Fisher is made of real gradients: pass targets, or kind='mc'"
                )
            self.check(outputs, targets)
            return iter((self._empirical_signal(detached(outputs), detached(targets)),))
        targets = detached(self._admit(outputs, targets))
        outputs = detached(outputs)
        if kind == "mc":
            return iter((self._sampled_signal(outputs, targets, generator),))
        if kind == "rademacher":
            return iter((self._projected_signal(outputs, targets, generator),))
        return self._exact_signals(outputs, targets, _examples(outputs, examples))

    def _admit(self, outputs: Outputs, targets: Targets | None) -> Targets | None:
        """Check the arguments, and drop targets that H does not depend on: no pass over memory is spent on them."""
        self._check_outputs(outputs)
        if targets is None:
            return None
        self._check_targets(outputs, targets, values=self._weighted_by_targets)
        return targets if self._weighted_by_targets else None

    def _constant(self, events: int) -> float:
        """C for a loss that is reduced over so many events."""
        return 1.0 if self.reduction == "sum" else 1.0 / max(events, 1)

    def _mass(self, outputs: Any, targets: Any) -> float | Tensor:
        """Σ wₙ, or any number in proportion to it; unless a family says otherwise, its events are output elements."""
        return leaves(outputs)[0].numel()

    def _divergence(self, outputs: Any, other: Any, targets: Any) -> Tensor:
        """c wₙ KL of each event; outputs are float64."""
        raise ConfigError(f"{type(self).__name__} does not say its divergence; define _divergence")

    # What a family defines. All but the two checks get arguments that are checked; all but the loss and log_prob get
    # them detached. Each family narrows Any to the tensors that it reads.

    @property
    @abc.abstractmethod
    def _weighted_by_targets(self) -> bool:
        """Whether H depends on the targets (by class weights, ignored events, ...), so that they must be read."""

    @abc.abstractmethod
    def _check_outputs(self, outputs: Any) -> None:
        """Raise OutputError unless the outputs have the structure, type and shape of this family."""

    @abc.abstractmethod
    def _check_targets(self, outputs: Any, targets: Any, values: bool) -> None:
        """Raise TargetError unless the targets fit the outputs; look at their values only if `values`."""

    @abc.abstractmethod
    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        """The scalar h(z, y)."""

    @abc.abstractmethod
    def _log_prob(self, outputs: Any, targets: Any) -> Tensor:
        """Log p(y | z) of each event."""

    @abc.abstractmethod
    def _sample(self, outputs: Any, generator: torch.Generator | None) -> Tensor:
        """Y ~ p(y | z)."""

    @abc.abstractmethod
    def _product(self, outputs: Any, vector: Any, targets: Any) -> Any:
        """H v, for a vector with the outputs' structure and any leading dimensions."""

    @abc.abstractmethod
    def _sampled_signal(self, outputs: Any, targets: Any, generator: torch.Generator | None) -> Any:
        """sqrt(c wₙ) ∇nll(zₙ, ŷ) with ŷ ~ p(y | zₙ)."""

    @abc.abstractmethod
    def _projected_signal(self, outputs: Any, targets: Any, generator: torch.Generator | None) -> Any:
        """L ε with L Lᵀ = H and ε independent fair signs."""

    @abc.abstractmethod
    def _empirical_signal(self, outputs: Any, targets: Any) -> Any:
        """sqrt(c wₙ) ∇nll(zₙ, yₙ), and zero where wₙ = 0."""

    @abc.abstractmethod
    def _exact_signals(self, outputs: Any, targets: Any, examples: int) -> Iterator[Any]:
        """The columns of a square root of H, one coordinate of every example at a time; none that is all zero."""


def like(targets: Tensor, outputs: Tensor) -> Tensor:
    """Integer or boolean targets in the outputs' type, which torch's losses ask for; floating ones as they are."""
    return targets if targets.is_floating_point() else targets.to(outputs.dtype)


def working_dtype(outputs: Tensor) -> torch.dtype:
    """The type to compute in: at least float32, so that c·p and exp(z) neither vanish nor overflow in half types."""
    return torch.promote_types(outputs.dtype, torch.float32)


def detached(value: Any) -> Any:
    """The same tensors without their graphs, through tuples; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(detached, value))
    return value.detach() if isinstance(value, Tensor) else value


def _double(outputs: Outputs) -> Any:
    if isinstance(outputs, tuple):
        return tuple(z.detach().double() for z in outputs)
    return outputs.detach().double()


def leaves(outputs: Outputs) -> tuple[Tensor, ...]:
    """The tensors of the outputs, one or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def bare(outputs: tuple[Tensor, ...]) -> Outputs:
    """What a likelihood reads of a model's tensors: one alone, or several as a tuple; undoes `leaves`."""
    return outputs if len(outputs) > 1 else outputs[0]


def _check_vector(outputs: Outputs, vector: object) -> None:
    parts = vector if isinstance(vector, tuple) else (vector,)
    fits = (
        isinstance(vector, tuple) == isinstance(outputs, tuple)
        and len(parts) == len(leaves(outputs))
        and all(
            isinstance(v, Tensor) and v.ndim >= z.ndim and v.shape[v.ndim - z.ndim :] == z.shape
            for v, z in zip(parts, leaves(outputs), strict=True)
        )
    )
    if not fits:
        got = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in parts]
        want = [tuple(z.shape) for z in leaves(outputs)]
        raise OutputError(
            f"the vector must have the outputs' shapes {want}, after any leading dimensions; got {got}"
        )


def _examples(outputs: Outputs, examples: int | None) -> int:
    z = leaves(outputs)[0]
    rows = z.shape[0] if z.ndim else 1
    if examples is None:
        return rows
    if examples < 1 or rows % examples:
        raise OutputError(f"examples={examples} does not divide the {rows} rows of outputs {tuple(z.shape)}")
    return examples
