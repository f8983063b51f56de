"""What every exported structured matrix promises, against its own dense form."""

import json

import pytest
import torch
from contracts.examples import EXAMPLES, draw

from rankwise import matrices
from rankwise.matrices import Dense, StructuredMatrix, from_spec

KINDS = sorted(matrices.kinds())


@pytest.fixture(params=KINDS)
def matrix(request: pytest.FixtureRequest) -> StructuredMatrix:
    if request.param not in EXAMPLES:
        pytest.fail(f"{request.param} is exported but tests/contracts/examples.py has no example of it.")
    return EXAMPLES[request.param]()


def test_every_example_is_of_its_kind_and_exported():
    assert sorted(EXAMPLES) == KINDS
    assert all(type(build()).__name__ == name for name, build in EXAMPLES.items())


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0, 3)])
def test_forward_and_adjoint_equal_dense(matrix: StructuredMatrix, lead: tuple[int, ...]):
    m, n = matrix.shape
    dense = matrix.dense().double()
    x, y = draw(*lead, n, seed=5), draw(*lead, m, seed=6)
    assert dense.shape == (m, n)
    torch.testing.assert_close(matrix(x), x @ dense.mT)
    torch.testing.assert_close(matrix.adjoint(y), y @ dense)


def test_gradients_are_those_of_dense(matrix: StructuredMatrix):
    m, n = matrix.shape
    x, y = draw(3, n, seed=5).requires_grad_(), draw(3, m, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(matrix, (x,))
    assert torch.autograd.gradcheck(matrix.adjoint, (y,))
    parameters = [p for p in matrix.parameters() if p.requires_grad]

    def gradients(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            value.square().sum(), [x, y, *parameters], allow_unused=True, materialize_grads=True
        )

    structured = gradients(torch.cat([matrix(x), matrix.adjoint(y)], dim=-1))
    dense = matrix.dense().double()
    torch.testing.assert_close(structured, gradients(torch.cat([x @ dense.mT, y @ dense], dim=-1)))


def test_affine_adds_a_bias(matrix: StructuredMatrix):
    m, n = matrix.shape
    tensors = draw(2, 3, n, seed=5).requires_grad_(), draw(m, seed=6).requires_grad_()
    tensors = [*tensors, *(p for p in matrix.parameters() if p.requires_grad)]
    x, bias, *_ = tensors
    found, wanted = matrix.affine(x, bias), matrix(x) + bias
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), tensors, allow_unused=True) for y in (found, wanted))
    )


def test_looked_up_columns_are_those_of_dense(matrix: StructuredMatrix):
    index = torch.arange(matrix.shape[1]).flip(0).repeat(2, 1)
    torch.testing.assert_close(matrix.lookup(index), matrix.dense().mT[index])
    assert matrix.lookup(index[:, :0]).shape == (2, 0, matrix.shape[0])
    parameters = [p for p in matrix.parameters() if p.requires_grad]
    if parameters:
        found = [
            torch.autograd.grad(value.square().sum(), parameters, allow_unused=True, materialize_grads=True)
            for value in (matrix.lookup(index), matrix.dense().mT[index])
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_spec_and_state_make_the_matrix_again(matrix: StructuredMatrix, device: str):
    spec = json.loads(json.dumps(matrix.spec(), allow_nan=False))
    again = from_spec(spec, dtype=torch.float64, device=device)
    assert (type(again), again.shape, again.rank, again.macs) == (
        type(matrix),
        matrix.shape,
        matrix.rank,
        matrix.macs,
    )
    assert again.spec() == matrix.spec()
    assert (again.params, again.nbytes) == (matrix.params, matrix.nbytes)
    again.load_state_dict(matrix.state_dict(), assign=device == "meta")
    assert torch.equal(again.dense(), matrix.dense())


def test_meta_device(matrix: StructuredMatrix):
    m, n = matrix.shape
    empty = from_spec(matrix.spec(), device="meta", dtype=torch.bfloat16).eval()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    with torch.device("meta"):  # as transformers builds a model
        assert from_spec(matrix.spec(), device="meta").shape == matrix.shape
    assert empty(torch.empty(2, n, device="meta", dtype=torch.bfloat16)).shape == (2, m)
    assert empty.adjoint(torch.empty(2, m, device="meta", dtype=torch.bfloat16)).shape == (2, n)
    assert empty.dense().shape == (m, n)
    assert matrix.to("meta").dense().is_meta
    with torch.device("meta"):  # as transformers builds models
        assert all(tensor.is_meta for tensor in from_spec(matrix.spec(), device="meta").state_dict().values())


@pytest.mark.slow
def test_compile(matrix: StructuredMatrix):
    torch.compiler.reset()  # the limit of recompilations counts all tests of a process
    torch.compiler.reset()  # one forward function is compiled only so often in a process
    x = draw(3, matrix.shape[1], seed=5)
    torch.testing.assert_close(torch.compile(matrix, backend="aot_eager", fullgraph=True)(x), matrix(x))


def test_bfloat16(matrix: StructuredMatrix):
    x = draw(3, matrix.shape[1], seed=5).bfloat16()
    expected = x.double() @ matrix.dense().detach().double().mT
    low = matrix.bfloat16()
    assert low(x).dtype == torch.bfloat16
    assert not any(t.is_floating_point() and t.dtype != torch.bfloat16 for t in low.state_dict().values())
    torch.testing.assert_close(low(x).double(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_sizes_are_what_is_stored(matrix: StructuredMatrix):
    stored = [*matrix.parameters(), *matrix.buffers()]
    packed = [t for t in stored if t.dtype == torch.uint8]  # tests of the kind say how these count
    plain = sum(t.numel() for t in stored) - sum(t.numel() for t in packed)
    assert matrix.params > plain if packed else matrix.params == plain
    assert matrix.nbytes == sum(t.numel() * t.element_size() for t in stored)
    assert matrix.rank >= int(torch.linalg.matrix_rank(matrix.dense()))
    assert matrix.rank <= min(matrix.shape)
    assert f"shape={matrix.shape}" in repr(matrix)


def test_macs_are_the_multiplications_of_forward():
    macs = {name: build().macs for name, build in EXAMPLES.items()}
    assert macs == {
        "Base": 20 + 18,
        "BlockAffine": 24 + 24,
        "Branch": 20 + 18 + 5,
        "ChangedFactors": 20 + 14,
        "Companded": 20,
        "Dense": 20,
        "Diagonal": 5,
        "Frozen": 20 + 18,
        "Hypercomplex": 2 * 4 + 2 * 2 * 2 + 2 * 6,
        "IndexedSparse": EXAMPLES["Sparse"]().macs,
        "Kernelled": 20,
        "KeptColumn": 20 + 18 + 5,
        "Kronecker": 2 * (2 * 3) + 2 * (3 * 2 + 2 * 2),
        "LowRank": 18,
        "Permutation": 0,
        "PivotedLowRank": 2 * 4 + 3 * 2,
        "Product": 0 + 5 + 14,
        "Quantized": 20,
        "Recomputed": 20,
        "Reflections": 2 * 3 * 5 + 3 * 3,
        "RowNormalised": 20 + 18 + 5 + 5,
        "Scaled": 20 + 18 + 5,
        "Scheduled": 20 + 18,
        "Seeded": 20,
        "SemiSparse": 5 * 4,
        "Several": 20 + (18 + 5 + 5) + (20 + 2 * 2 * 4 + 2 * 2 + 5) + (20 + 5),
        "Sparse": EXAMPLES["Sparse"]().params - 3,
        "Spectral": (3 + 2) * (5 + 1 + 4),
        "Sum": 20 + 18,
        "Tiled": 6,
    }


def test_adjoint_default_equals_dense():
    class Plain(Dense):
        adjoint = StructuredMatrix.adjoint

    matrix, y = Plain(draw(5, 4)), draw(3, 5)
    torch.testing.assert_close(matrix.adjoint(y), y @ matrix.dense())


def _deep(levels: int) -> dict:
    spec: dict = {"kind": "Diagonal", "size": 1}
    for _ in range(levels):
        spec = {"kind": "Sum", "members": [spec]}
    return spec


def _base(size: int) -> dict:
    return {"kind": "Base", "matrix": {"kind": "Diagonal", "size": size}}


def test_nested_expressions_round_trip():
    assert from_spec(_deep(15)).dense().shape == (1, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "mapping"),
        (3, "mapping"),
        ([], "mapping"),
        ({}, "unknown kind"),
        ({"kind": "StructuredMatrix"}, "unknown kind"),
        ({"kind": "from_spec"}, "unknown kind"),
        ({"kind": "inspect"}, "unknown kind"),
        ({"kind": ["Dense"]}, "unknown kind"),
        ({"kind": "Dense"}, "shape"),
        ({"kind": "Dense", "shape": [3]}, "shape"),
        ({"kind": "Dense", "shape": "34"}, "shape"),
        ({"kind": "Dense", "shape": [3, 0]}, "positive integer"),
        ({"kind": "Dense", "shape": [3, -1]}, "positive integer"),
        ({"kind": "Dense", "shape": [3, 2.0]}, "positive integer"),
        ({"kind": "Dense", "shape": [3, True]}, "positive integer"),
        ({"kind": "Dense", "shape": [2**40, 2**40]}, "must be <="),
        ({"kind": "Companded", "shape": [3, 2], "learned": 1}, "learned"),
        ({"kind": "LowRank", "shape": [3, 2]}, "rank"),
        ({"kind": "LowRank", "shape": [3, 2], "rank": 3}, "rank must be <="),
        ({"kind": "PivotedLowRank", "shape": [3, 2], "rank": "1"}, "positive integer 'rank'"),
        ({"kind": "PivotedLowRank", "shape": [3, 2], "rank": 1}, "side"),
        ({"kind": "PivotedLowRank", "shape": [3, 2], "rank": 1, "side": ["rows"]}, "side"),
        ({"kind": "SemiSparse", "shape": [3, 6], "group": 4, "kept": 2}, "divide"),
        ({"kind": "SemiSparse", "shape": [3, 8], "group": 4, "kept": 5}, "kept must be <="),
        ({"kind": "SemiSparse", "shape": [3, 8], "group": 4, "kept": 4}, "1 <= kept < group"),
        ({"kind": "Spectral", "shape": [3, 2], "rank": 2, "trained": 3}, "trained must be <="),
        ({"kind": "Diagonal", "size": None}, "positive integer 'size'"),
        ({"kind": "Permutation", "shape": [2, 2]}, "positive integer 'size'"),
        ({"kind": "Sum"}, "members"),
        ({"kind": "Sum", "members": []}, "at least one"),
        (
            {"kind": "Sum", "members": [{"kind": "Diagonal", "size": 1}, {"kind": "Diagonal", "size": 2}]},
            "one shape",
        ),
        ({"kind": "Product", "members": {"kind": "Diagonal"}}, "members"),
        ({"kind": "Product", "members": [{"kind": "Diagonal", "size": n} for n in (1, 2)]}, "disagree"),
        ({"kind": "Scaled", "scale": 2.0}, "mapping"),
        ({"kind": "Recomputed"}, "mapping"),
        ({"kind": "KeptColumn", "matrix": {"kind": "Diagonal", "size": 2}, "column": 0}, "a Base in it"),
        ({"kind": "KeptColumn", "matrix": _base(2), "column": 2}, "column must be an integer from 0 to 1"),
        ({"kind": "Scheduled", "matrix": {"kind": "Diagonal", "size": 1}}, "kind"),
        ({"kind": "Scheduled", "matrix": {"kind": "Diagonal", "size": 1}, "schedule": {"kind": []}}, "kind"),
        ({"kind": "Tiled", "shape": [3, 2], "rows": 4, "columns": 1}, "rows must be <="),
        ({"kind": "BlockAffine", "length": 1, "base": {"kind": "Diagonal", "size": 1}}, "needs 'base'"),
        (
            {"kind": "ChangedFactors", "base": {"kind": "Diagonal", "size": 1}, "changes": {}},
            "needs 'base'",
        ),
        (
            {
                "kind": "ChangedFactors",
                "base": _base(3),
                "changes": {"left": {"kind": "Dense", "shape": [3, 1]}},
            },
            "no factor 'left'",
        ),
        ({"kind": "BlockAffine", "length": 2, "base": _base(3)}, "fit"),
        ({"kind": "IndexedSparse", "shape": [3, 2], "kept": 7}, "kept must be <="),
        ({"kind": "Scaled", "matrix": {"kind": "Diagonal", "size": 1}}, "scale"),
        ({"kind": "Scaled", "matrix": {"kind": "Diagonal", "size": 1}, "scale": "2"}, "scale"),
        ({"kind": "Scaled", "matrix": {"kind": "Diagonal", "size": 1}, "scale": float("inf")}, "scale"),
        (_deep(40), "nested"),
    ],
)
def test_bad_specs_say_what_is_wrong(spec: object, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        from_spec(spec, device="meta")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [matrices.Sparse, matrices.IndexedSparse])
def test_a_sparse_matrix_without_entries_is_rebuilt(kind: type):
    matrix = kind.from_dense(torch.zeros(4, 8))
    rebuilt = from_spec(matrix.spec())
    rebuilt.load_state_dict(matrix.state_dict())
    assert torch.equal(rebuilt(torch.ones(2, 8)), torch.zeros(2, 4))


@pytest.mark.parametrize("build", [matrices.Sum, matrices.Product])
def test_expressions_refuse_what_is_no_matrix(build: type):
    with pytest.raises(TypeError, match="StructuredMatrix"):
        build(torch.eye(2))
    with pytest.raises(ValueError, match="at least one"):
        build()


def test_permutation_refuses_what_is_no_permutation():
    with pytest.raises(ValueError, match="once"):
        matrices.Permutation(torch.tensor([0, 0, 1]))
    with pytest.raises(TypeError, match="integer"):
        matrices.Permutation(torch.ones(3))
    with pytest.raises(TypeError, match="1-D"):
        matrices.Diagonal(torch.eye(3))
