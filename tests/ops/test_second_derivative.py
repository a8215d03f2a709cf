"""A second derivative by chosen inputs: where nothing but these is asked for, it must not pass the gradients by."""

import pytest
import torch

from mlfast.functional import (
    aam_loss,
    asymmetric_loss,
    cosine_linear,
    graph_attention,
    group_linear,
    reweight_pool,
)

NODES = 6
TARGET = torch.eye(4, 5)
FEW, MANY = torch.eye(NODES, dtype=torch.bool), ~torch.eye(NODES, dtype=torch.bool)
NODE_SIZES = (NODES, 2, 3), (NODES, 2), (NODES, 2)
GROUP_SIZES = (2, 4, 8), (4, 8, 2)
OPS = {
    "aam_loss": (lambda x: aam_loss(x, TARGET.to(x.device)), [(4, 5)]),
    "asymmetric_loss": (lambda x: asymmetric_loss(x, TARGET.to(x.device), reduction="none"), [(4, 5)]),
    "cosine_linear": (cosine_linear, [(4, 5), (3, 5)]),
    "group_linear": (lambda x, w: group_linear(x, w, num_classes=8), GROUP_SIZES),
    "group_linear cosine": (lambda x, w: group_linear(x, w, num_classes=8, cosine=True), GROUP_SIZES),
    "graph_attention complete": (graph_attention, NODE_SIZES),
    "graph_attention few": (lambda v, *scores: graph_attention(v, *scores, FEW.to(v.device)), NODE_SIZES),
    "graph_attention many": (lambda v, *scores: graph_attention(v, *scores, MANY.to(v.device)), NODE_SIZES),
    "reweight_pool": (reweight_pool, [(2, 3, 4, 4), (3,)]),
}


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("name", OPS)
def test_second_derivative_by_chosen_inputs_raises(name, device):
    op, sizes = OPS[name]
    leaves = [torch.randn(size, device=device, requires_grad=True) for size in sizes]
    (grad,) = torch.autograd.grad(op(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), leaves[-1])


def test_hessian_raises():
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda x: aam_loss(x, TARGET), torch.randn(4, 5))


class Scores(torch.Tensor):
    """What is no plain tensor takes the way through the dispatcher."""


def test_through_the_dispatcher():
    scores = torch.randn(4, 5).as_subclass(Scores).requires_grad_()
    (grad,) = torch.autograd.grad(aam_loss(scores, TARGET), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), scores)
