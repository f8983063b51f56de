"""The one optimiser of the project: parameters, each with a transform of its gradient.

Parameters of one shape, type, device and group are stacked and stepped together. Their states live in the stack,
and each parameter's own state is a view of it, so nothing is copied from step to step, and what is saved does not
show how parameters were stacked.

To step layer by layer, a hook calls ``step_one(param)`` when the gradient of a parameter is complete, and frees
it: it is the same transform with a stack of one.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .groups import Group, as_group, check_group, restored, with_written
from .kernels import check_compiler, compiling
from .parts import Part, agreed, energy, first_not_finite, part_of
from .stacked import (
    Stack,
    each_direction,
    joined,
    owned,
    read_only,
    stacked_gradients,
    stacked_values,
    together,
)
from .states import State, described, leaves, map_state
from .transforms import Transform, blank_state, working_type
from .writing import Nearest, Write


class Optimizer(torch.optim.Optimizer):
    """Steps each parameter by its transform: ``p -= lr * weight_decay * p``, then ``p -= lr * direction``.

    Groups have ``lr`` and ``weight_decay``, which schedulers may change. Parameters without a gradient are left
    out of a step. Where a gradient is not finite, or so large that its squares are not, the step raises before
    anything has changed.

    Parameters may be DTensors, as FSDP2's ``fully_shard`` makes them: then all processes call ``step`` together,
    and what a transform must see of others is exchanged (see :mod:`rankwise.core.parts`). States of Adam, SGD and
    signs are shared out as the parameters are; those of other transforms are whole in each process.

    Args:
        params: pairs of parameters and a transform, or groups with ``params``, ``transform`` and perhaps ``lr``
            and ``weight_decay``. Parameters may be named, as in ``model.named_parameters()``.
        lr: the length of steps.
        weight_decay: decoupled from the direction.
        stack_bytes: the most that the gradients of a stack may take; a larger one is stepped alone, not copied.
            If None, 1 MiB on a CPU, where only small matrices gain, and 64 MiB elsewhere.
        write: how steps are written, such as :class:`rankwise.StochasticRounding`.
        compiled: let ``torch.compile`` make one pass over memory of what Adam does to each number, alone or in a
            subspace. The first steps wait for the compiler; numbers differ by rounding.

    Raises:
        ValueError: if an argument is out of range, or parameters are not real floating-point numbers, or sharded
            in a way that is not supported.
        RuntimeError: if steps are to be compiled, and nothing can be compiled here.

    >>> from rankwise.optimizers import adam, galore
    >>> model = torch.nn.Linear(64, 32)
    >>> optimizer = Optimizer([(model.parameters(), galore(rank=4))], lr=0.01)
    >>> model(torch.ones(64)).square().sum().backward()
    >>> optimizer.step()
    >>> list(optimizer.state_dict()["state"])
    [0, 1]
    """

    within_backward = False  # whether Layerwise steps parameters in the backward pass

    def __init__(
        self,
        params: Iterable[tuple[Any, Transform] | Group],
        *,
        lr: float,
        weight_decay: float = 0.0,
        stack_bytes: int | None = None,
        write: Write = Nearest(),  # noqa: B008 (frozen)
        compiled: bool = False,
    ) -> None:
        if not isinstance(write, Write):
            raise TypeError(f"write must be an object such as StochasticRounding(), got {write!r}.")
        self.stack_bytes, self.write, self.compiled = stack_bytes, write, compiled
        self._forget()
        if isinstance(params, Tensor):
            raise ValueError("give pairs of parameters and a transform: [(model.parameters(), adam())].")
        groups = [as_group(each) for each in params]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        if compiled:
            for device in {param.device for group in self.param_groups for param in group["params"]}:
                check_compiler(device)

    def add_param_group(self, param_group: Group | tuple[Any, Transform]) -> None:
        """Add parameters, as a pair or as a group.

        Raises:
            ValueError: as for a new optimiser.
        """
        group = as_group(param_group)
        before = len(self.param_groups)
        super().add_param_group(group)
        try:
            check_group(self.param_groups[before])
            for param in self.param_groups[before]["params"]:
                if part_of(param, group["transform"]).layout and not isinstance(self.write, Nearest):
                    raise ValueError("steps into sharded parameters are rounded to nearest; leave write out.")
                self.write.init(param, torch.tensor([0]))
                if group["transform"].constrains and self.write.read([param])[0] is not param:
                    raise ValueError("weights that are kept as integers cannot be constrained by a transform.")
        except ValueError:
            del self.param_groups[before:]
            raise
        self._forget()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: computes gradients and returns the loss.

        Raises:
            ValueError: if a gradient is sparse, or a transform cannot begin with the values of a parameter; no
                parameter has changed.
            FloatingPointError: if a gradient, or the sum of its squares, is not finite, in any process that
                shares parameters; no parameter and no state has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check([p for group in self.param_groups for p in group["params"] if p.grad is not None])
        stepped = [
            (group, each) for group, members in self._stackable() for each in together(members, self.state)
        ]
        self._begin([params for _, params in stepped])
        for group, params in stepped:
            self._advance(group, params)
        return loss

    @torch.no_grad()
    def step_one(self, param: Tensor, reduced: Tensor | None = None) -> None:
        """Step one parameter alone; for hooks. No hook of ``step`` is called, so that replicas exchange nothing.

        Args:
            param: has a gradient, unless ``reduced`` is given.
            reduced: a sum of what :meth:`reduce_one` returned since its last step, in place of the gradient.

        Raises:
            ValueError: if it is not one of the optimiser's, or its gradient is missing or sparse.
            FloatingPointError: if its gradient is not finite.
        """
        group = self._group_of(param, reduced is None)
        if reduced is None:
            self._check([param])
        self._advance(group, [param], reduced)

    @torch.no_grad()
    def reduce_one(self, param: Tensor, *, check: bool = True) -> Tensor | None:
        """Return the part of a parameter's gradient that its next step needs, where that is linear and smaller.

        Args:
            param: has a gradient.
            check: whether to look if that is finite.

        Returns:
            a new tensor, or None if the next step needs the whole gradient; see :meth:`Transform.reduce`.

        Raises:
            ValueError: as :meth:`step_one`.
            FloatingPointError: as :meth:`step_one`.
        """
        self._group_of(param, True)
        if check:
            self._check([param])
        part = self._part(param)
        if not param.numel() or part.layout:
            return None
        stack = self._stacked([part])
        return part.transform.reduce(stacked_gradients([part]), stack.state, stack.seen(self.write))

    def _group_of(self, param: Tensor, needs_gradient: bool) -> Group:
        self._stackable()
        if param not in self._places or (needs_gradient and param.grad is None):
            raise ValueError("give a parameter of this optimiser that has a gradient.")
        return self.param_groups[self._places[param][0]]

    def traffic(self) -> int:
        """Count the bytes of gradients, whole or reduced, that processes exchanged for the last steps.

        Those that a backward pass exchanges, as FSDP2's does, and flags are not counted.
        """
        return sum(part.exchanged for part in self._parts.values())

    def state_bytes(self) -> int:
        """Count the bytes that all states will take in this process once every parameter has been stepped."""
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return sum(leaf.nbytes for param in params for leaf in leaves(self._blank(param)))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values in torch's layout, which ``torch.load(weights_only=True)`` reads."""
        found = super().state_dict()
        places = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        parts = {number: self._part(param) for number, param in enumerate(places)}
        found["state"] = {
            number: map_state(parts[number].saved, state) if isinstance(number, int) else state
            for number, state in found["state"].items()
        }
        groups = [{**group, "transform": described(group["transform"])} for group in found["param_groups"]]
        return {**found, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, exactly: each number keeps its type, also beside half-precision parameters.

        Raises:
            ValueError: if it is of other groups, another transform or other shapes.
        """
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(f"the state has {len(saved)} groups, the optimiser {len(self.param_groups)}.")
        transforms = [group["transform"] for group in self.param_groups]
        for i, (group, transform) in enumerate(zip(saved, transforms, strict=True)):
            if group.get("transform") != described(transform):
                raise ValueError(
                    f"the state of group {i} belongs to {group.get('transform')}, not to {described(transform)}."
                )
        groups = [{**group, "transform": transform} for group, transform in zip(saved, transforms, strict=True)]
        numbers = [number for group in saved for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        if len(numbers) != len(params):
            raise ValueError(f"the state is of {len(numbers)} parameters, the optimiser has {len(params)}.")
        states = {
            param: restored(self._blank(param), self._part(param), state_dict["state"][number], number)
            for number, param in zip(numbers, params, strict=True)
            if number in state_dict["state"]
        }
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        self.state.update(states)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "stack_bytes": self.stack_bytes,
            "write": self.write,
            "compiled": self.compiled,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)

    def _forget(self) -> None:
        """Drop all that follows from groups and states."""
        self._members: list[tuple[Group, list[Tensor]]] = []
        self._places: dict[Tensor, tuple[int, int]] = {}  # group and number of each parameter
        self._parts: dict[Tensor, Part] = {}
        self._stacks: dict[Tensor, Stack] = {}
        self._blanks: dict[Any, State] = {}

    def _stackable(self) -> list[tuple[Group, list[Tensor]]]:
        """Return which parameters may be stacked, in an order that depends on nothing but the groups."""
        if not self._members:
            numbers = itertools.count()
            for i, group in enumerate(self.param_groups):
                alike: dict[Any, list[Tensor]] = {}
                for param in group["params"]:
                    self._places[param] = i, next(numbers)
                    part = self._parts[param] = part_of(param, group["transform"])
                    if param.numel():
                        kind = (param.shape, param.dtype, param.device, part.layout)
                        alike.setdefault(kind, []).append(param)
                for same in alike.values():
                    usual = 2**20 if same[0].device.type == "cpu" else 2**26
                    room = usual if self.stack_bytes is None else self.stack_bytes
                    most = 1 if self._parts[same[0]].alone else max(1, room // same[0].nbytes)
                    self._members += [(group, same[j : j + most]) for j in range(0, len(same), most)]
        return self._members

    def _part(self, param: Tensor) -> Part:
        self._stackable()
        return self._parts[param]

    def _check(self, params: list[Tensor]) -> None:
        """Raise unless all gradients can be used; sums of squares tell whether one must look closer."""
        parts = [self._part(param) for param in params]
        grads: list[Tensor] = [part.own_gradient for part in parts if part.own_gradient is not None]
        if any(grad.is_sparse for grad in grads):
            raise ValueError("gradients are sparse; build the embedding with sparse=False.")
        sums: dict[torch.device, list[Tensor]] = {}
        for grad in grads:
            sums.setdefault(grad.device, []).append(energy(grad))
        fine = all(bool(torch.stack([s.float() for s in each]).isfinite().all()) for each in sums.values())
        wrong = None if fine else first_not_finite(params, grads)
        if not agreed(wrong is None, parts):
            where = "a parameter in another process" if wrong is None else self.name_of(wrong)
            raise FloatingPointError(
                f"the gradient of {where}, or the sum of its squares, is not finite; nothing was changed. Skip "
                "this step (zero_grad and go on), lower lr, clip gradients, or with float16 use a GradScaler."
            )

    def _begin(self, stacks: Sequence[list[Tensor]]) -> None:
        """Make all states that are missing, so that one that cannot be made stops the step before it begins."""
        fresh = {p for params in stacks for p in params if p not in self.state}
        try:
            for params in stacks:
                if fresh.intersection(params):
                    self._stacked([self._part(p) for p in params])
        except ValueError:
            for param in fresh:
                self.state.pop(param, None)
            raise

    def name_of(self, param: Tensor) -> str:
        """Return the name of a parameter, if it has one, its place among all and its shape; for messages."""
        self._stackable()
        group, number = self._places[param]
        names = self.param_groups[group].get("param_names")
        about = f"parameter {number} of shape {tuple(param.shape)}"
        before = sum(len(each["params"]) for each in self.param_groups[:group])
        return f"{names[number - before]} ({about})" if names else about

    def _advance(self, group: Group, params: list[Tensor], reduced: Tensor | None = None) -> None:
        """Step parameters of one shape together."""
        if not params or not params[0].numel():
            return
        parts = [self._part(param) for param in params]
        transform, lr, decay = parts[0].transform, float(group["lr"]), float(group["weight_decay"])
        stack = self._stacked(parts)
        values = stack.seen(self.write)
        if reduced is None and len(parts) == 1:
            reduced = parts[0].reduced(lambda grad: transform.reduce(grad, stack.state, values))
        with compiling(self.compiled):
            if reduced is None:
                direction = transform.update_unformed(stacked_gradients(parts), stack.state, values)
            else:
                direction = transform.update_reduced(reduced, stack.state, values)
        own, written = [part.own for part in parts], stack.state.get("write", {})
        self.write(own, each_direction(parts, direction), 1 - lr * decay, -lr, written)
        if transform.constrains:
            now = joined([part.value() for part in parts], transform).to(direction.dtype)
            bounded = transform.constrain(now, stack.state, lr, decay)
            self.write.put(own, owned(parts, bounded), written)

    def _stacked(self, parts: list[Part]) -> Stack:
        """Return the states of parameters in one stack, of which the states of each are views.

        One alone of a larger stack stays a part of it. What users have put in place of a state counts.
        """
        params = [part.param for part in parts]
        stack = self._stacks.get(params[0])
        if stack is not None and all(
            self._stacks.get(p) is stack and stack.knows(p, self.state.get(p)) for p in params
        ):
            if stack.holds(params):
                return stack
            if len(params) == 1:
                return stack.alone(params[0])
        states = [self.state[part.param] or self._first(part) for part in parts]
        if len(params) == 1:
            whole = map_state(lambda value: value.unsqueeze(0), states[0])
            self.state[params[0]] = states[0]
        else:
            whole = map_state(stacked_values, *states)
            for i, param in enumerate(params):
                self.state[param] = map_state(lambda value, i=i: value[i], whole)
        shape = parts[0].transform.shaped(parts[0].blank().expand(len(params), *parts[0].shape))
        handed = {param: leaves(self.state[param]) for param in params}
        stack = Stack(tuple(parts), read_only(whole), shape, handed)
        self._stacks.update(dict.fromkeys(params, stack))
        return stack

    def _first(self, part: Part) -> State:
        """Return the state of one parameter before its first step."""
        index = torch.tensor([self._places[part.param][1]])
        value = joined([part.like()], part.transform).to(working_type(part.param.dtype))
        state = with_written(part.transform.init(value, index), self.write.init(part.param, index))
        return map_state(lambda leaf: leaf.squeeze(0), state)

    def _blank(self, param: Tensor) -> State:
        """Return the first state (1, ...) of one parameter on the meta device; those of one kind share it."""
        part = self._part(param)
        if not param.numel():
            return {}
        like = part.blank()
        kind = (self._places[param][0], param.shape, param.dtype, like.shape, like.stride())
        if kind not in self._blanks:
            written = self.write.init(param, torch.tensor([0]))
            self._blanks[kind] = with_written(blank_state(part.transform, like), written)
        return self._blanks[kind]
