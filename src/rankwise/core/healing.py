"""Training a few stored numbers of a model towards a reference: budgets, held-out checks, exact resume."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .checkpoint import load_tree, save_tree
from .fingerprint import digest_of
from .progress import gauge, track
from .statistics import Batch
from .targets import Target, target_of
from .watch import call_of, frozen

SKIPS = 3  # steps in a row whose gradients are not finite
WARMUP = 0.05  # of the budget


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to train, on how much at a time, and how often to look at the held-out data.

    Args:
        seconds: the time budget, everything counted.
        steps: the largest number of steps, or None for as many as the time allows.
        rows: tokens (rows, samples) a step.
        every: steps between two looks at the held-out data, each followed by a checkpoint.
        patience: stop after so many looks without a better one.
        seed: of the order of the data.
        autocast: run the model in this type; the trained numbers keep theirs.
    """

    seconds: float = 600.0
    steps: int | None = None
    rows: int = 1024
    every: int = 16
    patience: int = 4
    seed: int = 0
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"the budget must be a positive number of seconds, got {self.seconds}.")
        for name in ("steps", "rows", "every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")


@dataclass
class Progress:
    """Where a healing stands: all of it is in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    rows: int = 0
    skipped: int = 0
    stale: int = 0
    best_step: int = 0
    best: float = float("inf")
    order: list[int] = field(default_factory=list)  # what is left of this pass over the data
    history: list[dict[str, Any]] = field(default_factory=list)


class Healing:
    """One run: the model, what is trained of it, the data, and how far it has come.

    Args:
        model: what is trained, in place.
        reference: what it is to agree with.
        trained: the parameters that change, by name.
        optimizer: over these; its learning rates are the largest ones, scaled down along the budget.
        train: batches to train on.
        held: batches to judge by; what is best there is what remains.
        plan: budgets and sizes.
        identity: names the task; a checkpoint of another one is refused.
        folder: where the checkpoint is kept, or None.
        started: ``time.perf_counter()`` when the budget began to run.

    Raises:
        ValueError: if a checkpoint is damaged or of another task, or numbers are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        train: Sequence[Batch],
        held: Sequence[Batch],
        plan: Plan,
        *,
        identity: str = "",
        folder: Path | None = None,
        started: float | None = None,
    ) -> None:
        self.model, self.trained, self.optimizer, self.plan = model, dict(trained), optimizer, plan
        self.train, self.held, self.identity = train, held, identity
        self.file = None if folder is None else folder / "healing.safetensors"
        self.started = time.perf_counter() if started is None else started
        self.generator = Generator().manual_seed(plan.seed)
        self.progress = Progress()
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.best = self._copy()
        self.start = digest_of(self.best)
        self.device = next(model.parameters()).device
        self._restore()
        self.reference, self.targets = reference, dict[int, Target]()  # of training batches once they are drawn
        self.held_targets = [self._target(batch) for batch in track(held, "the reference")]

    def run(self) -> str:
        """Train until the budget is spent or nothing gets better; the model then holds the best numbers seen.

        That is so after an interrupt or an error, too.

        Returns:
            why it stopped, in a few words.
        """
        try:
            with self._training():
                if not self.progress.history:
                    self._look(train=None)
                    self._save()
                return self._loop()
        finally:
            self._put(self.best)

    def _loop(self) -> str:
        losses: list[float] = []
        with gauge("healing") as show:
            while True:
                done, p = self._done(), self.progress
                show(done, f"step {p.step}, best {p.best:.4f} of {p.history[0]['held_out']:.4f} nats a row")
                if done >= 1 or p.stale >= self.plan.patience:
                    if losses:
                        self._look(sum(losses) / len(losses))
                        self._save()
                    return "the budget is spent" if done >= 1 else "the held-out divergence stopped falling"
                losses.append(self._step())
                if p.step % self.plan.every == 0:
                    self._look(sum(losses) / len(losses))
                    losses.clear()
                    self._save()

    def _done(self) -> float:
        """How much of the budget is spent."""
        by_steps = 0.0 if self.plan.steps is None else self.progress.step / self.plan.steps
        return max(by_steps, self._seconds() / self.plan.seconds)

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self.started

    def _rate(self) -> float:
        """The share of the learning rate: up, then down to zero along the steps, or else along the time."""
        total = self.plan.steps
        done = self._seconds() / self.plan.seconds if total is None else (self.progress.step - 1) / total
        return min(1.0, (done + 1e-3) / WARMUP) * max(1 - done, 0.0)

    def _step(self) -> float:
        """Take one step; returns the mean divergence before it."""
        chosen = self._draw()
        rows = sum(self._target_at(i).rows for i in chosen)
        self.optimizer.zero_grad()
        loss = 0.0
        for i in chosen:
            mean = self._divergence(self.train[i], self.targets[i]) / rows
            mean.backward()
            loss += float(mean.detach())
        self.progress.step += 1
        self.progress.rows += rows
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        if not all(bool(g.isfinite().all()) for g in gradients) or not torch.tensor(loss).isfinite():
            return self._skip(loss)
        self.progress.skipped = 0
        scale = self._rate()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        self.optimizer.step()
        return loss

    def _skip(self, loss: float) -> float:
        self.progress.skipped += 1
        at = f"step {self.progress.step}: the divergence ({loss}) or a gradient is not finite"
        if self.progress.skipped >= SKIPS:
            raise ValueError(f"{at}, for {SKIPS} steps in a row; lower the learning rate, or use float32.")
        warnings.warn(f"{at}; the step is skipped.", RuntimeWarning, stacklevel=2)
        return self.progress.best

    def _draw(self) -> list[int]:
        """Choose the batches of a step: every batch once, in random order, then all again."""
        chosen, rows, order = [], 0, self.progress.order
        while rows < self.plan.rows:
            if not order:
                order += torch.randperm(len(self.train), generator=self.generator).tolist()
            chosen.append(order.pop(0))
            rows += self._target_at(chosen[-1]).rows
        return chosen

    def _look(self, train: float | None) -> None:
        """Judge the model by the held-out data, and keep it if it is the best so far."""
        with torch.no_grad():
            pairs = zip(self.held, self.held_targets, strict=True)
            total = sum(float(self._divergence(batch, target)) for batch, target in pairs)
        p, held = self.progress, total / sum(target.rows for target in self.held_targets)
        if not p.history and not held < float("inf"):
            raise ValueError("the divergence from the reference is not finite before the first step.")
        row = {"step": p.step, "seconds": round(self._seconds(), 1), "rows": p.rows, "train": train}
        p.history.append({**row, "held_out": held if held < float("inf") else None})
        p.stale += 1
        if held < p.best:
            p.best, p.best_step, p.stale, self.best = held, p.step, 0, self._copy()

    def _divergence(self, batch: Batch, target: Target) -> Tensor:
        return target.divergence(self._output(self.model, batch), batch)

    def _target(self, batch: Batch) -> Target:
        """Ask the reference."""
        with frozen(self.reference), torch.no_grad():
            return target_of(self._output(self.reference, batch), batch)

    def _target_at(self, i: int) -> Target:
        if i not in self.targets:
            self.targets[i] = self._target(self.train[i])
        return self.targets[i]

    def _output(self, model: nn.Module, batch: Batch) -> Any:
        arguments, options = call_of(batch, self.device)
        cast = self.plan.autocast
        with torch.autocast(self.device.type, dtype=cast or torch.bfloat16, enabled=cast is not None):
            return model(*arguments, **options)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Let the gradients of the trained parameters alone be computed, in evaluation mode (no dropout)."""
        with frozen(self.model):
            for parameter in self.trained.values():
                parameter.requires_grad_(True)
            try:
                yield
            finally:
                self.optimizer.zero_grad()

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(values[name])

    def _save(self) -> None:
        if self.file is None:
            return
        tree = {
            "identity": self.identity,
            "start": self.start,
            "progress": {**vars(self.progress), "seconds": self._seconds()},
            "generator": self.generator.get_state(),
            "trained": self._copy(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
        }
        save_tree(tree, self.file)

    def _restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.file is None or not self.file.exists():
            return
        tree = load_tree(self.file)
        known = self.start in (tree["start"], digest_of(tree["best"]))
        if tree["identity"] != self.identity or not known:
            raise ValueError(
                f"{self.file} is about another model, reference, data or setting; "
                "give another folder, or remove it to start anew."
            )
        self.start = tree["start"]
        self.progress = Progress(**tree["progress"])
        self.generator.set_state(tree["generator"])
        self.best = {name: value.to(self.trained[name].device) for name, value in tree["best"].items()}
        self.optimizer.load_state_dict(tree["optimizer"])
        self._put(tree["trained"])


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Keep the parameters of a model in float32 where they are shorter; round them at the end."""
    kinds = {p: p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    try:
        for parameter in kinds:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, kind in kinds.items():
            parameter.data = parameter.data.to(kind)
