"""Which layers of a model are matrices, and how a structured matrix takes the place of one."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..matrices import Base, Dense, Scheduled, Several, StructuredMatrix
from .extended import Extended, refuse_extended
from .methods import check_function
from .stacks import ChoosesExperts, Stack, one_by_one, stack_at, stacks, stacks_of
from .standing import Standing
from .views import VIEWS, EmbeddingView, LinearView, SliceView, View, parameter_of, view_of

Where = Callable[[str, nn.Module], bool]
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
MOVED = (
    "Accelerate moves the weights of this model between devices or the disk; load it whole, without device_map "
    "or cpu_offload, or change it before they are given out."
)


class StructuredLinear(nn.Module):
    """A linear layer, or a convolution seen as one, whose weight is a structured matrix.

    Args:
        matrix: takes the place of the (m, n) weight.
        bias: (m,), or None.
        view: how the layer's inputs and outputs are seen as rows.

    An empty buffer stands under the name ``weight``: a checkpoint of this layer cannot be loaded
    into an ordinary layer by mistake, since the sizes differ. Modules that read it in place of calling the layer
    get products with the matrix, see :class:`rankwise.core.standing.Standing`.

    >>> import torch
    >>> from rankwise.matrices import LowRank
    >>> layer = StructuredLinear(LowRank(torch.ones(3, 1), torch.ones(1, 2)))
    >>> layer(torch.ones(1, 2))
    tensor([[2., 2., 2.]], grad_fn=<MmBackward0>)
    """

    _is_hf_initialized = True  # transformers' mark: there is nothing to draw random numbers for

    def __init__(self, matrix: StructuredMatrix, bias: Tensor | None = None, view: View | None = None) -> None:
        super().__init__()
        if bias is not None and bias.shape != (matrix.shape[0],):
            raise ValueError(f"bias must have shape ({matrix.shape[0]},), got {tuple(bias.shape)}.")
        self.matrix, self.biased = matrix, False  # whether the layer got a bias that its architecture lacks
        self.lr: float | None = None  # the learning rate that its adapter suggests
        self.bias = None if bias is None else parameter_of(bias)
        self.view = view or LinearView()
        vars(self).update(self.view.told(matrix.shape[0]))
        like = next((t for t in matrix.state_dict().values() if t.is_floating_point()), None)
        self._buffers["weight"] = torch.empty(0) if like is None else like.new_empty(0)  # behind the property

    @property
    def weight(self) -> Tensor:
        """An empty tensor that stands for the weight where it is a matrix; see :class:`Standing`."""
        empty = self._buffers["weight"]
        assert empty is not None
        rows = isinstance(self.view, LinearView)
        transposed = rows and self.view.stored(empty.new_empty(0, 1)).shape == (1, 0)
        return Standing.of(empty, self.matrix, transposed) if rows else empty

    @property
    def in_features(self) -> int:
        """Length n of an input row."""
        return self.matrix.shape[1]

    @property
    def out_features(self) -> int:
        """Length m of an output row."""
        return self.matrix.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Compute what the replaced layer computed, with the structured weight."""
        return self.view.apply(self.matrix, input, self.bias)

    def dense(self) -> nn.Module:
        """Return the ordinary layer with the matrix written out; it remembers whether it got its bias."""
        plain: Any = self.view.restore(self.matrix.dense().detach(), self.bias)
        plain.biased = self.biased
        return plain


@dataclasses.dataclass(frozen=True)
class Site:
    """A weight matrix of a model and every place where it stands.

    Args:
        names: paths of the modules that hold this weight, the first one naming it in reports.
        layer: the module at the first path, or the one that owns the 3-D parameter.
        view: how it is seen as a matrix.
        part: of which 3-D parameter it is which slice; its names end with both.
        unbiased: how many modules that hold this weight have no bias.
    """

    names: tuple[str, ...]
    layer: nn.Module
    view: View
    part: tuple[str, int] | None = None
    unbiased: int = 0

    @property
    def name(self) -> str:
        """The path that reports use."""
        return self.names[0]

    @property
    def matrix(self) -> StructuredMatrix:
        """The matrix as it is kept."""
        return self.layer.matrix if isinstance(self.layer, StructuredLinear) else Dense(self.weight)

    @property
    def frozen(self) -> bool:
        """Whether the weight, of an ordinary layer, asks for no gradients."""
        name = "weight" if self.part is None else self.part[0]
        return not self.layer.get_parameter(name).requires_grad

    @property
    def under(self) -> StructuredMatrix:
        """The matrix without adapters that have names."""
        matrix = self.matrix
        return matrix.base.matrix if isinstance(matrix, Several) else matrix

    @property
    def weight(self) -> Tensor:
        """The (m, n) weight, detached; a structured one is written out."""
        if isinstance(self.layer, StructuredLinear):
            return self.layer.matrix.dense().detach()
        if self.part is None:
            return self.view.matrix(self.layer.get_parameter("weight").detach())
        name, i = self.part
        held = getattr(self.layer, name)
        stored: Tensor = held.layer(i).get_parameter("weight") if isinstance(held, Stack) else held[i]
        return self.view.matrix(stored.detach())


@runtime_checkable
class _HasHead(Protocol):
    def get_output_embeddings(self) -> nn.Module | None: ...


def select(
    model: nn.Module, where: Where | None = None, *, compressed: bool = False, tables: bool = False
) -> dict[str, Site]:
    """Find the weight matrices of a model by the kind and shape of its modules.

    Layers that share one weight are one site. A weight that is also an embedding table is never
    selected, nor, by default, the output head that a transformers model names. Each matrix of a 3-D parameter,
    such as the weights of a mixture's experts, is a site of its own: ``experts.down_proj.3``.

    Args:
        model: any module.
        where: keeps a layer if it is true for (name, module); None keeps all but output heads. For a matrix of a
            3-D parameter the module is the one that owns the parameter.
        compressed: also find the layers that are structured already.
        tables: also find the embeddings that share their weight with no other layer.

    Raises:
        TypeError: of modules of torch.jit.
        ValueError: if nothing is selected.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("layers of torch.jit cannot be replaced; give the module that it was made of.")
    check_function("where", where, "a function of (name, module)")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if isinstance(model, _HasHead) else None
    keep = where or (lambda name, layer: layer is not head)
    modules = model.named_modules(remove_duplicate=False)
    found = [(owner, *each) for path, owner in modules for each in _sites_at(path, owner)]
    others = {id(weight) for _, weight, site in found if not isinstance(site.view, EmbeddingView)}
    sites: dict[tuple[int, int], Site] = {}
    owners: dict[tuple[int, int], set[int]] = {}
    for owner, weight, site in found:
        if isinstance(site.view, EmbeddingView):
            wanted = tables and id(weight) not in others
        else:
            wanted = id(weight) not in embeddings and (compressed or not isinstance(owner, StructuredLinear))
        if wanted and keep(site.name, owner):
            key = id(weight), 0 if site.part is None else site.part[1]
            known = sites.get(key, dataclasses.replace(site, names=()))
            new = id(owner) not in owners.setdefault(key, set()) and getattr(owner, "bias", None) is None
            owners[key].add(id(owner))
            names = (*known.names, *site.names)
            sites[key] = dataclasses.replace(known, names=names, unbiased=known.unbiased + new)
    if not sites:
        *kinds, last = (kind.called for kind in VIEWS)
        raise ValueError(
            f"no layer was selected: the model has no {', '.join(kinds)} or {last} that 'where' accepts."
        )
    return {site.name: site for site in sites.values()}


def _sites_at(path: str, layer: nn.Module) -> Iterator[tuple[nn.Module | nn.Parameter, Site]]:
    """Yield the matrices that a module itself holds, each with what holds its values, which others may share."""
    if isinstance(layer, StructuredLinear):
        yield layer.matrix, Site((path,), layer, layer.view)
        return
    view = view_of(layer) or EmbeddingView.of(layer)
    if view is not None and "weight" in layer._parameters:  # else it is made anew at each call, as by weight_norm
        weight = layer.get_parameter("weight")
        if weight.is_meta and hasattr(layer, "_hf_hook"):
            raise ValueError(MOVED)
        yield weight, Site((path,), layer, view)
    for name, transposed in stacks_of(layer).items():
        weight = layer.get_parameter(name)
        for i in range(len(weight)):
            full = f"{path}.{name}.{i}".removeprefix(".")
            yield weight, Site((full,), layer, SliceView(transposed), (name, i))


def replace(
    model: nn.Module,
    site: Site,
    matrix: StructuredMatrix,
    shift: Tensor | None = None,
    lr: float | None = None,
) -> None:
    """Put a structured matrix in all places of a site; biases stay where they are, or move by ``shift`` (m,).

    ``lr`` is the learning rate that an adapter suggests.
    """
    dtype, biases = site.matrix.dtype, dict[int, nn.Parameter]()
    for name in site.names:
        unstack(model, name)
        old: Any = model.get_submodule(name)
        bias = getattr(old, "bias", None)
        if shift is not None:  # one for all places of a module
            moved = shift.to(dtype) if bias is None else (bias.detach() + shift).to(bias.dtype)
            bias = biases.setdefault(id(old), parameter_of(moved))
        new = StructuredLinear(matrix, bias, site.view).train(old.training)
        new.biased = getattr(old, "biased", False) or (shift is not None and old.bias is None)
        new.lr = lr
        take_hooks(old, new)
        set_module(model, name, new)


def take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module that takes another's place have its hooks; their handles take them off as before.

    Raises:
        ValueError: if the hooks are Accelerate's, which are no longer true of other parameters.
    """
    if hasattr(old, "_hf_hook"):
        raise ValueError(MOVED)
    for name in HOOKS:
        setattr(new, name, getattr(old, name))


def put_behind(model: nn.Module, site: Site, module: nn.Module, lr: float | None = None) -> None:
    """Have the outputs of a layer go through a module, in all places of a site; ``lr`` as in :func:`replace`."""
    for path in site.names:
        new = Extended(model.get_submodule(path), module, lr).train(site.layer.training)
        set_module(model, path, new)


def input_of(arguments: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    """Return what a layer is called with, by place or by name."""
    return next(iter([*arguments, *options.values()]))


def sizes_of(site: Site) -> tuple[int, int]:
    """Return the (m, n) of a layer without writing its weight out."""
    m, n = site.layer.matrix.shape if isinstance(site.layer, StructuredLinear) else site.weight.shape
    return m, n


def unstack(model: nn.Module, name: str) -> Stack | None:
    """Put a stack in place of the 3-D parameter that a dotted name is a slice of, if it is; return the stack."""
    path, _, number = name.rpartition(".")
    found = stack_at(model, path)
    if found is None:
        return None
    owner, last, transposed = found
    weight = owner.get_parameter(last)
    if not number.isdecimal() or int(number) >= len(weight):
        return None
    before = [part.order for part in owner.children() if isinstance(part, Stack)]
    stack = Stack(weight, transposed).detached().train(owner.training)
    stack.order = before[0] if before else tuple(owner._parameters)
    set_module(model, path, stack)
    one_by_one(model)
    return stack


@contextlib.contextmanager
def unstacked(model: nn.Module, sites: Iterable[Site]) -> Iterator[None]:
    """Let each slice of the sites' 3-D parameters be a layer for a while, without a copy."""
    paths = {name.rpartition(".")[0] for site in sites if site.part is not None for name in site.names}
    found = {path: place for path in sorted(paths) if (place := stack_at(model, path)) is not None}
    before = {id(owner): (owner, dict(owner._parameters)) for owner, _, _ in found.values()}
    back = one_by_one(model) if found else lambda: None
    try:
        for path, (owner, name, transposed) in found.items():
            if name in owner._parameters:  # not yet done under another path
                set_module(model, path, Stack(owner.get_parameter(name), transposed).train(owner.training))
        yield
    finally:
        for owner, parameters in before.values():
            for name, parameter in parameters.items():
                setattr(owner, name, parameter)
            owner._parameters.clear()
            owner._parameters.update(parameters)  # in the order that they had
        back()


def fold(model: nn.Module, where: Callable[[StructuredLinear], bool] = lambda layer: True) -> nn.Module:
    """Turn every :class:`StructuredLinear` of a model that ``where`` accepts into an ordinary layer, in place.

    Layers that share a matrix share the weight again, and the slices of a 3-D parameter are one again, unless one
    got a bias. The weight of what was adapted is frozen, as are all others since then. A transformers model then
    computes its experts in its default way again.

    Returns:
        the same model; a layer given as the model itself is returned as a new one.

    Raises:
        ValueError: if something that is no matrix stands behind a layer, such as a bottleneck, a matrix is
            followed still, or each row of a batch has its own adapter; the model is then as before.
    """
    refuse_followed(model)
    refuse_extended(model, "cannot be folded; train an adapter of matrices instead, such as Lora")
    for layer in structured(model).values():
        if isinstance(layer.matrix, Several):
            layer.matrix.check_one()
    if isinstance(model, StructuredLinear):
        return model.dense()
    weights: dict[int, Any] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, StructuredLinear) and where(layer):
            plain = layer.dense().train(layer.training)
            plain.weight = weights.setdefault(id(layer.matrix), plain.weight)
            flags = [p.requires_grad for p in layer.matrix.parameters()]
            if base_of(layer.matrix) is not None or (flags and not any(flags)):  # as what was frozen when adapted
                plain.weight.requires_grad_(False)
            take_hooks(layer, plain)
            set_module(model, name, plain)
    restack(model)
    return model


def restack(model: nn.Module) -> None:
    """Make stacks 3-D parameters again where all their matrices are what they were, or have been folded."""
    wholes: dict[int, Any] = {}
    for path, stack in list(stacks(model)):
        whole = wholes.setdefault(id(stack), stack.parameter())
        if whole is not None:
            set_module(model, path, whole)
            held = model.get_submodule(path.rpartition(".")[0])._parameters
            for name in [name for name in stack.order if name in held]:  # in the order that they had
                held[name] = held.pop(name)
    if wholes and isinstance(model, ChoosesExperts) and not any(True for _ in stacks(model)):
        model.set_experts_implementation(None)  # the model's own choice


def refuse_followed(model: nn.Module) -> None:
    """Raise ValueError if a schedule acts on a matrix while an optimiser takes steps."""
    for name, part in model.named_modules():
        if isinstance(part, Scheduled) and part.followed:
            raise ValueError(f"layer {name} is followed still; call finish() of what rankwise.follow returned.")


def structured(model: nn.Module) -> Mapping[str, StructuredLinear]:
    """Return the structured layers of a model by name."""
    found = model.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in found if isinstance(layer, StructuredLinear)}


def base_of(matrix: StructuredMatrix) -> Base | None:
    """Return the matrix that an adapter in an expression changes, or None if there is no adapter."""
    return next((part for part in matrix.modules() if isinstance(part, Base)), None)


def set_module(model: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    """Put a module, or a parameter, at a dotted path.

    Raises:
        ValueError: if that is the model itself, whose place is not known.
    """
    if not name:
        raise ValueError("the model is itself the layer that is to be replaced; put it into an nn.Sequential.")
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    if last in owner._parameters:
        delattr(owner, last)  # a module does not take the place of a parameter otherwise
    setattr(owner, last, module)
