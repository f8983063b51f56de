"""Language models in the loops of others: Hugging Face's Trainer and Accelerate, stopped and taken up again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama
from torch import nn

from rankwise import Layerwise, Optimizer, parameter_groups
from rankwise.optimizers import galore


def made() -> tuple[Any, Optimizer]:
    model = llama(initializer_range=0.1, vocab_size=64)
    groups = parameter_groups(model, galore(rank=4, every=3), lr=0.02, other_lr=0.005)
    return model, Optimizer(groups, lr=0.02, stack_bytes=0)


def rows() -> list[dict[str, Any]]:
    starts = torch.randint(64, (64, 1), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids} for ids in (starts + torch.arange(12)) % 64]


def same(one: nn.Module, two: nn.Module) -> None:
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_the_trainer_stops_and_goes_on(tmp_path: Path, layerwise: bool):
    """With accumulation, a cosine schedule and its own checkpoints; layer by layer it must not clip."""
    from transformers import Trainer, TrainingArguments

    def train(folder: Path, resume: str | None = None) -> tuple[Any, list[float]]:
        model, optimizer = made()
        layers = Layerwise(optimizer, accumulate=2) if layerwise else None
        arguments = TrainingArguments(
            str(folder),
            max_steps=8,
            save_steps=4,
            logging_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            max_grad_norm=0.0 if layerwise else 1.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows(), optimizers=(optimizer, None))  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        if layers is not None:
            layers.remove()
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    one, losses = train(tmp_path / "one")
    two, _ = train(tmp_path / "two", str(tmp_path / "one" / "checkpoint-4"))
    assert losses[-1] < 0.9 * losses[0]
    same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_accelerate_stops_and_goes_on(tmp_path: Path, layerwise: bool):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def train(parts: range, resume: bool = False, save: bool = False) -> Any:
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer = made()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        layers = Layerwise(optimizer, accumulate=2) if layerwise else None
        wrapped, prepared, schedule = accelerator.prepare(model, optimizer, schedule)
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        for i in parts:
            batch = {key: torch.stack([row[key] for row in rows()[4 * i : 4 * i + 4]]) for key in rows()[0]}
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch).loss)
                prepared.step()
                schedule.step()
                prepared.zero_grad()
        if save:
            accelerator.save_state(str(tmp_path / "state"))
        if layers is not None:
            layers.remove()
        return accelerator.unwrap_model(wrapped)

    whole = train(range(12))
    train(range(6), save=True)
    same(whole, train(range(6, 12), resume=True))
