"""Cross-entropy with z-loss, as a module that stands where `torch.nn.CrossEntropyLoss` does."""

from __future__ import annotations

from torch import Tensor, nn

from natgrad.likelihoods.categorical import Categorical


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` plus ζ log² Z of each event, Z = Σₖ exp zₖ, which keeps logits from drifting.

    Chowdhery et al. 2022, "PaLM: scaling language modeling with pathways" (arXiv 2204.02311), §5, with ζ = 1e-4. The
    second term is reduced as the first: ignored events have none, and a class weight counts for both.

    Args:
        weight, ignore_index, reduction, label_smoothing: as torch's; the reduction is "mean" or "sum".
        z_loss: ζ.

    Raises:
        ConfigError: an option that `Categorical` refuses.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.z_loss = z_loss
        self.likelihood()

    def likelihood(self) -> Categorical:
        """The likelihood of which this is the negative log."""
        return Categorical(
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            z_loss=self.z_loss,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits `[N, C, ...]`, in nats.

        Args:
            input: logits.
            target: class indices `[N, ...]`, or probabilities of the logits' shape.

        Raises:
            OutputError: logits without a batch dimension, or not of a floating-point type.
        """
        likelihood = self.likelihood()
        likelihood._check_outputs(input)  # all of `check` would read values, and wait for a GPU
        return likelihood._loss(input, target)

    def extra_repr(self) -> str:
        """What the module was made with."""
        return f"z_loss={self.z_loss}"
