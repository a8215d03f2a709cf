"""group_linear as a citizen of PyTorch: autograd, torch.compile, export, autocast, errors."""

import pytest
import torch
from torch.nn import functional as F

import mlfast
from mlfast.functional import group_linear
from mlfast.nn import GroupLinear

CLASSES = 7


@pytest.fixture
def backend(backend):
    if backend == "cuda":
        pytest.skip("group_linear has no CUDA C++ kernel")
    return backend


@pytest.fixture(params=[False, True], ids=["product", "cosine"])
def cosine(request):
    return request.param


def leaves_on(device):
    g = torch.Generator().manual_seed(0)
    shapes = (5, 3, 10), (3, 10, 3), (CLASSES,)
    return [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]


@pytest.fixture
def leaves(device):
    """x, weight, bias."""
    return leaves_on(device)


def apply(*leaves, cosine=True):
    return group_linear(*leaves, num_classes=CLASSES, cosine=cosine)


# ----------------------------------------------------------------------------------------------------------- autograd


def test_backward_twice_through_a_retained_graph(backend, leaves):
    out = apply(*leaves)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    assert all(map(torch.equal, first, second))


def test_backward_twice_without_retaining_raises(backend, leaves):
    out = apply(*leaves).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("needs", [
    (True, False, False), (False, True, False), (False, False, True), (False, True, True), (False, False, False),
])  # fmt: skip
def test_only_the_gradients_that_are_needed(backend, leaves, needs):
    every = torch.autograd.grad(apply(*leaves).sum(), leaves)
    chosen = [t.detach().clone().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
    out = apply(*chosen)
    assert torch.equal(out, apply(*leaves).detach())
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    for leaf, need, grad in zip(chosen, needs, every, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


def test_no_normalised_copy_is_kept(backend, leaves, cosine):
    if backend == "reference":
        pytest.skip("plain PyTorch keeps them")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        apply(*leaves, cosine=cosine)
    own = [t for t in kept if all(t is not leaf for leaf in leaves)]
    assert sum(t.numel() for t in own) == (5 * CLASSES + 5 * 3 + 3 * 3 if cosine else 0)  # cosines, lengths


def test_a_weight_changed_after_forward_raises(backend, leaves):
    out = apply(*leaves, cosine=False)
    with torch.no_grad():
        leaves[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_strided_and_expanded_incoming_gradients(backend, leaves, cosine):
    out = apply(*leaves, cosine=cosine)

    def grads(incoming):
        return torch.autograd.grad(out, leaves, incoming, retain_graph=True)

    uneven = torch.linspace(0, 1, out.numel(), device=out.device).view(CLASSES, 5).t()
    torch.testing.assert_close(grads(uneven), grads(uneven.contiguous()))
    torch.testing.assert_close(grads(torch.ones((), device=out.device).expand(5, CLASSES)), grads(torch.ones_like(out)))


def test_inputs_stay_as_they_are(backend, leaves, cosine):
    before = [leaf.detach().clone() for leaf in leaves]
    apply(*leaves, cosine=cosine).sum().backward()
    assert all(torch.equal(leaf.detach(), old) for leaf, old in zip(leaves, before, strict=True))


@pytest.mark.parametrize("of", [0, 1])
def test_second_derivative_says_what_is_missing(cosine, of):
    leaves = leaves_on("cpu")
    with mlfast.use_backend("cpu"):
        grads = torch.autograd.grad(apply(*leaves, cosine=cosine).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
            grads[of].sum().backward()
    with mlfast.use_backend("reference"):
        out = apply(*leaves, cosine=cosine)
        torch.autograd.grad(out.sum(), leaves, create_graph=True)[of].sum().backward()


# ------------------------------------------------------------------------------------------------ compile and export


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_whole(compiler, cosine):
    torch._dynamo.reset()

    def step(x, weight, bias):
        return apply(x * 0.9, weight.sigmoid(), bias, cosine=cosine).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    leaves = leaves_on("cpu")
    by_group = torch.randn(3, 6, 10).transpose(0, 1).requires_grad_()
    for x in (leaves[0], torch.randn(4, 3, 10, requires_grad=True), by_group):
        inputs = x, *leaves[1:]
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
        got, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, step))
        torch.testing.assert_close(got, expected)


def test_compile_without_bias_under_autocast(cosine):
    torch._dynamo.reset()
    x, weight, _ = leaves_on("cpu")

    def step(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return apply(x, weight, cosine=cosine)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    out = compiled(x.bfloat16(), weight)
    assert out.dtype == (torch.float32 if cosine else torch.bfloat16)
    torch.testing.assert_close(out, step(x.bfloat16(), weight))
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), weight) for o in (out, step(x.bfloat16(), weight))))


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(backend, leaves, cosine, with_bias):
    if backend == "reference":
        pytest.skip("has no custom op")
    ops = torch.ops.mlfast
    x, weight, bias = leaves[0], leaves[1], leaves[2] if with_bias else None
    torch.library.opcheck(ops.group_linear, (x, weight, bias, CLASSES, cosine, torch.float32, True, True))
    by_group = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    inputs = by_group, weight.detach(), None if bias is None else bias.detach()
    out, cosines, *lengths = ops.group_linear(*inputs, CLASSES, cosine, torch.float32, False, False)
    saved = out if cosine and bias is None else cosines
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(ops.group_linear_backward, (out, *inputs[:2], saved, *lengths, cosine, *needs))


def test_no_exporter_meets_a_custom_op(cosine):
    model, x = GroupLinear(10, CLASSES, 3, cosine=cosine), torch.randn(5, 3, 10)
    graph = torch.export.export(model, (x,)).graph
    assert not [node for node in graph.nodes if "mlfast" in str(node.target)]
    traced = torch.jit.trace(model, (x,))
    assert "mlfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


def test_autocast(backend, leaves, device, cosine):
    """As torch's linear; cosines stay in float32, and nothing is rounded on the way to them."""
    x, weight, bias = leaves
    plain = apply(x.bfloat16(), weight, bias, cosine=cosine)
    assert plain.dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        out = apply(x.bfloat16(), weight, bias, cosine=cosine)
        assert out.dtype == (torch.float32 if cosine else F.linear(x, weight[0].t()).dtype)
        assert apply(x.double(), weight, bias, cosine=cosine).dtype == torch.float64
    torch.testing.assert_close(out.float(), plain, rtol=0.02, atol=0 if cosine else 0.05)
    grads = torch.autograd.grad(out.sum(), leaves)
    expected = torch.autograd.grad(plain.sum(), leaves)
    torch.testing.assert_close(grads, expected, rtol=0.02, atol=0.05)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[[0.1]]), TypeError, "x must be a tensor, got list"),
        (dict(bias=2.0), TypeError, "bias must be a tensor, got float"),
        (dict(x=torch.ones(2, 3, 4).int()), TypeError, r"x must be .* torch.int32; pass x.float"),
        (dict(weight=torch.ones(3, 4, 2, dtype=torch.complex64)), TypeError, "weight must be .* got torch.complex64"),
        (dict(x=torch.ones(2, 4)), ValueError, r"x must be \[B, L, D\] .* got \[2, 4\]"),
        (dict(x=torch.ones(2, 3, 0)), ValueError, r"at least 1, got \[2, 3, 0\]"),
        (dict(weight=torch.ones(2, 4, 2)), ValueError, r"weight must be \[3, 4, f\] .* got \[2, 4, 2\]"),
        (dict(num_classes=7), ValueError, "from 1 to L \\* f = 6, got 7"),
        (dict(num_classes=0), ValueError, "from 1 to L \\* f = 6, got 0"),
        (dict(num_classes=5.0), TypeError, r"num_classes must be an integer, got float 5.0; convert it with int\(\)"),
        (dict(weight=torch.ones(3, 4, 2).to_sparse()), TypeError, "weight must be a dense tensor, .*weight.to_dense"),
        (dict(bias=torch.ones(6)), ValueError, r"one value per class, \[5\], got \[6\]; pass bias\[:num_classes\]"),
        (dict(weight=torch.ones(3, 4, 2, device="meta")), ValueError, "weight must be on the device of x, cpu, got"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(x=torch.zeros(2, 3, 4), weight=torch.ones(3, 4, 2), bias=torch.ones(5), num_classes=5) | change
    with pytest.raises(error, match=message):
        group_linear(**arguments)
