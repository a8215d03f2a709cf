"""The paper's graph branch: two graph attention layers over word vectors make the channel weights of a feature map.

``training`` is the branch with its gradients, ``inference`` the branch and the pooling that it weighs, where mlfast
takes the weights as constants (``mlfast unfolded`` computes them anew). ``eager`` is the same with every op of mlfast
as its reference in plain PyTorch. ``products alone`` is the two linear layers with their gradients.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlfast
from bench.race import number_of_sets, race
from mlfast.functional import reweight_pool

WORDS, CHANNELS, SIDE, NEIGHBOURS = 300, 1280, 14, 6
SIZES = {"COCO K 80": 80, "VG500 K 500": 500}
QUICK = "COCO K 80"


class Branch(nn.Module):
    """Two layers, each with the activations of the released code; a channel's weight is its largest over the labels."""

    def __init__(self, labels):
        super().__init__()
        self.register_buffer("words", torch.randn(labels, WORDS))
        self.layers = nn.ModuleList(mlfast.nn.GraphAttention(size, CHANNELS) for size in (WORDS, CHANNELS))

    def weight(self, graph):
        """Channel weights ``[S]``."""
        x = self.words
        for layer in self.layers:
            x = F.leaky_relu(F.elu(layer(x, graph)), 0.2)
        return x.amax(dim=0).sigmoid()


class Products(Branch):
    """The linear layers of the branch."""

    def weight(self, graph):
        """Some ``[S]``."""
        x = self.words
        for layer in self.layers:
            x = layer.lin(x)
        return x.sum(dim=0)


def label_graph(labels, device):
    g = torch.Generator().manual_seed(0)
    targets = torch.arange(labels).repeat_interleave(NEIGHBOURS - 1)
    sources = torch.cat([torch.randperm(labels, generator=g)[: NEIGHBOURS - 1] for _ in range(labels)])
    return mlfast.Graph.from_edges(torch.stack([sources, targets]), labels, add_self_loops=True).to(device)


def by_reference(run):
    def step(*arguments):
        with mlfast.use_backend("reference"):
            return run(*arguments)

    return step


def gradients(branch, graph):
    branch = copy.deepcopy(branch)

    def step(incoming):
        branch.weight(graph).backward(incoming)
        grads = [parameter.grad for parameter in branch.parameters()]
        branch.zero_grad()
        return grads

    return step


def assert_close(got, wanted, name):
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item(), msg=name)


def multiply_adds(labels, edges):
    """Forward: the linear layers, the scores, and the sums over neighbours."""
    return labels * CHANNELS * (WORDS + CHANNELS) + 2 * CHANNELS * (2 * labels + edges)


def make_branch(labels, device):
    torch.manual_seed(0)
    return Branch(labels).to(device), label_graph(labels, device)


@pytest.mark.parametrize("size", SIZES)
def bench_graph_branch(benchmark, record, device, quick, size):
    if quick and size != QUICK:
        pytest.skip("left out of --quick")
    branch, graph = make_branch(SIZES[size], device)
    products = Products(SIZES[size]).to(device)
    mine = gradients(branch, graph)
    # The reference takes a mask: a Graph would be made dense in every call.
    steps = {"mlfast": mine, "eager": by_reference(gradients(branch, graph.to_dense()))}
    inputs = [(torch.randn(CHANNELS, device=device),) for _ in range(4)]
    assert_close(mine(*inputs[0]), steps["eager"](*inputs[0]), "eager")
    step_of_products = gradients(products, graph)
    median_us = race(
        benchmark,
        steps | {"products alone": lambda incoming: step_of_products(incoming)},
        inputs,
        "mlfast",
        7 if quick else 31,
    )
    weights = sum(p.numel() for p in branch.parameters())
    record(
        op="graph_branch",
        case=f"{size} training",
        size=size,
        mode="training",
        bytes=4 * (3 * weights + 2 * SIZES[size] * WORDS),  # weights twice, their gradient, and the words twice
        multiply_adds=3 * multiply_adds(SIZES[size], graph.num_edges) - SIZES[size] * CHANNELS * WORDS,
        median_us=median_us,
    )


@pytest.mark.parametrize("size", SIZES)
def bench_graph_branch_inference(benchmark, record, device, quick, size):
    if quick and size != QUICK:
        pytest.skip("left out of --quick")
    branch, graph = make_branch(SIZES[size], device)
    mask = graph.to_dense()
    with torch.no_grad():
        constant = branch.weight(graph)
    steps = {
        "mlfast": lambda features: reweight_pool(features, constant),
        "eager": by_reference(lambda features: reweight_pool(features, branch.weight(mask))),
        "mlfast unfolded": lambda features: reweight_pool(features, branch.weight(graph)),
        "eager folded": by_reference(lambda features: reweight_pool(features, constant)),
    }
    sets = number_of_sets(CHANNELS * SIDE**2 * 4)
    inputs = [(torch.randn(1, CHANNELS, SIDE, SIDE, device=device),) for _ in range(sets)]
    with torch.no_grad():
        for name, step in steps.items():
            assert_close([steps["mlfast"](*inputs[0])], [step(*inputs[0])], name)
        median_us = race(benchmark, steps, inputs, "mlfast", 15 if quick else 100)
    record(
        op="graph_branch",
        case=f"{size}, one map {CHANNELS} x {SIDE} x {SIDE} inference",
        size=size,
        mode="inference",
        bytes=4 * CHANNELS * SIDE**2,  # the map is read once
        operations=3 * CHANNELS * SIDE**2,
        median_us=median_us,
    )
