"""Hugging Face's Trainer: `optimizers=(natgrad.NaturalGradient(...), scheduler)`.

The model computes its loss itself, so the optimiser is given the likelihood, where the logits are in what the model
returns, and where the targets are in what it is called with. A causal language model's loss is the mean over tokens
that have one before them and a label other than −100: position t of the logits belongs to label t + 1.

    python examples/with_trainer.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

import natgrad
from natgrad.lab.losses import compare

WORDS, LENGTH, STRIDES = 17, 12, 4


def shifted_logits(returned: Any) -> Tensor:
    """A row for each token that is predicted."""
    return returned.logits[:, :-1].flatten(0, 1)


def shifted_labels(labels: Tensor, **_: Any) -> Tensor:
    """Which it was; −100 is ignored, as by the model."""
    return labels[:, 1:].flatten()


def for_causal_lm(model: torch.nn.Module, **options: Any) -> natgrad.NaturalGradient:
    """The optimiser of a causal language model that is called with labels."""
    return natgrad.NaturalGradient(
        model, natgrad.Categorical(), outputs=shifted_logits, targets=shifted_labels, **options
    )


def main(
    steps: int = 100, rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), plot: Path | None = None
) -> dict[str, Sequence[float]]:
    """Trains with both optimisers; the loss of every step, by name. AdamW has the best of its rates."""
    runs = {rate: train(steps, rate) for rate in (None, *rates)}
    peers = {f"AdamW, lr={rate:g}": runs[rate] for rate in rates}
    found, said = compare(runs[None], peers, 10, "last ten steps", unit="nats per token", plot=plot)
    print(said)
    return found


def train(steps: int, rate: float | None) -> list[float]:
    """The losses of a run; by natgrad where there is no rate."""
    set_seed(0)
    model = LlamaForCausalLM(tiny())
    with tempfile.TemporaryDirectory() as folder:
        optimizer = for_causal_lm(model) if rate is None else torch.optim.AdamW(model.parameters(), lr=rate)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                per_device_train_batch_size=34,
                max_steps=steps,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=progressions(),
            optimizers=(optimizer, scheduler),
        )
        trainer.remove_callback(PrinterCallback)  # it writes every loss to the terminal
        trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def tiny() -> LlamaConfig:
    """A Llama of two layers."""
    return LlamaConfig(
        vocab_size=WORDS,
        max_position_embeddings=LENGTH,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )


def progressions() -> list[dict[str, Tensor]]:
    """a, a + d, a + 2d, … modulo the number of words: from the third on, each follows from the two before it."""
    positions = torch.arange(LENGTH)
    tokens = [(a + d * positions) % WORDS for a in range(WORDS) for d in range(1, STRIDES + 1)]
    return [{"input_ids": t, "labels": torch.where(positions < 2, -100, t)} for t in tokens]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="natgrad in Hugging Face's Trainer")
    parser.add_argument("--plot", type=Path, help="draw the losses into this file")
    main(plot=parser.parse_args().plot)
