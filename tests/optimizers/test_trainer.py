"""The optimiser under Hugging Face's Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankwise import Optimizer
from rankwise.optimizers import galore


class Regression(nn.Module):
    """A model in the form that the Trainer wants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: Any = None, labels: Any = None) -> dict[str, Any]:
        made = self.layers(x)
        return {"loss": (made - labels).square().mean(), "logits": made}


@pytest.mark.slow
def test_the_trainer_resumes_exactly(tmp_path: Path):
    """Its own checkpoints and schedulers, in the middle of a period of refreshes."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(1)
    data = [
        {"x": torch.randn(6, generator=generator), "labels": torch.randn(5, generator=generator)}
        for _ in range(32)
    ]

    def train(folder: Path, resume: str | None = None) -> Regression:
        model = Regression()
        optimizer = Optimizer([(model.parameters(), galore(rank=2, every=3))], lr=1e-2, weight_decay=0.1)
        options: dict[str, Any] = {"max_steps": 8, "save_steps": 4, "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(str(folder), report_to=[], per_device_train_batch_size=4, **options)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        return model

    one = train(tmp_path / "one")
    two = train(tmp_path / "two", str(tmp_path / "one" / "checkpoint-4"))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
