"""Attention over complete graphs as a citizen of PyTorch: autograd, torch.compile, export, errors."""

import pytest
import torch

from mlfast.ops import _graph_attention_complete as route
from tests.ops.test_graph_attention_complete import complete_attention, example

on_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@pytest.fixture
def backend(backend):
    if backend == "cuda":
        pytest.skip("graph attention has no CUDA C++ kernel")
    return backend


@pytest.fixture
def tensors(device):
    return [t.requires_grad_() for t in example((12, 2, 3), device=device)]


def test_backward_twice_through_a_retained_graph(backend, tensors):
    out = complete_attention(*tensors, 0.2)
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out.sum(), tensors)))


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)])
def test_only_the_gradients_that_are_needed(backend, tensors, needs):
    every = torch.autograd.grad(complete_attention(*tensors, 0.2).square().sum(), tensors)
    leaves = [t.detach().clone().requires_grad_(bool(need)) for t, need in zip(tensors, needs, strict=True)]
    out = complete_attention(*leaves, 0.2)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.square().sum().backward()
    for leaf, need, grad in zip(leaves, needs, every, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


def test_strided_and_expanded_incoming_gradients(backend, tensors):
    out = complete_attention(*tensors, 0.2)

    def grads(incoming):
        return torch.autograd.grad(out, tensors, incoming, retain_graph=True)

    uneven = torch.linspace(0, 1, out.numel(), device=out.device).view(3, 2, 12).permute(2, 1, 0)
    assert all(map(torch.equal, grads(uneven), grads(uneven.contiguous())))
    assert all(map(torch.equal, grads(out.new_ones(()).expand_as(out)), grads(torch.ones_like(out))))


def test_a_value_changed_after_forward_raises(backend, tensors):
    out = complete_attention(*tensors, 0.2)
    with torch.no_grad():
        tensors[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_cpu
@pytest.mark.parametrize("of", [0, 1, 2])
def test_second_derivative_says_what_is_missing(backend, tensors, of):
    grads = torch.autograd.grad(complete_attention(*tensors, 0.2).sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
        grads[of].sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_whole(compiler):
    torch._dynamo.reset()

    def step(value, src, dst):
        return complete_attention(value * 0.9, src.sin(), dst, 0.2).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for nodes in (7, 12):
        tensors = [t.requires_grad_() for t in example((nodes, 2, 3))]
        torch.testing.assert_close(compiled(*tensors), step(*tensors))
        got, expected = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, step))
        torch.testing.assert_close(got, expected)


def test_opcheck(backend, tensors):
    if backend == "reference":
        pytest.skip("has no custom op")
    ops = torch.ops.mlfast
    torch.library.opcheck(ops.graph_attention_complete, (*tensors, 0.2))
    value, src, dst = (t.detach() for t in tensors)
    out, order, weights = ops.graph_attention_complete(value, src, dst, 0.2)
    torch.library.opcheck(ops.graph_attention_complete_backward, (out, value, order, weights, torch.float32, 0.2))


def test_no_exporter_meets_a_custom_op():
    class Attention(torch.nn.Module):
        def forward(self, value, src, dst):
            return complete_attention(value, src, dst, 0.2)

    inputs = tuple(example((7, 2, 3)))
    graph = torch.export.export(Attention(), inputs).graph
    assert not [node for node in graph.nodes if "mlfast" in str(node.target)]
    assert "mlfast::" not in str(torch.jit.trace(Attention(), inputs).inlined_graph)


def test_too_many_nodes_raise():
    scores = torch.empty(route.MOST_NODES + 1, 1, device="meta")
    with pytest.raises(ValueError, match="value must have at most"):
        route.complete_attention("cpu", scores[..., None], scores, scores, 0.2)
