"""How schedules come to act: hooks on an optimiser that cannot be forgotten between steps."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..matrices import Scheduled, Several
from .methods import Course, Schedule, State
from .report import Report
from .several import forget, layers_with, take_off
from .surgery import base_of, restack, set_module, structured
from .ties import declare_ties

Group = tuple[Schedule, Mapping[str, Scheduled]]


class Follower:
    """Lets the schedules of a model act around each step of an optimiser; made by :func:`rankwise.follow`.

    It hangs on the optimiser. Gradients that are summed over several batches count as one step, and steps that a
    ``GradScaler`` skips do not count. ``done`` says how many steps it has seen, ``moved`` how many of them had a
    learning rate above zero, and ``silent`` which parameters had no other gradient than zero in those, and
    ``seen`` in how many they had one.

    Args:
        model: holds the matrices.
        optimizer: trains them.
        steps: how many steps there will be.
        groups: each schedule with its matrices by name.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, groups: Sequence[Group]
    ) -> None:
        _check_whole(optimizer)
        self.model, self.optimizer, self.groups = model, optimizer, list(groups)
        self.steps, self.done, self.moved, self._skips = steps, 0, 0, False
        self.seen: dict[str, int] = {}
        self.silent = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.courses: list[Course] = []
        for schedule, matrices in groups:
            for name, each in matrices.items():
                if each.followed:
                    raise ValueError(f"layer {name} is followed already; stop() the other follower first.")
                schedule.check(each.matrix)
            inner = {name: each.matrix for name, each in matrices.items()}
            self.courses.append(Course(schedule, inner, optimizer, steps))
        self._several = list(layers_with(model).values())
        self._follow(True)
        self._settle()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def stop(self) -> None:
        """Act no more; the model refuses to train on unless it is followed again."""
        for handle in self._handles:
            handle.remove()
        self._follow(False)

    def finish(self) -> Report:
        """Stop for good, and leave of each matrix what its schedule leaves, as :func:`rankwise.finish` does.

        It warns if a schedule has not come to what it was asked for, as training ended before.
        """
        self.warn_early()
        self.stop()
        return finished(self.model, self.groups)

    def warn_early(self) -> None:
        """Warn if a schedule has not come to what it was asked for."""
        for course in self.courses:
            needed = course.schedule.needed(course.steps)
            if self.done < needed:
                warnings.warn(
                    f"{type(course.schedule).__name__} comes to its budget at step {needed} of {course.steps}, "
                    f"but training ended after {self.done}: matrices have the ranks of then. Give follow the "
                    "number of steps that are taken.",
                    stacklevel=3,
                )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; with the model's and the optimiser's, enough to go on exactly."""
        states = [_copied(course.state) for course in self.courses]
        counts = {"done": self.done, "moved": self.moved, "silent": {n: self.seen.get(n, 0) for n in self.silent}}
        return {**self._about(), **counts, "states": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; load the model's and the optimiser's state first.

        Raises:
            ValueError: if the state is of another length of training, other schedules or other layers.
        """
        wrong = [key for key, value in self._about().items() if state.get(key) != value]
        if wrong:
            key = wrong[0]
            raise ValueError(f"the state has other {key}: {state.get(key)}, not {self._about()[key]}.")
        self.done = state["done"]
        self.moved, self.seen = state["moved"], dict(state["silent"])
        self.silent = {name: p for name, p in self.silent.items() if name in state["silent"]}
        for course, saved in zip(self.courses, state["states"], strict=True):
            course.state = _copied(saved, {name: each.device for name, each in course.matrices.items()})
        self._settle()

    def _about(self) -> dict[str, Any]:
        """Say what a state belongs to."""
        layers = [list(course.matrices) for course in self.courses]
        kinds = [course.schedule.data() for course in self.courses]
        return {"steps": self.steps, "schedules": kinds, "layers": layers}

    def _follow(self, follow: bool) -> None:
        for _, matrices in self.groups:
            for each in matrices.values():
                each.followed = follow

    def _settle(self) -> None:
        for course in self.courses:
            course.done = self.done
            course.schedule.settle(course)

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        _check_whole(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimiser
        if closure is not None:
            raise ValueError(
                "adapters that follow a schedule need gradients before optimizer.step(): give it no closure."
            )
        found = getattr(optimizer, "found_inf", None)  # a GradScaler leaves skipping to fused optimisers
        self._skips = found is not None and bool(found)
        if self._skips:
            return
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ValueError(
                "gradients are still scaled: call scaler.unscale_(optimizer) before scaler.step(optimizer)."
            )
        self._check_used()
        self._hear(any(group.get("lr", 1.0) > 0 for group in optimizer.param_groups))
        for course in self.courses:
            course.schedule.before(course)

    def _check_used(self) -> None:
        """Raise if a step is taken for other adapters than those whose schedules act."""
        idle = {id(part) for several in self._several for part in several.idle()}
        for _, matrices in self.groups:
            for name, each in matrices.items():
                if id(each) in idle:
                    raise ValueError(
                        f"layer {name} is followed, but its adapter is not in use: have it in use while it "
                        "trains, see rankwise.use, or stop() the follower."
                    )

    def _hear(self, moves: bool) -> None:
        """Note which parameters have a gradient in a step, and whether it moves any."""
        self.moved += moves
        for name, p in list(self.silent.items()):
            if p.grad is not None and bool(p.grad.any()):
                del self.silent[name]
            elif p.grad is not None and moves:
                self.seen[name] = self.seen.get(name, 0) + 1

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._skips:
            return
        self.done += 1
        for course, (_, matrices) in zip(self.courses, self.groups, strict=True):
            course.done = self.done
            course.schedule.after(course)
            for each in matrices.values():
                each.acted += 1
        self._settle()


def _check_whole(optimizer: torch.optim.Optimizer) -> None:
    """Raise if there are no gradients any more when the optimiser's step begins."""
    if getattr(optimizer, "within_backward", False):
        raise ValueError(
            "schedules act between the backward pass and the step, which are one with Layerwise: remove() it, or "
            "do not follow."
        )


def finished(model: nn.Module, groups: Sequence[Group]) -> Report:
    """Leave of each matrix what its schedule leaves, in place; see :func:`rankwise.finish`."""
    rows, empty = [], []
    for schedule, matrices in groups:
        for name, each in matrices.items():
            rest = schedule.finished(each.matrix)
            rows.append({"name": name, "before": each.rank, "rank": 0 if rest is None else rest.rank})
            if rest is None:
                empty.append(each)
            else:
                set_module(model, name, rest.train(each.training))
    plain: dict[int, nn.Module] = {}
    for each in empty:  # at last, since other names may change by it
        _take_off(model, each, plain)
    restack(model)
    declare_ties(model)
    return Report(f"{len(rows)} matrices are finished", rows, "matrices", {"rank": sum(r["rank"] for r in rows)})


def _take_off(model: nn.Module, each: Scheduled, plain: dict[int, nn.Module]) -> None:
    """Take the adapter that a matrix is part of off the layers that hold it."""
    held = {path: layer.matrix for path, layer in structured(model).items() if _holds(layer.matrix, each)}
    names = {
        id(matrix): next(name for name, expression in matrix.adapters.items() if _holds(expression, each))
        for matrix in held.values()
        if isinstance(matrix, Several)
    }
    for path, matrix in held.items():
        if isinstance(matrix, Several):
            forget(model, path, names[id(matrix)], plain)
        else:
            base = base_of(matrix)
            assert base is not None
            take_off(model, path, base, plain)


def _holds(matrix: nn.Module, each: Scheduled) -> bool:
    return any(part is each for part in matrix.modules())


def _copied(state: State, devices: Mapping[str, torch.device] | None = None) -> State:
    """Copy the tensors of a state, each to the device of its layer."""
    return {
        name: {
            k: v.detach().to(v.device if devices is None else devices[name], copy=True)
            for k, v in tensors.items()
        }
        for name, tensors in state.items()
    }
