"""How PEFT's kinds of adapters and expressions of matrices are the same; one entry of ``KINDS`` for each."""

import abc
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.views import Conv2dView, EmbeddingView, LinearView, View
from ..matrices import (
    Base,
    BlockAffine,
    Branch,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Product,
    Reflections,
    RowNormalised,
    StructuredMatrix,
    Sum,
    Tiled,
)
from ..matrices.thin import bare, thin_factors
from .low_rank_change import branch_of, change_of


@dataclass(frozen=True)
class Piece:
    """What PEFT's file holds of one layer.

    Args:
        tensors: by the end of their names.
        rank: of the layer.
        scale: what the update counts.
        dropout: of the inputs while training.
        error: of what is left out, relative to the size of the change.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    scale: float = 1.0
    dropout: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What PEFT's description says of one layer.

    Args:
        fields: all of the description.
        rank: of this layer, or None if that differs from layer to layer by other rules.
        alpha: of this layer.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    alpha: float = 1.0


class PeftKind(abc.ABC):
    """One kind of PEFT's adapters.

    Attributes:
        name: PEFT's ``peft_type``.
        ends: the ends of the names of a layer's tensors.
        fields: of the description, which are read.
        biases: what the description says where the biases of adapted layers train.
        rank: where the description names none.
        alpha: what the description calls the number over which the rank divides the scale.
    """

    name: str
    ends: tuple[str, ...]
    fields: tuple[str, ...] = ()
    biases: str = "lora_only"
    rank: int = 8
    alpha: str = "lora_alpha"

    def needed(self, view: View) -> tuple[str, ...]:
        """Which of ``ends`` a layer must have."""
        return self.ends

    @abc.abstractmethod
    def piece(self, matrix: StructuredMatrix, view: View) -> Piece | None:
        """Return what the file holds of an expression, or None if this kind does not compute it."""

    @abc.abstractmethod
    def describe(self, pieces: Mapping[str, Piece]) -> dict[str, Any] | None:
        """Return the fields that describe layers together, or None if one description does not fit all.

        Patterns go by the names of layers.
        """

    @abc.abstractmethod
    def matrix(
        self, base: Base, tensors: Mapping[str, Tensor], settings: Settings, view: View
    ) -> StructuredMatrix:
        """Return the expression that PEFT computes.

        Raises:
            ValueError: if the tensors do not fit.
        """


_FACTORS, _FACTORS_OF_TABLES = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")


class LoraKind(PeftKind):
    """W + s B A, also with rows of trained lengths; every other change of low rank can be written as one."""

    name = "LORA"
    ends = (*_FACTORS, "lora_magnitude_vector", *_FACTORS_OF_TABLES)
    fields = (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        "target_parameters",
    )

    @staticmethod
    def fits(view: View) -> bool:
        """Whether PEFT computes W + s B A for such a layer; its convolution A has no dilation."""
        if isinstance(view, Conv2dView):
            return view.dilation == (1, 1)
        return isinstance(view, (LinearView, EmbeddingView))

    def needed(self, view: View) -> tuple[str, ...]:
        """The two factors, which have other names where the layer is an embedding."""
        return _FACTORS_OF_TABLES if isinstance(view, EmbeddingView) else _FACTORS

    def piece(self, matrix: StructuredMatrix, view: View, most: int | None = None) -> Piece | None:
        """Take the factors, or find some, of at most a rank."""
        if not self.fits(view):
            return None
        table = isinstance(view, EmbeddingView)
        if isinstance(matrix, RowNormalised) and not table and (most is None or matrix.update.rank <= most):
            branch, factors = matrix.update, thin_factors(matrix.update.matrix)
            assert factors is not None
            found = {
                "lora_A.weight": factors[1],
                "lora_B.weight": factors[0],
                "lora_magnitude_vector": matrix.lengths,
            }
            return Piece(_as_layers(found, view), len(factors[1]), branch.scale, branch.dropout)
        change = change_of(matrix, most)
        if change is None:
            return None
        found = dict(zip(self.needed(view), (change.right, change.left), strict=True))
        rank = change.left.shape[1]
        return Piece(_as_layers(found, view), rank, change.scale, change.dropout, change.error)

    def describe(self, pieces: Mapping[str, Piece]) -> dict[str, Any] | None:
        """Give the most frequent rank and alpha, and patterns for all others."""
        dora = {"lora_magnitude_vector" in piece.tensors for piece in pieces.values()}
        tables = [name for name, piece in pieces.items() if _FACTORS_OF_TABLES[0] in piece.tensors]
        dropout = {p.dropout for name, p in pieces.items() if name not in tables} or {0.0}  # drop no tokens
        if len(dora) > 1 or len(dropout) > 1:
            return None
        ranks = {name: piece.rank for name, piece in pieces.items()}
        alphas = {name: plain(piece.scale * piece.rank) for name, piece in pieces.items()}
        (rank, _), *_ = Counter(ranks.values()).most_common(1)
        (alpha, _), *_ = Counter(alphas.values()).most_common(1)
        return {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout.pop(),
            "use_rslora": False,
            "use_dora": dora.pop(),
            "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
            "init_lora_weights": True,
        }

    def matrix(
        self, base: Base, tensors: Mapping[str, Tensor], settings: Settings, view: View
    ) -> StructuredMatrix:
        """Check the layer and the rank, and build the sum."""
        if not self.fits(view):
            raise ValueError("PEFT computes another change of this kind of layer, such as one with dilation.")
        right, left = (tensors[end].flatten(1) for end in self.needed(view))
        rank = len(right)
        if settings.rank is not None and rank != settings.rank:
            raise ValueError(f"its rank is {rank}, but {settings.rank} in the description.")
        root = math.sqrt(rank) if settings.fields.get("use_rslora") else rank
        update = Branch(LowRank(left, right), settings.alpha / root, settings.fields.get("lora_dropout", 0.0))
        lengths = tensors.get("lora_magnitude_vector")
        if bool(settings.fields.get("use_dora")) != (lengths is not None):
            raise ValueError("use_dora in the description and the tensors disagree.")
        if lengths is None:
            made = Sum(base, update)
            return view.adapted(made) if _spares_padding(right, view) else made
        if isinstance(view, EmbeddingView):
            raise ValueError("of an embedding PEFT trains lengths of tokens, which is not supported.")
        made = RowNormalised.of(base, update)
        with torch.no_grad():
            made.lengths.copy_(lengths.flatten())
        return made


class AdaLoraKind(PeftKind):
    """W + s B diag(E) A, whose s is alpha over the first rank plus 1e-5."""

    name = "ADALORA"
    ends = ("lora_A", "lora_B", "lora_E")
    fields = (
        *("init_r", "r", "lora_alpha", "lora_dropout", "rank_pattern", "target_r"),
        *("deltaT", "tinit", "tfinal", "total_step", "beta1", "beta2", "orth_reg_weight"),
    )

    def piece(self, matrix: StructuredMatrix, view: View) -> Piece | None:
        """Take the three factors."""
        branch = branch_of(matrix)
        if branch is None or branch.scale <= 0 or not isinstance(view, LinearView):
            return None  # PEFT takes another scale where alpha is not positive
        match bare(branch.matrix):
            case Product(parts=[Dense() as left, Diagonal() as values, Dense() as right]):
                found = {"lora_A": right.weight, "lora_B": left.weight, "lora_E": values.values[:, None]}
                return Piece(found, len(right.weight), branch.scale, branch.dropout)
        return None

    def describe(self, pieces: Mapping[str, Piece]) -> dict[str, Any] | None:
        """Give the largest rank as the first, and the others as chosen from it."""
        scales = {piece.scale for piece in pieces.values()}
        dropout = {piece.dropout for piece in pieces.values()}
        if len(scales) > 1 or len(dropout) > 1:
            return None
        ranks = {name: piece.rank for name, piece in pieces.items()}
        most = max(ranks.values())
        masks = {f"{name}.lora_E": [i < r for i in range(most)] for name, r in ranks.items() if r < most}
        return {
            "init_r": most,
            "target_r": round(sum(ranks.values()) / len(ranks)),
            "lora_alpha": scales.pop() * (most + 1e-5),
            "lora_dropout": dropout.pop(),
            "rank_pattern": masks or None,
            "total_step": 1,
            "tinit": 0,
            "tfinal": 0,
            "init_lora_weights": True,
        }

    def matrix(
        self, base: Base, tensors: Mapping[str, Tensor], settings: Settings, view: View
    ) -> StructuredMatrix:
        """Build the sum; a rank of 0 adds nothing, which no expression says."""
        left, values, right = tensors["lora_B"], tensors["lora_E"].flatten(), tensors["lora_A"]
        first = float(settings.fields.get("init_r", 12))
        alpha = settings.alpha if settings.alpha > 0 else first
        triplets = Product(Dense(left), Diagonal(values), Dense(right))
        return Sum(base, Branch(triplets, alpha / (first + 1e-5), settings.fields.get("lora_dropout", 0.0)))


class MissKind(PeftKind):
    """W + [D D ... D], and the affine maps of square blocks, which PEFT calls bat."""

    name = "MISS"
    ends = ("miss_block",)
    fields = ("r", "mini_r", "miss_dropout")
    biases = "MiSS_only"
    rank = 64

    def piece(self, matrix: StructuredMatrix, view: View) -> Piece | None:
        """Take the maps, or the tile with all its rows."""
        if type(view) is not LinearView:
            return None  # PEFT computes it for nn.Linear alone
        if isinstance(matrix, BlockAffine):
            return Piece({"miss_block": matrix.change.blocks}, matrix.change.blocks.shape[-1])
        branch = branch_of(matrix)
        tiled = bare(branch.matrix) if branch is not None else None
        if branch is None or not isinstance(tiled, Tiled):
            return None
        rows = branch.scale * tiled.tile.repeat(-(-tiled.shape[0] // len(tiled.tile)), 1)[: tiled.shape[0]]
        return Piece({"miss_block": rows.mT}, rows.shape[1], dropout=branch.dropout)

    def describe(self, pieces: Mapping[str, Piece]) -> dict[str, Any] | None:
        """Give the one rank, and the one form."""
        same = {(p.rank, p.dropout, p.tensors["miss_block"].dim()) for p in pieces.values()}
        if len(same) > 1:
            return None
        rank, dropout, dims = same.pop()
        return {"r": rank, "mini_r": 1, "miss_dropout": dropout, "init_weights": "bat" if dims == 3 else True}

    def matrix(
        self, base: Base, tensors: Mapping[str, Tensor], settings: Settings, view: View
    ) -> StructuredMatrix:
        """Build the sum, or the map of blocks."""
        block = tensors["miss_block"]
        bat = settings.fields.get("init_weights") == "bat"
        if (block.dim() == 3) != bat or block.shape[1 if bat else 0] != settings.rank:
            raise ValueError(f"its numbers are {tuple(block.shape)}, which the description does not say.")
        if bat:
            return BlockAffine(base, block)
        return Sum(base, Branch(Tiled(block.mT, base.shape), dropout=settings.fields.get("miss_dropout", 0.0)))


class ReadKind(PeftKind):
    """A kind that is read and not written: what is of low rank is written as LORA, which more programs know."""

    def piece(self, matrix: StructuredMatrix, view: View) -> Piece | None:
        """None, for any expression."""
        return None

    def describe(self, pieces: Mapping[str, Piece]) -> dict[str, Any] | None:
        """None, for any layers."""
        return None


class HraKind(ReadKind):
    """W H_1 ... H_r, reflections of the inputs; with Gram-Schmidt they are made to commute."""

    name = "HRA"
    ends = ("hra_u",)
    fields = ("r", "apply_GS")

    def matrix(
        self, base: Base, tensors: Mapping[str, Tensor], settings: Settings, view: View
    ) -> StructuredMatrix:
        """Build the product; the columns that PEFT makes orthonormal are so from then on."""
        vectors = tensors["hra_u"]
        if vectors.shape[1:] != (settings.rank,):
            raise ValueError(f"its vectors are {tuple(vectors.shape)}, but {settings.rank} in the description.")
        if settings.fields.get("apply_GS"):
            vectors = torch.linalg.qr(vectors.double()).Q.to(vectors.dtype)
        return Product(base, Branch(Reflections(vectors.mT.contiguous())))


class LokrKind(ReadKind):
    """W + s A x B, a Kronecker product, each of whose factors may be a product of thin matrices."""

    name = "LOKR"
    ends = tuple(f"lokr_{factor}{end}" for factor in ("w1", "w2") for end in ("", "_a", "_b"))
    fields = ("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor")
    alpha = "alpha"

    def needed(self, view: View) -> tuple[str, ...]:
        """None for certain."""
        return ()

    def matrix(
        self, base: Base, tensors: Mapping[str, Tensor], settings: Settings, view: View
    ) -> StructuredMatrix:
        """Build the sum; the kernel of a convolution belongs to the second factor."""
        factors: list[StructuredMatrix] = []
        for name in ("lokr_w1", "lokr_w2"):
            whole, left, right = (tensors.get(name + end) for end in ("", "_a", "_b"))
            if whole is not None:
                factors.append(Dense(whole.flatten(1)))
            elif left is not None and right is not None:
                factors.append(LowRank(left, right))
            else:
                raise ValueError(f"it has neither {name} nor its two factors.")
        return Sum(base, Branch(Kronecker(*factors), settings.alpha / (settings.rank or self.rank)))


class LohaKind(ReadKind):
    """W + s (A B) * (C D), entry by entry, whose rank is at most the product of the two ranks."""

    name = "LOHA"
    ends = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    fields = ("r", "alpha", "rank_pattern", "alpha_pattern")
    alpha = "alpha"

    def matrix(
        self, base: Base, tensors: Mapping[str, Tensor], settings: Settings, view: View
    ) -> StructuredMatrix:
        """Build the sum, of two factors where these are thin; they train as two factors of any values do."""
        a, b, c, d = (tensors[end] for end in self.ends)
        if {a.shape[1], len(b), c.shape[1], len(d)} != {settings.rank}:
            raise ValueError(f"its rank is {a.shape[1]}, but {settings.rank} in the description.")
        if len(a) != len(c) or b.shape[1] != d.shape[1]:
            raise ValueError("the two products have different shapes.")
        rank = a.shape[1] * c.shape[1]
        if rank * sum(base.shape) < math.prod(base.shape):
            left, right = a[:, :, None] * c[:, None], b[:, None] * d
            update: StructuredMatrix = LowRank(left.flatten(1), right.flatten(0, 1))
        else:
            update = Dense((a @ b) * (c @ d))
        return Sum(base, Branch(update, settings.alpha / (settings.rank or self.rank)))


KINDS: tuple[PeftKind, ...] = (  # the first that fits all layers is written
    *(AdaLoraKind(), MissKind(), HraKind(), LokrKind(), LohaKind(), LoraKind()),
)


def plain(number: float) -> float:
    """Return a number as an integer if it is one."""
    return int(number) if number == int(number) else number


def _spares_padding(right: Tensor, view: View) -> bool:
    """Whether a change leaves the padding token alone, if the layer is an embedding that has one."""
    padding = view.padding if isinstance(view, EmbeddingView) else None
    return padding is None or not bool(right[:, padding].any())


def _as_layers(tensors: Mapping[str, Tensor], view: View) -> dict[str, Tensor]:
    """See factors as the weights of two convolutions where the layer is one."""
    if not isinstance(view, Conv2dView):
        return dict(tensors)
    shapes = {
        "lora_A.weight": (-1, view.channels, *view.kernel),
        "lora_B.weight": (len(tensors["lora_B.weight"]), -1, 1, 1),
        "lora_magnitude_vector": (1, -1, 1, 1),
    }
    return {name: tensor.reshape(shapes[name]) for name, tensor in tensors.items()}
