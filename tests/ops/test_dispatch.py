"""What all ops owe to PyTorch, whichever way a call goes."""

import functools
import importlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mlfast
from mlfast import functional as F
from mlfast.backends import BackendError

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(4, 8, generator=GENERATOR) * 2 - 1
LABELS = torch.rand(4, 8, generator=GENERATOR) < 0.5
SCORES = torch.randn(2, 4, 1, generator=GENERATOR)
WEIGHT = torch.randn(2, 4, 3, generator=GENERATOR)
GRAPH = mlfast.Graph.from_edges(torch.tensor([[0], [1]]), 4)
CALLS = {
    "aam_loss": lambda x: F.aam_loss(x, LABELS),
    "asymmetric_loss": lambda x: F.asymmetric_loss(x, LABELS),
    "cosine_linear": lambda x: F.cosine_linear(x, WEIGHT.reshape(3, 8)),
    "group_linear": lambda x: F.group_linear(x.view(4, 2, 4), WEIGHT, num_classes=6),
    "reweight_pool": lambda x: F.reweight_pool(x.view(2, 4, 2, 2), SCORES[0, :, 0]),
    "graph_attention": lambda x: F.graph_attention(x[:, None], *SCORES),
    "graph_attention, mask": lambda x: F.graph_attention(x[:, None], *SCORES, torch.ones(4, 4)),
    "graph_attention, Graph": lambda x: F.graph_attention(x[:, None], *SCORES, GRAPH),
}
each_op = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def half_needed(call, tensors, needs, monkeypatch, module):
    """Which gradients the kernels of a compiled call were asked for, where not all inputs require one."""
    asked, real = [], module.launch_backward
    monkeypatch.setattr(module, "launch_backward", lambda *a: asked.append(tuple(a[-1])) or real(*a))
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    expected = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves).sum().backward()
    call(*expected).sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], [leaf.grad for leaf in expected])
    return asked


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("name", "call", "tensors"),
    [
        ("cosine_linear", F.cosine_linear, (X, WEIGHT.reshape(3, 8))),
        ("group_linear", functools.partial(F.group_linear, num_classes=6), (X.view(4, 2, 4), WEIGHT)),
        ("reweight_pool", F.reweight_pool, (X.view(2, 4, 2, 2), SCORES[0, :, 0])),
    ],
)
def test_compiled_a_gradient_that_nobody_needs_is_not_computed(name, call, tensors, needs, monkeypatch):
    torch._dynamo.reset()
    module = importlib.import_module(f"mlfast.ops.{name}")
    assert half_needed(call, tensors, needs, monkeypatch, module) == [needs, needs]  # compiled, then not


@each_op
def test_forward_mode_is_refused_rather_than_0(call):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        call(forward_ad.make_dual(X, torch.ones_like(X)))


@each_op
def test_forward_mode_of_the_reference(call):
    with mlfast.use_backend("reference"), forward_ad.dual_level():
        assert forward_ad.unpack_dual(call(forward_ad.make_dual(X, torch.ones_like(X)))).tangent.abs().max() > 0


@each_op
def test_parameters_take_the_short_way(call):
    torch.testing.assert_close(call(torch.nn.Parameter(X)), call(X), rtol=0, atol=0)


@each_op
def test_a_compiler_meets_the_op_and_not_its_reference(call):
    torch._dynamo.reset()
    targets = []

    def compiler(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.testing.assert_close(torch.compile(call, backend=compiler, fullgraph=True)(X), call(X))
    assert [target for target in targets if target.startswith("mlfast.")], targets


@each_op
def test_a_dispatch_mode_meets_the_op(call):
    targets = [str(node.target) for node in make_fx(call)(X).graph.nodes]
    assert [target for target in targets if target.startswith("mlfast.")], targets
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = call(X)
    assert isinstance(fake, FakeTensor)
    assert fake.shape == call(X).shape


@each_op
def test_selective_checkpoints(call):
    for policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE):
        contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, policy=policy, **__: policy)
        x = X.clone().requires_grad_()
        out = checkpoint(lambda x: call(2 * x), x, use_reentrant=False, context_fn=contexts)
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(call(2 * x).sum(), x)[0], rtol=0, atol=0)


@each_op
def test_transforms_of_functions_are_refused(call):
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(RuntimeError, match=r"torch\.func.*reference"):
            transform(lambda x: call(x).sum())(X)
    with pytest.raises(RuntimeError, match=r"torch\.func.*reference"):
        torch.func.vmap(call)(torch.stack([X, X]))
    with mlfast.use_backend("reference"):
        assert torch.func.grad(lambda x: call(x).sum())(X).abs().max() > 0


@each_op
def test_forward_mode_through_the_dispatcher_is_refused_too(call):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        make_fx(lambda x: call(forward_ad.make_dual(x, torch.ones_like(x))))(X)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@each_op
def test_transforms_and_forward_mode_are_refused_in_compiled_functions_too(call, backend):
    """Once they gave gradients of None, and tangents of 0."""
    torch._dynamo.reset()
    leaf = torch.stack([X, X]).requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.func.*reference"):
        torch.compile(lambda x: torch.func.vmap(call)(x).sum(), backend=backend)(leaf).backward()
    with pytest.raises((RuntimeError, NotImplementedError), match="reference"):
        torch.compile(lambda x: torch.func.jvp(lambda x: call(x).sum(), (x,), (x,))[1], backend=backend)(X)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        torch.compile(call, backend=backend)(forward_ad.make_dual(X, torch.ones_like(X)))


@pytest.mark.parametrize("name", ["cosine_linear", "group_linear", "reweight_pool"])
def test_a_graph_traced_without_gradients_refuses_to_give_one(name):
    graph = make_fx(lambda x: CALLS[name](x))(X)
    with pytest.raises(RuntimeError, match="trace"):
        graph(X.clone().requires_grad_()).sum().backward()


@each_op
def test_batches_of_gradients_are_refused(call):
    with pytest.raises(RuntimeError, match=r"batches of gradients.*reference"):
        torch.autograd.functional.jacobian(call, X, vectorize=True)


@each_op
def test_a_compiled_graph_has_no_reference_path(call):
    torch._dynamo.reset()
    out = torch.compile(lambda x: call(x).sum(), backend="aot_eager")(X.clone().requires_grad_())
    graph = make_fx(call)(X)
    with mlfast.use_backend("reference"):
        with pytest.raises(BackendError, match="compiled or traced"):
            graph(X)
        if call not in (CALLS["aam_loss"], CALLS["asymmetric_loss"]):
            with pytest.raises(BackendError, match="compiled or traced"):
                out.backward()  # that of the losses is a multiplication


@each_op
def test_create_graph_in_a_checkpoint(call):
    """A checkpoint lets saved tensors be read once."""
    leaf, expected = X.clone().requires_grad_(), X.clone().requires_grad_()
    out = checkpoint(lambda x: call(x * 1), leaf, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(call(expected).square().sum(), expected)[0])


@each_op
def test_zeros_without_memory(call):
    x = X.clone().requires_grad_()
    out = call(x)
    (grad,) = torch.autograd.grad(out, x, torch._efficientzerotensor(out.shape, dtype=out.dtype))
    torch.testing.assert_close(grad, torch.zeros_like(x), rtol=0, atol=0)
    torch.testing.assert_close(call(torch._efficientzerotensor(X.shape)), call(torch.zeros_like(X)))


def test_meta_device():
    """On which models are counted."""
    with torch.device("meta"):
        x, labels, scores = torch.empty(4, 8), torch.empty(4, 8), torch.empty(4, 1)
        assert F.aam_loss(x, labels).is_meta
        assert F.asymmetric_loss(x, labels).is_meta
        assert F.cosine_linear(x, torch.empty(3, 8)).shape == (4, 3)
        assert F.group_linear(x.view(4, 2, 4), torch.empty(2, 4, 3), num_classes=6, cosine=True).shape == (4, 6)
        assert F.reweight_pool(x.view(2, 4, 2, 2), torch.empty(4)).shape == (2, 4)
        assert F.graph_attention(x[:, None], scores, scores, torch.ones(4, 4)).shape == (4, 1, 8)
        assert mlfast.CosineLinear(8, 3)(x).shape == (4, 3)
        assert mlfast.GraphAttention(8, 5)(x).shape == (4, 5)


@each_op
def test_negated_views(call):
    x = X.clone().requires_grad_()
    out = call(x)
    incoming = torch._neg_view(torch.ones_like(out))
    (grad,) = torch.autograd.grad(out, x, incoming, retain_graph=True)
    torch.testing.assert_close(grad, -torch.autograd.grad(out, x, torch.ones_like(out))[0])
    torch.testing.assert_close(call(torch._neg_view(X)), call(-X))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by /proc")
def test_no_memory_in_a_thread_is_an_error_not_the_end():
    program = """
import resource, torch
from mlfast.functional import group_linear
torch.set_num_threads(2)
x, weight = torch.randn(16, 300, 20000, dtype=torch.bfloat16), torch.randn(300, 20000, 1, dtype=torch.bfloat16)
group_linear(torch.randn(64, 80, 512), torch.randn(80, 512, 1), num_classes=80)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**20,) * 2)
try:
    group_linear(x, weight, num_classes=300)
except MemoryError:
    print("caught")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "caught\n", run.stderr
