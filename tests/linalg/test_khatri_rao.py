"""What is computed from factors equals what the written-out matrices say."""

import pytest
import torch
from torch import Tensor

from rankwise.linalg import KhatriRao, exact, expanded, reduced


def samples(count: int, positions: int, tokens: bool, m: int = 3, n: int = 4) -> KhatriRao:
    rng = torch.Generator().manual_seed(count + 10 * positions)
    gradients = torch.randn(count, positions, m, generator=rng).double()
    if tokens:
        return KhatriRao(torch.randint(0, n, (count, positions), generator=rng), gradients, n)
    return KhatriRao(torch.randn(count, positions, n, generator=rng).double(), gradients, n)


def written_out(u: KhatriRao) -> Tensor:
    """U', (R, m n)."""
    inputs = torch.nn.functional.one_hot(u.inputs, u.width).double() if u.one_hot else u.inputs
    return torch.einsum("rtm,rtn->rmn", u.gradients, inputs).flatten(1)


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(
    "sizes", [(5, 1, 5, 1), (3, 4, 6, 2), (9, 30, 8, 40), (0, 2, 3, 2), (3, 2, 0, 2)], ids=str
)
def test_it_is_the_matrix(sizes: tuple[int, int, int, int], tokens: bool, chunk: int, monkeypatch):
    monkeypatch.setattr("rankwise.linalg.khatri_rao.CHUNK", chunk)
    u, v = samples(*sizes[:2], tokens), samples(*sizes[2:], tokens)
    one, other = written_out(u), written_out(v)
    torch.testing.assert_close(u.matrices().flatten(1), one)
    torch.testing.assert_close(u.gram(), one @ one.mT)
    torch.testing.assert_close(u.gram(v), one @ other.mT)
    for each in (u._gram_of_positions, u._gram_of_matrices):
        torch.testing.assert_close(each(v), one @ other.mT)
    torch.testing.assert_close(u.squared_norms(), one.square().sum(1))
    weights, matrix = torch.randn(len(u)).double(), torch.randn(3, 4).double()
    torch.testing.assert_close(u.combination(weights).flatten(), weights @ one)
    torch.testing.assert_close(u.products(matrix), one @ matrix.flatten())


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("tokens", [False, True])
def test_lengths_of_large_matrices_with_few_positions(tokens: bool, chunk: int, monkeypatch):
    monkeypatch.setattr("rankwise.linalg.khatri_rao.CHUNK", chunk)
    u = samples(5, 3, tokens, m=16, n=20)
    torch.testing.assert_close(u.squared_norms(), written_out(u).square().sum(1))


@pytest.mark.parametrize("tokens", [False, True])
def test_ways_of_sharing_are_one_where_there_is_one_position(tokens: bool):
    u = samples(5, 1, tokens)
    for way in (exact, expanded, reduced):
        torch.testing.assert_close(written_out(way(u)), written_out(u))
    assert len(expanded(samples(5, 3, tokens))) == 15
    total = written_out(expanded(samples(5, 3, tokens))).unflatten(0, (5, 3)).sum(1)
    torch.testing.assert_close(total, written_out(samples(5, 3, tokens)))


def test_one_input_at_all_positions_is_reduced_without_a_loss():
    u = samples(5, 3, tokens=False)
    same = KhatriRao(u.inputs[:, :1].expand(-1, 3, -1), u.gradients, u.width)
    torch.testing.assert_close(written_out(reduced(same)), written_out(same))
