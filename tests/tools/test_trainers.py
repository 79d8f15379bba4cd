"""Inside Lightning, Accelerate and Hugging Face's Trainer a run is that of the ordinary loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import natgrad
from tests.optim.runs import MODES, Run, batches, net, parameters

# Advice of the tools to their users: workers, loggers, devices.
pytestmark = pytest.mark.filterwarnings(
    "ignore:::(torch|lightning|pytorch_lightning|transformers|accelerate|torchmetrics)"
)


class Batched(Dataset):
    """Whole batches as items."""

    def __init__(self, data: list) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, k: int) -> Any:
        return self.data[k]


def loader(data: list) -> DataLoader:
    return DataLoader(Batched(data), batch_size=None, shuffle=False)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_lightning(mode: str, accumulate: int, clip: float | None) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = net(), nn.CrossEntropyLoss()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = natgrad.NaturalGradient(self.net, self.loss, **MODES[mode])
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    data, module = batches(6), Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(data))
    expected = plain(mode, data, accumulate, clip)
    assert torch.equal(parameters(module.net), expected)


def plain(mode: str, data: list, accumulate: int, clip: float | None) -> Tensor:
    run = Run.of("kfac", mode)
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
    for k, batch in enumerate(data):
        if k % accumulate == 0:
            run.optimizer.zero_grad()
        (run.value(batch) / accumulate).backward()
        if (k + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(run.model.parameters(), clip)
            run.optimizer.step()
            schedule.step()
    return parameters(run.model)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate")
    module.state.AcceleratorState._reset_state(True)
    yield module
    module.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_accelerate(accelerate: Any, mode: str, accumulate: int, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    run, data = Run.of("kfac", mode), batches(6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
    model, optimizer, schedule = accelerator.prepare(run.model, run.optimizer, schedule)
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(run.loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert torch.equal(parameters(model), plain(mode, data, accumulate, 0.3))
    accelerator.save_state(tmp_path)
    end = run.train(batches(3, seed=4))
    accelerator.load_state(tmp_path)
    assert torch.equal(run.train(batches(3, seed=4)), end)


@pytest.mark.parametrize("dtype", ["bf16"])
def test_accelerate_in_a_half_type(accelerate: Any, dtype: str) -> None:
    """Autocast is within the model there, and so in the passes of the quadratic model too."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=dtype)
    run, (test,) = Run.of("kfac", "adaptive", net(torch.float32)), batches(1, 400, torch.float32)
    before = run.value(test).item()
    model, optimizer = accelerator.prepare(run.model, run.optimizer)
    for x, y in batches(15, dtype=torch.float32):
        optimizer.zero_grad()
        accelerator.backward(run.loss(model(x), y))
        optimizer.step()
    assert run.value(test).item() < 0.97 * before
    assert run.optimizer.info.rho is not None


def language_model(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        max_position_embeddings=8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return transformers.LlamaForCausalLM(config)


def texts(count: int) -> list[dict[str, Tensor]]:
    """Of which so many tokens are ignored in each."""
    tokens = torch.randint(11, (count, 8), generator=torch.Generator().manual_seed(0))
    ignored = torch.arange(8) < torch.arange(count)[:, None] % 5
    return [{"input_ids": t, "labels": torch.where(i, -100, t)} for t, i in zip(tokens, ignored)]


OPTIONS: dict[str, Any] = {
    "outputs": lambda o: o.logits[:, :-1].flatten(0, 1),
    "targets": lambda labels, **_: labels[:, 1:].flatten(),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_causal_language_model_with_its_loss_inside_is_one_with_the_loss_outside(mode: str) -> None:
    """The mean is over the labels that are not ignored, and so is F: its scale would show in the step."""
    transformers = pytest.importorskip("transformers")
    inside, outside = language_model(transformers), language_model(transformers)
    loss = nn.CrossEntropyLoss()
    optimizers = [
        natgrad.NaturalGradient(inside, natgrad.Categorical(), **OPTIONS, **MODES[mode]),
        natgrad.NaturalGradient(outside, loss, outputs=OPTIONS["outputs"], **MODES[mode]),
    ]
    data = texts(32)
    for start in range(0, 32, 8):
        batch = {key: torch.stack([row[key] for row in data[start : start + 8]]) for key in data[0]}
        for optimizer in optimizers:
            optimizer.zero_grad()
        inside(**batch).loss.backward()
        logits = outside(input_ids=batch["input_ids"]).logits
        loss(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert optimizers[0].info.loss == pytest.approx(optimizers[1].info.loss, rel=1e-5)
    torch.testing.assert_close(parameters(inside), parameters(outside), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer(accumulate: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state(True)
    model, data = language_model(transformers), texts(32)
    start = parameters(model)
    optimizer = natgrad.NaturalGradient(model, natgrad.Categorical(), **OPTIONS)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
    trainer.train()
    assert optimizer.info.step == 4 // accumulate
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert optimizer.info.loss == pytest.approx(float(logged[-1]), rel=0.05)
    assert not torch.equal(parameters(model), start)
    assert torch.isfinite(parameters(model)).all()
    assert {row.rule for row in optimizer.coverage()}.isdisjoint({"fallback", "not seen"})
