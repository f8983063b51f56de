"""What is particular to sparse dictionaries: their sizes, their patterns, and where they win."""

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, exactly, fill
from torch import Generator, Tensor

from rankwise.compressors import CoSpaDi, KroneckerFactoredSvd, OrthogonalDictionary
from rankwise.compressors.loss_metric import LossMetric
from rankwise.compressors.sparse_dictionary import SparseDictionary
from rankwise.core.choices import Choices
from rankwise.matrices import Product, SemiSparse

KINDS = [CoSpaDi, OrthogonalDictionary]
SHAPES = [(96, 24), (24, 96), (32, 32)]


def offer(method: LossMetric, weight: Tensor) -> Choices:
    m, n = weight.shape
    return method.choices(weight, fill(method.needs, correlated(300, n, 3), correlated(300, m, 5)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.9])
def test_a_dictionary_takes_its_share(kind: type[SparseDictionary], shape: tuple[int, int], share: float):
    for pattern in ("free", "2:4"):
        choices = offer(kind(share=share, pattern=pattern), draw(*shape))
        assert len(choices.errors) == 1
        least = 0.6 if pattern == "2:4" else 0.75  # atoms are then a multiple of 4
        assert least * share < float(choices.costs["params"][0]) / draw(*shape).numel() <= share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_of_four_are_kept_and_counted(kind: type[SparseDictionary], shape: tuple[int, int]):
    weight = draw(*shape)
    choices = offer(kind(pattern="2:4"), weight)
    for i, error in enumerate(choices.errors.tolist()):
        matrix = choices.build(i)
        assert isinstance(matrix, Product)
        codes, atoms = matrix.parts
        assert isinstance(codes, SemiSparse)
        assert (codes.kept, codes.group) == (2, 4)
        codes.check()
        kept = codes.values.numel()
        assert kept == shape[0] * atoms.shape[0] // 2
        assert int(choices.costs["bytes"][i]) == 8 * (kept + atoms.shape[0] * shape[1]) + codes.places.numel()
        assert codes.places.numel() == shape[0] * -(-atoms.shape[0] // 16) * 2  # two bits a kept value
        assert error == pytest.approx(choices.error_of(weight - matrix.dense().detach()), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_too_narrow_for_a_pattern_offers_nothing(kind: type[SparseDictionary]):
    choices = offer(kind(pattern="2:4"), draw(9, 3))
    assert [len(choices.errors), *(len(cost) for cost in choices.costs.values())] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="atoms_per_entry"):
        kind(pattern="2:4", atoms_per_entry=3.0)


def test_every_row_of_cospadi_has_equally_many_entries():
    for shape in SHAPES:
        method = CoSpaDi(share=0.6)
        (first, second) = offer(method, draw(*shape)).build(0).parts  # pyright: ignore[reportAttributeAccessIssue]
        mask = first.mask() if shape[0] >= shape[1] else second.mask().mT
        assert len(set(mask.sum(1).tolist())) == 1


@pytest.mark.parametrize(
    "method", [CoSpaDi(share=0.6, steps=8, picked_share=0.0), OrthogonalDictionary(share=0.6, steps=30)]
)
def test_a_dictionary_beats_low_rank_where_rows_lie_in_many_subspaces(method: SparseDictionary):
    atoms = torch.linalg.qr(draw(24, 24))[0]
    codes = draw(96, 24, seed=1) * (torch.rand(96, 24, generator=Generator().manual_seed(2)) < 0.2)
    weight, stats = codes @ atoms, fill(LossMetric.needs, draw(4000, 24, seed=3), draw(4000, 96, seed=4))
    dictionary = method.choices(weight, stats)
    low_rank = KroneckerFactoredSvd().choices(weight, stats)
    affordable = low_rank.costs["params"] <= dictionary.costs["params"]
    assert float(dictionary.errors[0]) < 0.7 * float(low_rank.errors[affordable].min())


def test_rows_that_few_atoms_meet_do_as_well_with_several_picks():
    """Of a diagonal weight each row is one atom, which leaves nothing for further picks."""
    weight = torch.linspace(1, 2, 60, dtype=torch.float64).diag()
    stats = {kind: exactly(kind, torch.eye(60)) for kind in CoSpaDi.needs}
    found = [CoSpaDi(share=0.6, picked_share=share).choices(weight, stats) for share in (0.0, 0.3)]
    assert float(found[1].errors[0]) <= 1.01 * float(found[0].errors[0])


def test_atoms_need_not_be_orthogonal():
    """On codes of few entries over atoms at small angles CoSpaDi wins."""
    atoms = torch.nn.functional.normalize(draw(20, 24, seed=1), dim=1)
    places = torch.rand(200, 20, generator=Generator().manual_seed(3)).topk(5).indices
    codes = torch.zeros(200, 20, dtype=torch.float64).scatter(1, places, draw(200, 5, seed=4))
    weight, stats = codes @ atoms, fill(LossMetric.needs, draw(4000, 24, seed=3), draw(4000, 200, seed=4))
    learnt = CoSpaDi(share=0.6, atoms_per_entry=4.0, steps=60, powers=8, picked_share=0.0).choices(weight, stats)
    orthogonal = OrthogonalDictionary(share=0.6, atoms_per_entry=4.0, steps=60).choices(weight, stats)
    assert int(learnt.costs["params"][0]) <= int(orthogonal.costs["params"][0])
    assert float(learnt.errors[0]) < 0.7 * float(orthogonal.errors[0])
