"""How schedules come to act: hooks on an optimiser that cannot be forgotten between steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..matrices import Dense, Scheduled
from .methods import Run, Schedule
from .surgery import base_of, set_module, structured

Group = tuple[Schedule, Mapping[str, Scheduled]]


class Follower:
    """Lets the schedules of a model act around each step of an optimiser; made by :func:`rankwise.follow`.

    It hangs on the optimiser. Gradients that are summed over several batches count as one step, and steps that a
    ``GradScaler`` skips do not count. ``done`` says how many steps it has seen.

    Args:
        model: holds the matrices.
        optimizer: trains them.
        steps: how many steps there will be.
        groups: each schedule with its matrices by name.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, groups: Sequence[Group]
    ) -> None:
        self.model, self.optimizer, self.groups = model, optimizer, list(groups)
        self.steps, self.done, self._skips = steps, 0, False
        self.runs = [
            Run({name: each.matrix for name, each in matrices.items()}, optimizer, steps)
            for _, matrices in groups
        ]
        self.silent = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for schedule, matrices in groups:
            for name, each in matrices.items():
                if each.followed:
                    raise ValueError(f"layer {name} is followed already; stop() the other follower first.")
                schedule.check(each.matrix)
        for each in self._scheduled():
            each.followed = True
        self._settle()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def stop(self) -> None:
        """Act no more; the model refuses to train on unless it is followed again."""
        for handle in self._handles:
            handle.remove()
        for each in self._scheduled():
            each.followed = False

    def finish(self) -> None:
        """Stop for good: leave of each matrix what its schedule leaves, in place.

        Where nothing is left, the layer is what it was before it was adapted. Parameters that remain are new
        ones: make a new optimiser to train on. Nothing needs to be followed any more.
        """
        self.stop()
        weights: dict[int, Any] = {}
        for schedule, matrices in self.groups:
            for name, each in matrices.items():
                rest = schedule.finished(each.matrix)
                if rest is None:
                    self._take_off(each, weights)
                else:
                    set_module(self.model, name, rest.train(each.training))
        self.groups, self.runs = [], []

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers; with the model's and the optimiser's, enough to go on exactly."""
        runs = [{"schedule": s.data(), "state": _copied(r.state)} for (s, _), r in self._pairs()]
        return {"steps": self.steps, "done": self.done, "silent": list(self.silent), "runs": runs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; load the model's and the optimiser's state, too.

        Raises:
            ValueError: if the state is of another length of training, other schedules or other layers.
        """
        mine = [schedule.data() for schedule, _ in self.groups]
        if state["steps"] != self.steps or [run["schedule"] for run in state["runs"]] != mine:
            raise ValueError(
                f"the state is of {state['steps']} steps by {[run['schedule'] for run in state['runs']]}; "
                f"this follower is of {self.steps} by {mine}."
            )
        for run, saved in zip(self.runs, state["runs"], strict=True):
            unknown = saved["state"].keys() - run.matrices.keys()
            if unknown:
                raise ValueError(f"the state is of layers that are not here: {', '.join(sorted(unknown))}.")
        self.done = state["done"]
        self.silent = {name: p for name, p in self.silent.items() if name in state["silent"]}
        for run, saved in zip(self.runs, state["runs"], strict=True):
            run.state = _copied(saved["state"], lambda name, run=run: run.matrices[name].device)
        self._settle()

    def _pairs(self) -> list[tuple[Group, Run]]:
        return list(zip(self.groups, self.runs, strict=True))

    def _scheduled(self) -> list[Scheduled]:
        return [each for _, matrices in self.groups for each in matrices.values()]

    def _settle(self) -> None:
        for (schedule, _), run in self._pairs():
            run.done = self.done
            schedule.settle(run)

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
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
        heard = [name for name, p in self.silent.items() if p.grad is not None and bool(p.grad.any())]
        for name in heard:
            del self.silent[name]
        for (schedule, _), run in self._pairs():
            schedule.before(run)

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._skips:
            return
        self.done += 1
        for (schedule, matrices), run in self._pairs():
            run.done = self.done
            schedule.after(run)
            for each in matrices.values():
                each.acted += 1
        self._settle()

    def _take_off(self, each: Scheduled, weights: dict[int, Any]) -> None:
        """Give the layers that hold a matrix their base back, as an ordinary layer where it is dense."""
        for name, layer in list(structured(self.model).items()):
            if any(part is each for part in layer.matrix.modules()):
                base = base_of(layer.matrix)
                assert base is not None
                layer.matrix = base.matrix
                if isinstance(base.matrix, Dense):
                    plain: Any = layer.dense().train(layer.training).requires_grad_(False)
                    plain.weight = weights.setdefault(id(base), plain.weight)
                    set_module(self.model, name, plain)


def _copied(state: Mapping[str, Mapping[str, Tensor]], device: Callable[[str], Any] = lambda name: None) -> Any:
    """Copy the tensors of a state, each to the device of its layer."""
    return {
        name: {key: value.detach().to(device(name), copy=True) for key, value in tensors.items()}
        for name, tensors in state.items()
    }
