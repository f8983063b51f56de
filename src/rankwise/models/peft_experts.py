"""How PEFT keeps LoRA for 3-D parameters (``target_parameters``), and adapters of their matrices are the same.

PEFT stands one wrapper around the module that owns such a parameter, and one around that for its next: of k
parameters in the module's order the i-th is found under k - 1 - i times ``base_layer``. Its two matrices hold the
factors of all e experts: A (e r, inputs) one after the other, B (outputs, r e) with neighbouring columns of
different experts. What is input and what output follows from how PEFT takes the parameter to be stored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..core.stacks import Stack, stacks_of
from .peft_kinds import Piece

ENDS = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class Experts:
    """A 3-D parameter whose matrices are layers.

    Args:
        path: of the parameter.
        count: e, of its matrices.
        owner: path of its module.
        order: the names of all parameters that the module has or had.
        turned: whether PEFT takes its inputs for outputs.
    """

    path: str
    count: int
    owner: str
    order: tuple[str, ...]
    turned: bool

    @property
    def slices(self) -> list[str]:
        """The names of the layers."""
        return [f"{self.path}.{i}" for i in range(self.count)]

    def place(self, others: Iterable[str]) -> str:
        """Return what its tensors stand under, if parameters with these paths are adapted."""
        names = {path.rpartition(".")[2] for path in others if path.rpartition(".")[0] == self.owner}
        later = self.order[self.order.index(self.path.rpartition(".")[2]) + 1 :]
        return self.owner + ".base_layer" * len(names.intersection(later))


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Return the 3-D parameters of a model whose matrices are layers, by path."""
    found = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        held = {name: part for name, part in module.named_children() if isinstance(part, Stack)}
        order = next((part.order for part in held.values() if part.order), tuple(module._parameters))
        sizes = {name: (len(part), part.transposed) for name, part in held.items()}
        for name, transposed in stacks_of(module).items():
            sizes[name] = len(module.get_parameter(name)), transposed
        for name, (count, transposed) in sizes.items():
            path = f"{owner}.{name}".removeprefix(".")
            turned = transposed and not getattr(module, "is_transposed", False)
            found[path] = Experts(path, count, owner, order, turned)
    return found


def targeted(experts: Mapping[str, Experts], wanted: Sequence[str]) -> dict[str, Experts]:
    """Return the parameters that a description of PEFT names."""
    return {
        path: each
        for path, each in experts.items()
        if any(path == name or path.endswith(f".{name}") for name in wanted)
    }


def target_parameters(wanted: set[str], names: Iterable[str]) -> list[str]:
    """Return the shortest list that PEFT finds these parameters with, and no others."""
    names = {*names, *wanted}
    short = sorted({".".join(path.split(".")[-2:]) for path in wanted})
    matched = {name for name in names if any(name == each or name.endswith(f".{each}") for each in short)}
    return short if matched == wanted else sorted(wanted)


def joined(experts: Experts, pieces: Mapping[str, Piece]) -> Piece:
    """Return the factors of all experts as PEFT keeps them; an expert without an adapter gets zeros.

    Experts of a lower rank get zeros too, and one whose update counts more than the first's larger factors.

    Raises:
        ValueError: if PEFT does not compute it.
    """
    for name, piece in pieces.items():
        if set(piece.tensors) != set(ENDS) or piece.dropout:
            raise ValueError(
                f"layer {name} has rows of trained lengths or dropout, which PEFT has not for 3-D parameters."
            )
    first = next(iter(pieces.values()))
    rank = max(piece.rank for piece in pieces.values())
    right, left = (first.tensors[end] for end in ENDS)
    rights = right.new_zeros(experts.count, rank, right.shape[1])
    lefts = left.new_zeros(experts.count, left.shape[0], rank)
    for i, name in enumerate(experts.slices):
        if name in pieces:
            piece = pieces[name]
            rights[i, : piece.rank] = piece.tensors[ENDS[0]].detach()
            own = piece.tensors[ENDS[1]].detach()
            lefts[i, :, : piece.rank] = own if piece.scale == first.scale else own * (piece.scale / first.scale)
    if experts.turned:
        rights, lefts = lefts.mT, rights.mT
    found = rights.reshape(experts.count * rank, -1), lefts.permute(1, 2, 0).reshape(lefts.shape[1], -1)
    return Piece(dict(zip(ENDS, found, strict=True)), rank, first.scale)


def parted(experts: Experts, tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """Return the factors of one expert, as those of an ordinary layer.

    Raises:
        ValueError: if the tensors are not those of so many experts.
    """
    right, left = (tensors[end] for end in ENDS)
    if right.dim() != 2 or left.dim() != 2 or len(right) % experts.count or len(right) != left.shape[1]:
        raise ValueError(
            f"factors of shapes {tuple(right.shape)} and {tuple(left.shape)} are not those of "
            f"{experts.count} experts."
        )
    right = right.view(experts.count, -1, right.shape[1])[i]
    left = left.view(len(left), -1, experts.count)[:, :, i]
    found = (left.mT, right.mT) if experts.turned else (right, left)
    return dict(zip(ENDS, (each.contiguous() for each in found), strict=True))
