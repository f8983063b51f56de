"""Training some parameters of a model: budgets, held-out checks, exact resume."""

import abc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from .checkpoint import load_tree, save_tree
from .fingerprint import digest_of
from .modes import frozen
from .plan import Plan, Progress
from .progress import gauge, tell
from .stepping import Stepping, Whole

Observe = Callable[[int, Mapping[str, float]], None]
SKIPS = 3  # steps in a row whose gradients are not finite


class Piece(abc.ABC):
    """Some data, and what is lowered on it."""

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """How many rows (tokens, samples) count."""

    @abc.abstractmethod
    def loss(self, model: nn.Module) -> Tensor:
        """Return what is lowered, summed over the rows."""


class Follower(Protocol):
    """What has a state that belongs into a checkpoint, such as a schedule that goes with the optimiser."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: nested dictionaries and lists of tensors, numbers, strings and None."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take a state."""
        ...


class Run:
    """One run: the model, what is trained of it, and how far it has come.

    Args:
        model: what is trained, in place.
        trained: the parameters that change, by their names in the model.
        optimizer: over these; its learning rates are the largest ones, scaled along the run.
        plan: budgets and sizes.
        mode: makes the context in which steps are taken, such as evaluation mode.
        word: what errors call that which is lowered.
        buffers: names of other tensors of the model's state that change with the parameters.
        followers: what else goes into a checkpoint, by name.
        beside: what goes into it like the optimizer: as it is now, whatever numbers were the best.
        identity: names the task; a checkpoint of another one is refused.
        describe: says of the model, as JSON, what is in no tensor and may change while it trains.
        file: where the checkpoint is kept, or None.
        writes: whether it is written; where several processes share a run, only one of them does.
        looking: is called before each look at what judges.
        started: ``time.perf_counter()`` when the budget began to run.
        stepping: takes the steps; None collects all gradients first, and clips them as the plan says.
        observe: is called after each step and each look with the number of steps and a few figures by name.

    Raises:
        ValueError: if a checkpoint is damaged or of another task.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        mode: Callable[[], AbstractContextManager[None]],
        *,
        word: str = "loss",
        buffers: Sequence[str] = (),
        followers: Mapping[str, Follower] | None = None,
        beside: Mapping[str, Follower] | None = None,
        identity: str = "",
        describe: Callable[[], str] = str,
        file: Path | None = None,
        writes: bool = True,
        looking: Callable[[], None] | None = None,
        started: float | None = None,
        stepping: Stepping | None = None,
        observe: Observe | None = None,
    ) -> None:
        self.looking, self.writes = looking, writes
        self.model, self.trained, self.optimizer, self.plan = model, dict(trained), optimizer, plan
        self.mode, self.word, self.identity, self.file = mode, word, identity, file
        self.describe, self.buffers, self.followers = describe, tuple(buffers), dict(followers or {})
        self.stateful: dict[str, Any] = {"optimizer": optimizer, **(beside or {}), **self.followers}
        self.started = time.perf_counter() if started is None else started
        self.generator = Generator().manual_seed(plan.seed)
        self.progress = Progress()
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.device = next(model.parameters()).device
        self.random: dict[str, Tensor] | None = None  # of the generators that dropout draws from
        self.train: Sequence[Piece] = ()
        self.held: Sequence[Piece] = ()
        self.stepping = stepping or Whole(optimizer, plan.clip)
        self.observe = observe or (lambda step, figures: None)
        self._keep()
        self.start, self.first = digest_of(self._tensors()), self.described
        self._restore()

    def run(self, train: Sequence[Piece], held: Sequence[Piece]) -> str:
        """Train until the budget is spent or nothing gets better; the model then holds the best numbers seen.

        That is so after an interrupt or an error, too; with ``last`` they are those of the last look, and without
        ``spare`` the present ones.

        Args:
            train: what to train on.
            held: what to judge by; what is best there is what remains.

        Returns:
            why it stopped, in a few words.

        Raises:
            ValueError: if numbers are not finite.
        """
        self.train, self.held = train, held
        try:
            with self._randomness(), self.mode():
                if not self.progress.history:
                    self._look(train=None)
                    self._save()
                return self._loop()
        finally:
            self.optimizer.zero_grad()
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate
            if self.plan.spare:
                self._put(self.best)
                for name, each in self.followers.items():  # what they set belongs to the numbers
                    each.load_state_dict(self.states[name])

    def summary(self) -> dict[str, Any]:
        """Return what a report says of a run that is over."""
        p, first = self.progress, self.progress.history[0]["held_out"]
        return {
            "held_out": {"before": first, "after": p.best},
            "improved": p.best < first,
            "best_step": p.best_step,
            "steps": p.step,
            "rows": p.rows,
            "trained": sum(parameter.numel() for parameter in self.trained.values()),
            "seconds": p.history[-1]["seconds"],
        }

    def _loop(self) -> str:
        losses: list[float] = []
        with gauge("training") as show:
            while True:
                done, p = self._done(), self.progress
                show(done, f"step {p.step}, best {p.best:.4f} of {p.history[0]['held_out']:.4f} nats a row")
                stale = self.plan.patience is not None and p.stale >= self.plan.patience
                if done >= 1 or stale:
                    if p.step > p.history[-1]["step"]:
                        self._look(_mean(losses))
                        self._save()
                    return "the budget is spent" if done >= 1 else f"the held-out {self.word} stopped falling"
                loss = self._step()
                losses += [] if loss is None else [loss]
                if p.step % self.plan.every == 0:
                    self._look(_mean(losses))
                    losses.clear()
                    self._save()

    def _done(self) -> float:
        """How much of the budget is spent."""
        by_steps = 0.0 if self.plan.steps is None else self.progress.step / self.plan.steps
        return max(by_steps, self._seconds() / self.plan.seconds)

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self.started

    def _rate(self) -> float:
        """The share of the learning rate, along the steps, or else along the time."""
        total = self.plan.steps
        return self.plan.rate(
            self._seconds() / self.plan.seconds if total is None else (self.progress.step - 1) / total
        )

    def _step(self) -> float | None:
        """Take one step; returns the mean loss before it, or None if it is skipped."""
        chosen = self._draw()
        rows = sum(self.train[i].rows for i in chosen)
        self.progress.step += 1
        self.progress.rows += rows
        scale = self._rate() * self.progress.share
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        loss, taken = self.stepping.take([lambda i=i: self.train[i].loss(self.model) / rows for i in chosen])
        if not taken:
            self._skip(loss)
            return None
        self.progress.skipped = 0
        self.observe(self.progress.step, {"train": loss, "lr": self.optimizer.param_groups[0]["lr"]})
        return loss

    def _skip(self, loss: float) -> None:
        self.progress.skipped += 1
        at = f"step {self.progress.step}: the {self.word} ({loss}) or a gradient is not finite"
        if self.progress.skipped >= SKIPS:
            raise ValueError(f"{at}, for {SKIPS} steps in a row; lower the learning rate, or use float32.")
        warnings.warn(f"{at}; the step is skipped.", RuntimeWarning, stacklevel=2)

    def _draw(self) -> list[int]:
        """Choose the pieces of a step: every piece once, in random order, then all again."""
        chosen, rows, order = [], 0, self.progress.order
        while rows < self.plan.rows if self.plan.pieces is None else len(chosen) < self.plan.pieces:
            if not order:
                order += torch.randperm(len(self.train), generator=self.generator).tolist()
            chosen.append(order.pop(0))
            rows += self.train[chosen[-1]].rows
        return chosen

    def _look(self, train: float | None) -> None:
        """Judge the model by the held-out data, and keep it if it is the best so far."""
        if self.looking is not None:
            self.looking()
        with frozen(self.model), torch.no_grad():
            total = sum(float(piece.loss(self.model)) for piece in self.held)
        p, held = self.progress, total / sum(piece.rows for piece in self.held)
        if not p.history and not held < float("inf"):
            raise ValueError(f"the {self.word} is not finite before the first step.")
        if not self.plan.spare and not held < float("inf"):  # there are no better numbers to go back to
            raise ValueError(
                f"step {p.step}: the held-out {self.word} is {held}; lower the learning rate, or use float32."
            )
        row = {"step": p.step, "seconds": round(self._seconds(), 1), "rows": p.rows, "train": train}
        p.history.append({**row, "held_out": held if held < float("inf") else None})
        p.stale = 0 if held < p.best else p.stale + 1
        if held < p.best or not self.plan.spare or (self.plan.last and held < float("inf")):
            p.best, p.best_step = held, p.step
            self._keep()
        elif self.plan.back is not None:
            p.share *= self.plan.back
            self._put(self.best)
            self.optimizer.state.clear()
        self.observe(p.step, {"held_out": held})
        tell(f"step {p.step}, {row['seconds']:.0f} s: held-out {self.word} {held:.4f} nats a row")

    def _keep(self) -> None:
        """Remember the model as it is: it is the best one so far."""
        self.best, self.described = self._copy() if self.plan.spare else {}, self.describe()
        self.states = {name: each.state_dict() for name, each in self.followers.items()}

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """Let dropout draw as the seed says, or go on as in the checkpoint; others' random numbers stay."""
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            if self.random is None:
                torch.manual_seed(self.plan.seed)
            else:
                torch.set_rng_state(self.random["cpu"])
                if cuda:
                    torch.cuda.set_rng_state(self.random["cuda"], self.device)
            yield

    def _tensors(self) -> dict[str, Tensor]:
        """Return what changes, as the model holds it now: others may put new tensors in place of buffers."""
        state = self.model.state_dict(keep_vars=True) if self.buffers else {}
        return {**self.trained, **{name: state[name] for name in self.buffers}}

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(values[name])

    def _save(self) -> None:
        if self.file is None or not self.writes:
            return
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        tree = {
            "identity": self.identity,
            "start": self.start,
            "first": self.first,
            "progress": {**vars(self.progress), "seconds": self._seconds()},
            "generator": self.generator.get_state(),
            "random": {"cpu": torch.get_rng_state(), **cuda},
            "trained": self._tensors(),
            "best": self.best,
            "described": self.described,
            "states": self.states,
            "stateful": {name: each.state_dict() for name, each in self.stateful.items()},
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_tree(tree, self.file)

    def _restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.file is None or not self.file.exists():
            return
        tree = load_tree(self.file)
        held = digest_of(tree["best"] or tree["trained"])
        known = ((tree["start"], tree.get("first")), (held, tree.get("described")))
        if tree["identity"] != self.identity or (self.start, self.first) not in known:
            others = _differences((tree["identity"], tree.get("first")), (self.identity, self.first))
            raise ValueError(
                f"{self.file} is about another model, reference, data or setting{others}; "
                "give another folder, or remove it to start anew."
            )
        self.start, self.first = tree["start"], tree["first"]
        self.described, self.states = tree["described"], tree["states"]
        self.progress = Progress(**tree["progress"])
        self.generator.set_state(tree["generator"])
        self.random = tree["random"]
        self.best = {name: value.to(self.device) for name, value in tree["best"].items()}
        self._put(tree["trained"])
        for name, each in self.stateful.items():  # the optimiser first
            each.load_state_dict(tree["stateful"][name])


def _differences(one: Sequence[str | None], other: Sequence[str | None]) -> str:
    """Name the parts in which two identities and descriptions differ, if they have parts."""
    try:
        parts, others = (
            {k: v for text in texts if text for k, v in json.loads(text).items()} for texts in (one, other)
        )
    except ValueError:
        return ""
    names = sorted(name for name in parts.keys() | others.keys() if parts.get(name) != others.get(name))
    return f" (other {', '.join(names)})" if names else ""


def _mean(losses: Sequence[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None
