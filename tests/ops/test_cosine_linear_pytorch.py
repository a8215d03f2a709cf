"""cosine_linear as a citizen of PyTorch: autograd, torch.compile, export, autocast, errors."""

import pytest
import torch

import mlfast
from mlfast.functional import cosine_linear
from mlfast.nn import CosineLinear


@pytest.fixture
def backend(backend):
    if backend == "cuda":
        pytest.skip("cosine_linear has no CUDA C++ kernel")
    return backend


@pytest.fixture
def x(device):
    return torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()


@pytest.fixture
def weight(device):
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()


on_cpu = pytest.mark.parametrize("device", [torch.device("cpu")])


# ----------------------------------------------------------------------------------------------------------- autograd


def test_backward_twice_through_a_retained_graph(backend, x, weight):
    out = cosine_linear(x, weight)
    first = torch.autograd.grad(out.square().sum(), (x, weight), retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), (x, weight))
    assert all(map(torch.equal, first, second))


def test_backward_twice_without_retaining_raises(backend, x, weight):
    out = cosine_linear(x, weight).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_gradients_accumulate(backend, x, weight):
    (cosine_linear(x, weight) + cosine_linear(x, weight)).sum().backward()
    once = torch.autograd.grad(cosine_linear(x, weight).sum(), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), tuple(2 * grad for grad in once))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed(backend, x, weight, needs):
    both = torch.autograd.grad(cosine_linear(x, weight).sum(), (x, weight))
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True)]
    out = cosine_linear(*leaves)
    assert torch.equal(out, cosine_linear(x, weight).detach())
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    for leaf, need, grad in zip(leaves, needs, both, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


def test_cosines_may_be_changed_in_place(backend, x, weight):
    """Backward does not need them, as that of a linear layer does not."""
    expected = torch.autograd.grad(20 * cosine_linear(x, weight).sum(), (x, weight))
    got = torch.autograd.grad(cosine_linear(x, weight).mul_(20).sum(), (x, weight))
    torch.testing.assert_close(got, expected)


def test_a_weight_changed_after_forward_raises(backend, x, weight):
    out = cosine_linear(x, weight)
    with torch.no_grad():
        weight.zero_()
    if backend == "reference":
        pytest.skip("plain PyTorch keeps normalised copies")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_strided_and_expanded_incoming_gradients(backend, x, weight):
    out = cosine_linear(x, weight)

    def grads(incoming):
        return torch.autograd.grad(out, (x, weight), incoming, retain_graph=True)

    uneven = torch.linspace(0, 1, out.numel(), device=out.device).view(6, 3).t()
    torch.testing.assert_close(grads(uneven), grads(uneven.contiguous()))
    torch.testing.assert_close(grads(torch.ones((), device=out.device).expand(3, 6)), grads(torch.ones_like(out)))


def test_inputs_and_incoming_gradient_stay_as_they_are(backend, x, weight):
    out = cosine_linear(x, weight)
    incoming = torch.linspace(0, 1, out.numel(), device=out.device).view(out.shape)
    before = [t.detach().clone() for t in (x, weight, incoming)]
    out.backward(incoming)
    assert all(map(torch.equal, before, (x.detach(), weight.detach(), incoming)))


@on_cpu
@pytest.mark.parametrize("of", [0, 1])
def test_second_derivative_says_what_is_missing(x, weight, of):
    with mlfast.use_backend("cpu"):
        out = cosine_linear(x, weight)
        grads = torch.autograd.grad(out.sum(), (x, weight), create_graph=True)
        with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
            grads[of].sum().backward()
    with mlfast.use_backend("reference"):
        out = cosine_linear(x, weight)
        torch.autograd.grad(out.sum(), x, create_graph=True)[0].sum().backward()


# ------------------------------------------------------------------------------------------------ compile and export


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_whole(compiler):
    torch._dynamo.reset()

    def step(x, weight):
        return cosine_linear(x * 0.9, weight.sigmoid()).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for shape, classes in (((3, 5, 8), 6), ((4, 6, 8), 7)):
        x, weight = torch.randn(shape, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
        torch.testing.assert_close(compiled(x, weight), step(x, weight))
        got, expected = (torch.autograd.grad(f(x, weight), (x, weight)) for f in (compiled, step))
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled(x.detach(), weight.detach()), step(x, weight).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, x, weight, dtype):
    if backend == "reference":
        pytest.skip("has no custom op")
    ops = torch.ops.mlfast
    features = x.detach().to(dtype).view(1, 3, 10)
    torch.library.opcheck(ops.cosine_linear, (features.clone().requires_grad_(), weight, True, True))
    cos, *inverse = ops.cosine_linear(features, weight.detach(), False, False)
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(ops.cosine_linear_backward, (cos, features, weight.detach(), *inverse, *needs))


def test_no_exporter_meets_a_custom_op():
    model, x = CosineLinear(10, 6), torch.randn(3, 10)
    graph = torch.export.export(model, (x,)).graph
    assert not [node for node in graph.nodes if "mlfast" in str(node.target)]
    traced = torch.jit.trace(model, (x,))
    assert "mlfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_inside(backend, x, weight, device, dtype):
    x = x.detach().to(dtype).requires_grad_()

    def grads(out):
        return torch.autograd.grad(out, (x, weight), out.detach(), retain_graph=True)

    outside = cosine_linear(x, weight)
    with torch.autocast(device.type, torch.bfloat16):
        inside = cosine_linear(x, weight)
        if backend != "reference":  # PyTorch's own products round where backward runs under autocast
            assert all(map(torch.equal, grads(inside), grads(outside)))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert all(map(torch.equal, grads(inside), grads(outside)))


@on_cpu
def test_autocast_does_not_reach_inside_a_compiled_step(x, weight):
    torch._dynamo.reset()
    outside = cosine_linear(x, weight)
    compiled = torch.compile(cosine_linear, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = compiled(x, weight)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[[0.1]]), TypeError, "x must be a tensor, got list"),
        (dict(weight=2.0), TypeError, "weight must be a tensor, got float"),
        (dict(x=torch.ones(2, 4).int()), TypeError, r"x must be .* torch.int32; pass x.float"),
        (dict(weight=torch.ones(3, 4, dtype=torch.complex64)), TypeError, "weight must be .* got torch.complex64"),
        (dict(weight=torch.ones(4)), ValueError, r"weight must be \[K, D\], got \[4\]"),
        (dict(weight=torch.ones(3, 0)), ValueError, r"D of at least 1, got \[3, 0\]"),
        (dict(x=torch.ones(2, 3)), ValueError, r"x must be \[..., 4\], .* got \[2, 3\]"),
        (dict(x=torch.ones(())), ValueError, r"x must be \[..., 4\], .* got \[\]"),
        (dict(weight=torch.ones(3, 4, device="meta")), ValueError, "weight must be on the device of x, cpu, got meta"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(x=torch.zeros(2, 4), weight=torch.ones(3, 4)) | change
    with pytest.raises(error, match=message):
        cosine_linear(**arguments)
