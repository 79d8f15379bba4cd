"""One of C classes given its logits: `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.errors import ConfigError, OutputError, TargetError
from natgrad.likelihoods.base import Likelihood, working_dtype
from natgrad.likelihoods.checks import check_reduction, check_tensor, check_weight, value_range
from natgrad.likelihoods.signs import with_random_signs


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Categorical(Likelihood):
    """y ~ Categorical(softmax(z)) over dimension 1 of the outputs `[N, C, ...]`, an event for each `[N, ...]`.

    The loss of one event is −Σₖ tₖ log pₖ with tₖ = wₖ((1 − ε) qₖ + ε/C): the target q (one-hot, or a distribution),
    the class weights w, the smoothing ε. With s = Σₖ tₖ,

        H = c s (diag(p) − p pᵀ)  of each event: for this loss, the Hessian in z.

    With z-loss it is s ζ log² Z more, Z = Σₖ exp zₖ (Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, §5). That is the
    negative log of a likelihood as well, of y and of a u ~ N(log Z, 1/(2ζ)) that was seen to be 0. So

        H = c s (diag(p) − p pᵀ + 2ζ p pᵀ),

    and 2ζ log Z · c s (diag(p) − p pᵀ) is what the Hessian has beyond. p pᵀ is small, but where all logits rise
    together it is all there is: no class changes, and a step would be as long as λ allows.

    c is 1 for "sum". For "mean" it is one over Σ w_y of the events that are not ignored where targets are class
    indices, and one over the number of events where they are probabilities, as in torch. Where every event is
    ignored, H is zero (torch's loss is NaN). Probabilities need not sum to one.

    Attributes:
        weight: w, `[C]`, a weight of each class. It counts where targets are given.
        label_smoothing: ε in [0, 1], the share of the target that is spread over all classes.
        ignore_index: the class index of events that don't count; for class indices only.
        z_loss: ζ, the coefficient of log² Z; PaLM's is 1e-4. `log_prob` and `sample` are of y alone.
        reduction: "mean" or "sum".

    Raises:
        ConfigError: a weight that is negative or not `[C]`, a smoothing outside [0, 1], a ζ that is negative or not
            finite, or another reduction.
    """

    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    z_loss: float = 0.0  # 1e-4 in PaLM, §5

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        check_weight("weight", self.weight)
        if self.weight is not None and self.weight.ndim != 1:
            raise ConfigError(
                f"weight must hold one number a class, [C], got shape {tuple(self.weight.shape)}"
            )
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if not (math.isfinite(self.z_loss) and self.z_loss >= 0):
            raise ConfigError(f"z_loss must be finite and at least 0, got {self.z_loss}")

    def _loss(self, z: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(
            z,
            targets if targets.is_floating_point() else targets.long(),
            weight=None if self.weight is None else self.weight.to(z.device),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        if self.z_loss == 0:
            return loss
        squares = _log_z(z).square() * self._scale(z, targets)
        return (loss + self.z_loss * squares.sum()).to(loss.dtype)

    def _log_prob(self, z: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(z, 1, dtype=working_dtype(z))
        if targets.is_floating_point():
            return (log_p * targets).sum(1)
        index, counts = self._index(targets)
        return log_p.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill(~counts, 0)

    def _sample(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return _draw(_softmax(z), generator)

    @property
    def _weighted_by_targets(self) -> bool:
        return True  # they may be ignored

    def _check_outputs(self, outputs: Any) -> None:
        check_tensor("Categorical", outputs, "one tensor of logits [N, C, ...]")
        if outputs.ndim < 2 or outputs.shape[1] == 0:
            raise OutputError(
                f"Categorical reads logits [N, C, ...], got shape {tuple(outputs.shape)}; "
                "one example needs a batch dimension, and one logit for yes or no needs Bernoulli"
            )
        if self.weight is not None and self.weight.shape[0] != outputs.shape[1]:
            raise OutputError(
                f"Categorical has weights of {self.weight.shape[0]} classes, but the logits "
                f"{tuple(outputs.shape)} have {outputs.shape[1]} in dimension 1"
            )

    def _check_targets(self, outputs: Tensor, targets: Any, values: bool) -> None:
        if not isinstance(targets, Tensor):
            raise TargetError(f"Categorical expects its targets in a tensor, got {type(targets).__name__}")
        classes, events = outputs.shape[1], outputs.shape[:1] + outputs.shape[2:]
        if targets.is_floating_point():
            self._check_probabilities(outputs, targets, values)
            return
        if targets.dtype == torch.bool or targets.is_complex():
            raise TargetError(
                f"Categorical expects integer class indices, got {targets.dtype}; call .long() on them"
            )
        if targets.shape != events:
            raise TargetError(
                f"Categorical expects class indices {tuple(events)} for logits {tuple(outputs.shape)}, got "
                f"{tuple(targets.shape)}; the classes are dimension 1 of the logits: where they are the last, flatten "
                "both, logits.flatten(0, -2) and targets.flatten()"
            )
        bounds = value_range(targets) if values else None
        if bounds is None or (bounds[0] >= 0 and bounds[1] < classes):
            return
        bad = targets[(targets < 0) | (targets >= classes)]
        bad = bad[bad != self.ignore_index]
        if bad.numel():
            raise TargetError(
                f"Categorical expects class indices from 0 to {classes - 1} (dimension 1 of the logits has size "
                f"{classes}), or ignore_index={self.ignore_index}; got {bad[0].item()}"
            )

    def _check_probabilities(self, outputs: Tensor, targets: Tensor, values: bool) -> None:
        if targets.shape != outputs.shape:
            raise TargetError(
                f"floating targets are class probabilities, which need the logits' shape {tuple(outputs.shape)}, got "
                f"{tuple(targets.shape)}; if they are class indices, call .long() on them"
            )
        if self.ignore_index >= 0:
            raise TargetError(
                f"ignore_index={self.ignore_index} has no meaning for class probabilities; leave it out, or pass "
                "class indices"
            )
        bounds = value_range(targets) if values else None
        if bounds is not None and not bounds[0] >= 0:
            raise TargetError(f"class probabilities must not be negative, got {bounds[0]:g}")

    def _index(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Class indices that can be looked up, and which of them count."""
        counts = targets != self.ignore_index
        return torch.where(counts, targets, 0).long(), counts

    def _scale(self, z: Tensor, targets: Tensor | None) -> float | Tensor:
        """The scale c s of each event, `[N, 1, ...]`, or one for all."""
        constant = self._constant(z.numel() // z.shape[1])
        if targets is None:
            return constant
        w = None if self.weight is None else self.weight.to(z.device, working_dtype(z))
        eps = self.label_smoothing
        if targets.is_floating_point():
            q = targets.to(working_dtype(z))
            own = q.sum(1, keepdim=True) if w is None else (q * _over_classes(w, z)).sum(1, keepdim=True)
            return constant * ((1 - eps) * own + eps * (1.0 if w is None else w.mean()))
        index, counts = self._index(targets)
        counted = counts.to(working_dtype(z))
        own = counted if w is None else w[index] * counted
        scale = own if w is None or eps == 0 else (1 - eps) * own + eps * w.mean() * counted
        if self.reduction == "mean":
            # A total of 0 has only zeros above it: any divisor will do, and no host is asked.
            scale = scale / own.sum().clamp_min(torch.finfo(own.dtype).tiny)
        return scale.unsqueeze(1)

    def _mass(self, z: Tensor, targets: Tensor | None) -> float | Tensor:
        if targets is None or targets.is_floating_point():
            return z.numel() // z.shape[1]
        index, counts = self._index(targets)
        return counts.sum() if self.weight is None else (self.weight.to(z.device)[index] * counts).sum()

    def _divergence(self, z: Tensor, other: Tensor, targets: Tensor | None) -> Tensor:
        log_p, log_q = torch.log_softmax(z, 1), torch.log_softmax(other, 1)
        scale = self._scale(z, targets)
        weights = scale.squeeze(1) if isinstance(scale, Tensor) else scale
        of_log_z = self.z_loss * (_log_z(z) - _log_z(other)).square().squeeze(1) if self.z_loss else 0.0
        return ((log_p.exp() * (log_p - log_q)).sum(1) + of_log_z) * weights

    def _target_distribution(self, z: Tensor, targets: Tensor) -> Tensor:
        """The distribution t / s that the loss pulls p towards, `[N, C, ...]`; zero where s = 0."""
        dtype, classes = working_dtype(z), z.shape[1]
        w = None if self.weight is None else _over_classes(self.weight.to(z.device, dtype), z)
        if targets.is_floating_point():
            t = targets.to(dtype) * (1 - self.label_smoothing)
        else:
            index, counts = self._index(targets)
            t = torch.zeros(z.shape, dtype=dtype, device=z.device)
            t.scatter_(1, index.unsqueeze(1), (1 - self.label_smoothing) * counts.to(dtype).unsqueeze(1))
        t = t + self.label_smoothing / classes
        t = t if w is None else t * w
        return t / t.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)

    def _product(self, z: Tensor, vector: Tensor, targets: Tensor | None) -> Tensor:
        p = _softmax(z)
        product = (p * self._scale(z, targets)) * vector
        # Out of place, as vmap has it; one pass over memory either way.
        along = product.sum(1 - z.ndim, keepdim=True)
        return torch.addcmul(product, p, along, value=2 * self.z_loss - 1).to(vector.dtype)

    def _sampled_signal(self, z: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        p = _softmax(z)
        drawn = _draw(p, generator).unsqueeze(1)
        if self.z_loss:
            p.mul_(self._sign_of_log_z(p, generator))
        p.scatter_add_(1, drawn, p.new_full((), -1).expand(drawn.shape))
        return p.mul_(_root(self._scale(z, targets))).to(z.dtype)

    def _projected_signal(
        self, z: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        # L = sqrt(c s) (diag(sqrt p) − p sqrt(p)ᵀ), and L Lᵀ = c s (diag(p) − p pᵀ) since sqrt(p)ᵀ sqrt(p) = 1.
        p = _softmax(z)
        signal = with_random_signs(p.sqrt(), generator)
        signal.addcmul_(p, signal.sum(1, keepdim=True), value=-1)
        if self.z_loss:
            signal.addcmul_(p, self._sign_of_log_z(p, generator).sub_(1))
        return signal.mul_(_root(self._scale(z, targets))).to(z.dtype)

    def _empirical_signal(self, z: Tensor, targets: Tensor) -> Tensor:
        p = _softmax(z)
        if self.z_loss:
            p.mul_(_log_z(z).mul_(2 * self.z_loss).add_(1))
        return p.sub_(self._target_distribution(z, targets)).mul_(_root(self._scale(z, targets))).to(z.dtype)

    def _sign_of_log_z(self, p: Tensor, generator: torch.Generator | None) -> Tensor:
        """1 + ε √(2ζ) of each event, ε a fair sign: times p it brings 2ζ p pᵀ into a signal's square."""
        return with_random_signs(torch.full_like(p[:, :1], (2 * self.z_loss) ** 0.5), generator).add_(1)

    def _exact_signals(self, z: Tensor, targets: Tensor | None, examples: int) -> Iterator[Tensor]:
        # diag(p) − p pᵀ has rank C − 1, and so many columns has its Cholesky factor: with the tails rₖ = Σ_{j≥k} pⱼ,
        # column k is √(pₖ/rₖ) (√rₖ₊₁ at k, and −pⱼ/√rₖ₊₁ at every j > k). Sums of positive numbers lose no digits.
        # z-loss adds a column √(2ζ) p.
        if z.numel() == 0:
            return
        n, classes = z.shape[:2]
        layout = (examples, n // examples, classes, z.numel() // (n * classes))
        p, tiny = _softmax(z), torch.finfo(working_dtype(z)).tiny
        scale = torch.as_tensor(self._scale(z, targets), dtype=p.dtype, device=p.device)
        roots = scale.sqrt().expand(n, 1, *z.shape[2:]).reshape(layout[0], layout[1], layout[3])
        p = p.reshape(layout)
        tails = p.flip(2).cumsum(2).flip(2).clamp_min(tiny)
        for row in range(layout[1]):
            for place in range(layout[3]):
                own, tail = p[:, row, :, place], tails[:, row, :, place]
                for k in range(classes - 1):
                    size = roots[:, row, place] * (own[:, k] / tail[:, k]).sqrt()
                    signal = torch.zeros(layout, dtype=z.dtype, device=z.device)
                    column = signal[:, row, :, place]
                    column[:, k] = size * tail[:, k + 1].sqrt() * (own[:, k + 1 :] > 0).any(1)
                    column[:, k + 1 :] = own[:, k + 1 :] * (-size * tail[:, k + 1].rsqrt()).unsqueeze(1)
                    if column.any():
                        yield signal.view(z.shape)
                if self.z_loss and roots[:, row, place].any():
                    signal = torch.zeros(layout, dtype=z.dtype, device=z.device)
                    size = (2 * self.z_loss) ** 0.5 * roots[:, row, place]
                    signal[:, row, :, place] = p[:, row, :, place] * size.unsqueeze(1)
                    yield signal.view(z.shape)


def _softmax(z: Tensor) -> Tensor:
    return torch.softmax(z, 1, dtype=working_dtype(z))


def _log_z(z: Tensor) -> Tensor:
    """Log Z of each event, `[N, 1, ...]`."""
    return torch.logsumexp(z.to(working_dtype(z)), 1, keepdim=True)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """A class `[N, ...]` for each distribution in dimension 1, by inverting the cumulative distribution.

    On a CPU with 1,000 classes it takes a twentieth of the time of `torch.multinomial`. The threshold lies in
    (0, total], and the first class to reach it is taken, so that a class of probability 0 never is.
    """
    cumulative = p.movedim(1, -1).cumsum(-1).contiguous()
    total = cumulative[..., -1:]
    threshold = (1 - torch.rand(total.shape, generator=generator, dtype=p.dtype, device=p.device)) * total
    return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp_(max=p.shape[1] - 1)


def _over_classes(weight: Tensor, z: Tensor) -> Tensor:
    """`[C]` laid along dimension 1 of z."""
    return weight.view(-1, *(1 for _ in z.shape[2:]))


def _root(scale: float | Tensor) -> float | Tensor:
    return scale.sqrt() if isinstance(scale, Tensor) else scale**0.5
