"""reweight_pool as a citizen of PyTorch: autograd, torch.compile, export, autocast, the module, errors."""

import copy

import pytest
import torch

import mlfast
from mlfast.functional import reweight_pool
from mlfast.nn import ReweightPool


@pytest.fixture
def backend(backend):
    if backend == "cuda":
        pytest.skip("reweight_pool has no CUDA C++ kernel")
    return backend


@pytest.fixture
def features(device):
    return torch.randn(3, 10, 4, 5, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()


@pytest.fixture
def weight(device):
    return torch.randn(10, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()


on_cpu = pytest.mark.parametrize("device", [torch.device("cpu")])


# ----------------------------------------------------------------------------------------------------------- autograd


def test_backward_twice_through_a_retained_graph(backend, features, weight):
    out = reweight_pool(features, weight)
    first = torch.autograd.grad(out.sum(), (features, weight), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (features, weight))
    assert all(map(torch.equal, first, second))


def test_backward_twice_without_retaining_raises(backend, features, weight):
    out = reweight_pool(features, weight).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_gradients_accumulate(backend, features, weight):
    (reweight_pool(features, weight) + reweight_pool(features, weight)).sum().backward()
    once = torch.autograd.grad(reweight_pool(features, weight).sum(), (features, weight))
    torch.testing.assert_close((features.grad, weight.grad), tuple(2 * grad for grad in once))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed(backend, features, weight, needs):
    both = torch.autograd.grad(reweight_pool(features, weight).sum(), (features, weight))
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip((features, weight), needs, strict=True)]
    out = reweight_pool(*leaves)
    assert torch.equal(out, reweight_pool(features, weight).detach())
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    for leaf, need, grad in zip(leaves, needs, both, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


def test_features_are_not_kept_for_backward(backend, features, weight):
    if backend == "reference":
        pytest.skip("plain PyTorch keeps them")
    expected = torch.autograd.grad(reweight_pool(features, weight).sum(), (features, weight))
    middle = features * 1
    out = reweight_pool(middle, weight)
    with torch.no_grad():
        middle.zero_()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (features, weight)), expected)


def test_a_weight_changed_after_forward_raises(backend, features, weight):
    out = reweight_pool(features, weight)
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_strided_and_expanded_incoming_gradients(backend, features, weight):
    out = reweight_pool(features, weight)

    def grads(incoming):
        return torch.autograd.grad(out, (features, weight), incoming, retain_graph=True)

    uneven = torch.linspace(0, 1, out.numel(), device=out.device).view(10, 3).t()
    torch.testing.assert_close(grads(uneven), grads(uneven.contiguous()))
    torch.testing.assert_close(grads(torch.ones((), device=out.device).expand(3, 10)), grads(torch.ones_like(out)))


def test_inputs_stay_as_they_are(backend, features, weight):
    before = features.detach().clone(), weight.detach().clone()
    reweight_pool(features, weight).sum().backward()
    assert torch.equal(features.detach(), before[0]) and torch.equal(weight.detach(), before[1])


@on_cpu
@pytest.mark.parametrize("of", [0, 1])
def test_second_derivative_says_what_is_missing(features, weight, of):
    with mlfast.use_backend("cpu"):
        out = reweight_pool(features, weight)
        grads = torch.autograd.grad(out.sum(), (features, weight), create_graph=True)
        with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
            grads[of].sum().backward()
    with mlfast.use_backend("reference"):
        out = reweight_pool(features, weight)
        torch.autograd.grad(out.sum(), features, create_graph=True)[0].sum().backward()


# ------------------------------------------------------------------------------------------------ compile and export


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_whole(compiler, layout):
    torch._dynamo.reset()

    def step(features, weight):
        return reweight_pool(features * 0.9, weight.sigmoid()).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for rows, size in ((3, 5), (4, 6)):
        features = torch.randn(rows, 8, size, size).contiguous(memory_format=layout).requires_grad_()
        weight = torch.randn(8, requires_grad=True)
        torch.testing.assert_close(compiled(features, weight), step(features, weight))
        got, expected = (torch.autograd.grad(f(features, weight), (features, weight)) for f in (compiled, step))
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled(features.detach(), weight.detach()), step(features, weight).detach())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(backend, features, weight, layout):
    if backend == "reference":
        pytest.skip("has no custom op")
    ops = torch.ops.mlfast
    laid_out = features.detach().contiguous(memory_format=layout)
    torch.library.opcheck(ops.reweight_pool, (laid_out.requires_grad_(), weight, True, True))
    out, argmax, slope = ops.reweight_pool(laid_out.detach(), weight.detach(), True, True)
    backward = out, weight.detach(), argmax, slope, 4, 5, layout == torch.channels_last
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(ops.reweight_pool_backward, (*backward, *needs))


def test_no_exporter_meets_a_custom_op():
    model, features = ReweightPool(torch.rand(10)), torch.randn(3, 10, 4, 5)
    graph = torch.export.export(model, (features,)).graph
    assert not [node for node in graph.nodes if "mlfast" in str(node.target)]
    traced = torch.jit.trace(model, (features,))
    assert "mlfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(features), model(features))


def test_autocast_leaves_the_dtype(backend, features, weight, device):
    with torch.autocast(device.type, torch.bfloat16):
        assert reweight_pool(features, weight).dtype == torch.float32
        assert reweight_pool(features.bfloat16(), weight).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------- module


@on_cpu
def test_module_is_the_function(features, weight):
    constant, learned = ReweightPool(weight.detach()), ReweightPool(torch.nn.Parameter(weight.detach().clone()))
    assert torch.equal(constant(features), reweight_pool(features, weight))
    assert torch.equal(learned(features), constant(features))
    assert [len(list(module.parameters())) for module in (constant, learned)] == [0, 1]
    assert all("weight" in module.state_dict() for module in (constant, learned))
    assert copy.deepcopy(constant).double()(features.double()).dtype == torch.float64
    assert "channels=10" in repr(constant)
    with pytest.raises(ValueError, match=r"weight must be \[S\], floating point, got \[2, 5\]"):
        ReweightPool(torch.ones(2, 5))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(features=[[0.1]]), TypeError, "features must be a tensor, got list"),
        (dict(weight=2.0), TypeError, "weight must be a tensor, got float"),
        (dict(features=torch.ones(2, 3, 4, 4).int()), TypeError, r"features must be .* torch.int32; pass features"),
        (dict(weight=torch.ones(3, dtype=torch.complex64)), TypeError, "weight must be .* got torch.complex64"),
        (dict(features=torch.ones(2, 3, 4)), ValueError, r"features must be \[B, S, h, w\], got \[2, 3, 4\]"),
        (dict(features=torch.ones(2, 3, 0, 4)), ValueError, r"1 to .* positions, got \[2, 3, 0, 4\]"),
        (dict(weight=torch.ones(4)), ValueError, r"one value per channel, \[3\], got \[4\]"),
        (
            dict(features=torch.ones(2, 4, 5, 3)),
            ValueError,
            r"\[4\], got \[3\]; if features \[2, 4, 5, 3\] are \[B, h, w, S\], pass features.permute\(0, 3, 1, 2\)",
        ),
        (dict(weight=torch.ones(3, 1, 1)), ValueError, r"got \[3, 1, 1\]; pass weight.flatten"),
        (dict(weight=torch.ones(3, device="meta")), ValueError, "weight must be on the device of features, cpu, got"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(features=torch.zeros(2, 3, 4, 4), weight=torch.ones(3)) | change
    with pytest.raises(error, match=message):
        reweight_pool(**arguments)
