"""Sparse targets: what they hold, what they refuse, and that the losses of them are those of the dense target."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlfast
from mlfast import SparseTargets
from mlfast.functional import aam_loss, asymmetric_loss
from mlfast.ops import aam_loss as aam
from mlfast.ops._dtypes import computing_dtype
from tests.ops.loss_cases import loss_and_grad
from tests.ops.policy import FLOATS, assert_bit_equal, assert_error, assert_written, guarded, over_threads

losses = pytest.mark.parametrize("loss", [aam_loss, asymmetric_loss], ids=lambda loss: loss.__name__)
REDUCTIONS = ("sum", "mean", "batchmean", "none")


def example(rows, classes, device="cpu", share=0.05, dtype=torch.float32):
    """Scores and a dense target, among whose rows are an empty and a full one."""
    g = torch.Generator().manual_seed(rows * classes)
    scores = torch.rand(rows, classes, generator=g) * 2 - 1
    target = torch.rand(rows, classes, generator=g) < share
    target[rows // 2], target[rows // 3] = False, True
    return scores.to(device, dtype), target.to(device)


def assert_as_dense(loss, scores, target, **options):
    """Sparse and dense targets against float64, by the policy of docs/correctness.md."""
    sparse = SparseTargets.from_dense(target)
    got = loss_and_grad(loss, scores, sparse, **options)
    with mlfast.use_backend("reference"):
        plain = loss_and_grad(loss, scores, target, **options)
        truth = loss_and_grad(loss, scores.double(), target, **options)
    dtypes = computing_dtype(scores.dtype), scores.dtype
    for name, mine, theirs, exact, dtype in zip(("loss", "grad"), got, plain, truth, dtypes, strict=True):
        assert_error(f"{name} of {options}", mine, theirs, exact, dtype)


# ------------------------------------------------------------------------------------------------------- the losses


@losses
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_of_sparse_targets(backend, device, loss, dtype, reduction):
    scores, target = example(7, 61, device, dtype=dtype)
    weight = torch.linspace(0.1, 3, 61, device=device)
    assert_as_dense(loss, scores, target, reduction=reduction)
    assert_as_dense(loss, scores, target, reduction=reduction, class_weight=weight, label_smoothing=0.1)
    assert_as_dense(loss, scores, target, reduction=reduction, gamma_neg=1.5, gamma_pos=0.5)


@losses
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (40, 1), (61, 5), (3, 511), (2, 512), (2, 2731)])
def test_shapes_with_poisoned_memory(backend, device, loss, rows, classes):
    scores, target = example(rows, classes, device)
    for labels in (target, target & False, target | True):
        assert_as_dense(loss, scores, labels)
    assert_as_dense(loss, scores.bfloat16(), target, reduction="none")


@pytest.mark.parametrize("options", [{}, dict(gamma_neg=0.5), dict(margin=0.3), dict(label_smoothing=0.1)], ids=str)
def test_many_tiles_and_rows_that_end_inside_them(options):
    for rows, classes in ((40, 2731), (3000, 33)):
        assert_as_dense(aam_loss, *example(rows, classes, share=0.02), **options)


def test_bits_are_those_of_the_dense_target(backend, device):
    """Holds for aam_loss; asymmetric_loss, whose negatives fuse other multiply-adds, differs by ulps."""
    scores, target = example(7, 701, device)
    for options in (dict(), dict(label_smoothing=0.1), dict(gamma_neg=2.0, gamma_pos=1.0)):
        dense = loss_and_grad(aam_loss, scores, target, reduction="none", **options)
        sparse = loss_and_grad(aam_loss, scores, SparseTargets.from_dense(target), reduction="none", **options)
        assert all(map(torch.equal, dense, sparse)), options


@losses
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_bit_equal_over_threads(loss, reduction):
    scores, target = example(300, 601)
    sparse = SparseTargets.from_dense(target)
    assert_bit_equal(over_threads(lambda: loss_and_grad(loss, scores, sparse, reduction=reduction)))


@losses
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(backend, device, loss, reduction):
    for shape in ((0, 5), (4, 0)):
        scores = torch.zeros(shape, device=device, requires_grad=True)
        indptr = torch.zeros(shape[0] + 1, dtype=torch.int64, device=device)
        sparse = SparseTargets(indptr, torch.zeros(0, dtype=torch.int32, device=device), shape[1])
        value = loss(scores, sparse, reduction=reduction)
        value.sum().backward()
        assert value.sum() == 0
        assert scores.grad.shape == shape


def test_int32_slices_and_layouts(backend, device):
    scores, target = example(12, 40, device)
    expected = loss_and_grad(aam_loss, scores[3:9], target[3:9])
    sparse = SparseTargets.from_dense(target)
    narrow = SparseTargets(sparse.indptr, sparse.indices.int(), 40)
    for same in (sparse[3:9], narrow[3:9], narrow[1:][2:8]):
        torch.testing.assert_close(loss_and_grad(aam_loss, scores.t().contiguous().t()[3:9], same), expected)


def test_guard_bands(backend, device):
    if backend == "reference":
        pytest.skip("allocates its own outputs")
    from mlfast.ops._workspace import workspace_for
    from mlfast.ops.elementwise_loss import LAUNCH, kernel_numbers

    scores, target = example(5, 103, device)
    sparse = SparseTargets.from_dense(target)
    for smoothing in (0.0, 0.1):
        options = aam.Options(23.0, 0.0, 0.7, 1.0, 0.0, 0.0, smoothing, "none")
        buffers, outs = zip(*(guarded(scores.shape, device=device) for _ in range(2)), strict=True)
        numbers = kernel_numbers(aam.LOSS, options, 1)
        LAUNCH[backend]("aam_loss", workspace_for, scores, sparse.indices, sparse.indptr, None, *outs, None, numbers)
        assert_written(buffers)


def test_backward_twice_through_a_retained_graph(backend, device):
    scores, target = example(6, 20, device)
    scores.requires_grad_()
    loss = aam_loss(scores, SparseTargets.from_dense(target), reduction="mean")
    first, second = (torch.autograd.grad(loss, scores, retain_graph=True)[0].clone() for _ in range(2))
    assert torch.equal(first, second)


@losses
def test_compile_whole(loss):
    torch._dynamo.reset()

    def step(scores, target, weight):
        return loss(scores * 0.9, target, class_weight=weight, reduction="mean") * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        scores, target = example(rows, 20)
        sparse, weight = SparseTargets.from_dense(target), torch.rand(20)
        grads = []
        for function in (compiled, step):
            leaf = scores.clone().requires_grad_()
            function(leaf, sparse, weight).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_opcheck(backend, device):
    if backend == "reference":
        pytest.skip("has no custom op")
    scores, target = example(3, 20, device)
    sparse = SparseTargets.from_dense(target)
    numbers = aam.Options(23.0, 0.1, 0.7, 1.0, 0.0, 0.05, 0.0, "mean")
    torch.library.opcheck(torch.ops.mlfast.aam_loss, (scores, sparse.indices, sparse.indptr, None, *numbers, True))


def test_modules_take_them():
    scores, target = example(6, 20)
    sparse = SparseTargets.from_dense(target)
    for module in (mlfast.AAMLoss(), mlfast.AsymmetricLoss()):
        torch.testing.assert_close(module(scores, sparse), module(scores, target))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.sets(st.integers(0, 69), max_size=70), max_size=30),
    classes=st.integers(70, 600),
    scale=st.floats(1, 100),
    gamma_neg=st.floats(0, 8),
    shift=st.sampled_from([0.0, 0.05]),
)
def test_any_rows(rows, classes, scale, gamma_neg, shift):
    sparse = SparseTargets.from_lists([list(row) for row in rows], classes)
    dense = torch.zeros(len(rows), classes, dtype=torch.bool)
    for row, indices in zip(dense, rows, strict=True):
        row[list(indices)] = True
    assert torch.equal(sparse.to_dense(), dense)
    if len(rows):
        scores = torch.rand(len(rows), classes, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert_as_dense(aam_loss, scores, dense, scale=scale, gamma_neg=gamma_neg, prob_shift=shift)


# ------------------------------------------------------------------------------------------------------ the container


def rows_of(*rows, classes=10):
    return SparseTargets.from_lists(rows, classes)


def test_round_trips():
    _, target = example(5, 33)
    for dense in (target, target.to(torch.uint8), target.double()):
        sparse = SparseTargets.from_dense(dense)
        assert torch.equal(sparse.to_dense(), target)
        assert torch.equal(pickle.loads(pickle.dumps(sparse)).to_dense(), target)
        assert torch.equal(sparse[1:4].to_dense(), target[1:4])
        assert torch.equal(sparse[:0].to_dense(), target[:0])
    assert sparse.to("cpu") is sparse


def test_unsorted_rows_are_sorted():
    indptr, indices = torch.tensor([0, 3, 3, 5]), torch.tensor([7, 2, 9, 4, 0], dtype=torch.int32)
    sparse = SparseTargets(indptr, indices, 10)
    assert sparse.indices.tolist() == [2, 7, 9, 0, 4]
    assert sparse.indices.dtype == torch.int32
    assert indices.tolist() == [7, 2, 9, 4, 0]


def test_what_it_says_of_itself():
    sparse = rows_of([1, 2], [], [3])
    assert repr(sparse) == "SparseTargets(3 x 10, 3 positives)"
    assert repr(sparse[1:]) == "SparseTargets(2 x 10, 1 positives)"
    assert (len(sparse), sparse.shape, sparse.device) == (3, (3, 10), torch.device("cpu"))


def test_on_other_devices_nothing_waits():
    """A tensor on meta has no values, so what would wait for a GPU raises there."""
    there = rows_of([1, 2], [], [3]).to("meta", non_blocking=True)
    again = SparseTargets(there.indptr, there.indices, 10)
    for sparse in (there, again, again[1:]):
        assert sparse.to_dense().shape == (len(sparse), 10)
        assert "device='meta'" in repr(sparse)


def test_room_behind_the_last_row_is_not_read(backend, device):
    """For CUDA graphs: indices beyond the last row pointer belong to no row."""
    sparse = rows_of([1, 2], [], [3]).to(device)
    room = torch.cat([sparse.indices, torch.tensor([-5, 77], device=device)])
    with_room = SparseTargets._of(sparse.indptr, room, 10)
    scores = torch.rand(3, 10, device=device)
    assert torch.equal(aam_loss(scores, with_room), aam_loss(scores, sparse))


@pytest.mark.parametrize(
    ("indptr", "indices", "classes", "error", "message"),
    [
        ([0, 2], [1, 10], 10, ValueError, r"indices must be in \[0, 10\), got 10 in row 0"),
        ([0, 1, 1, 3], [1, 4, -1], 10, ValueError, r"got -1 in row 2"),
        ([0, 1, 4], [1, 4, 5, 4], 10, ValueError, "unique within a row, got 4 twice in row 1"),
        ([0, 3], [1, 4], 10, ValueError, "number of indices, 2: got 0 to 3"),
        ([1, 2], [1, 4], 10, ValueError, "got 1 to 2"),
        ([0, 2, 1, 2], [1, 4], 10, ValueError, "never fall, but falls in row 1, 2 to 1"),
        ([], [], 10, ValueError, r"\[B \+ 1\]"),
        ([[0, 1]], [1], 10, ValueError, "indptr must have one dimension"),
        ([0, 1], [1.0], 10, TypeError, "indices must be torch.int32 or torch.int64, got torch.float32"),
        ([0.0, 1.0], [1], 10, TypeError, "indptr must be torch.int64, got torch.float32"),
        ([0, 1], [1], 10.0, TypeError, r"num_classes must be an integer, got float 10.0; convert it with int\(\)"),
        ([0, 1], [1], -1, ValueError, "num_classes must be >= 0, got -1"),
    ],
)
def test_errors_name_what_came(indptr, indices, classes, error, message):
    as_tensor = [torch.tensor(values, dtype=None if values else torch.int64) for values in (indptr, indices)]
    with pytest.raises(error, match=message):
        SparseTargets(*as_tensor, classes)


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [], [3]],
        [np.array([1, 2]), np.array([], dtype=np.int32), (np.uint8(3),)],
        [torch.tensor([1, 2]), torch.tensor([]), [torch.tensor(3)]],
        iter([{1, 2}, range(0), [np.int64(3)]]),
    ],
    ids=("ints", "numpy", "torch", "iterators"),
)
def test_rows_may_be_of_numpy_and_torch(rows):
    sparse = SparseTargets.from_lists(rows, np.int64(10))
    assert (sparse.indptr.tolist(), sparse.indices.tolist()) == ([0, 2, 2, 3], [1, 2, 3])
    assert type(sparse.num_classes) is int


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1], [2, 3.0]], r"each class in row 1 must be an integer, got float 3\.0; convert it with int\(\)"),
        ([[True, 2]], "each class in row 0 must be an integer, got bool True"),
        ([torch.tensor([True, False])], "each class in row 0 must be an integer, got bool True"),
        ([[torch.tensor(True)]], r"got Tensor tensor\(True\)"),
        ([np.array([1.0])], r"got float 1\.0"),
        ([["1"]], "got str '1'"),
        ([[1], 2], r"rows must hold a list .* got int 2 for row 1; pass \[\[1, 2\]\] for one picture"),
        (torch.tensor([1, 2]), "got int 1 for row 0"),
        (["12"], "got str '12' for row 0"),
        (3, "rows must be a list of lists of classes, got int"),
    ],
)
def test_rows_that_are_no_lists_of_classes(rows, message):
    with pytest.raises(TypeError, match=message):
        SparseTargets.from_lists(rows, 10)


@pytest.mark.parametrize("arguments", [(torch.float32,), ("cpu", torch.float32), (None,)], ids=str)
def test_moving_takes_no_dtype(arguments):
    with pytest.raises(TypeError, match=r"takes a device and non_blocking, a bool, got .*; leave out a dtype"):
        rows_of([1]).to(*arguments)


def test_what_rows_cannot_hold():
    for target, message in (
        (torch.tensor([[1, -1]]), "unknown"),
        (torch.tensor([[255]], dtype=torch.uint8), "unknown"),
        (torch.tensor([[float("nan")]]), "or NaN"),
        (torch.tensor([[0.3]]), "soft"),
        (torch.tensor([[2.0]]), "other than 0 and 1"),
        (torch.tensor([1]), r"\[B, K\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseTargets.from_dense(target)
    for target, got in (([[1, 0]], "list"), (torch.tensor([[1j]]), "torch.complex64")):
        with pytest.raises(TypeError, match=rf"target must be .* tensor \[B, K\], got {got}; pass torch.as_tensor"):
            SparseTargets.from_dense(target)
    with pytest.raises(TypeError, match="slice of step 1"):
        rows_of([1])[0]


def test_losses_say_what_does_not_fit():
    sparse = rows_of([1], [2])
    with pytest.raises(ValueError, match=r"target must have the shape of cos, \(2, 9\), got \(2, 10\)"):
        aam_loss(torch.zeros(2, 9), sparse)
    with pytest.raises(ValueError, match="target must be on the device of cos, cpu, got meta"):
        aam_loss(torch.zeros(2, 10), sparse.to("meta"))
    with pytest.raises(TypeError, match=r"target must be a tensor or mlfast.SparseTargets, got list"):
        aam_loss(torch.zeros(2, 10), [[1], [2]])


def test_from_lists_checks_whatever_the_default_device_is():
    with torch.device("meta"):
        assert SparseTargets.from_lists([[1], []], 3).indptr.device.type == "cpu"
        with pytest.raises(ValueError, match="got 99 in row 1"):
            SparseTargets.from_lists([[1], [99]], 3)
