"""graph_attention against eager PyTorch, torch.compile and torch_geometric, forward + backward.

The op's peers are the dense formula, and one that gathers the neighbours of each label, which all have as many here;
eager and compiled. The layer's peer is torch_geometric's GATConv with the same
weights on the same edges: whole against whole, where both make the same product of features and weights by PyTorch
(``product alone`` is that product, with its gradients), and the attention of both with the product taken out.
"""

import pytest
import torch
from torch.nn.functional import leaky_relu

from bench.race import race
from mlfast.functional import graph_attention
from mlfast.graph import Graph
from mlfast.nn import GraphAttention

SIZES = {  # labels, heads, features, neighbours of a label
    "COCO K 80, F 1280, 6 neighbours": (80, 1, 1280, 6),
    "COCO K 80, 4 heads of F 320, 6 neighbours": (80, 4, 320, 6),
    "COCO K 80, F 1280, 40 neighbours": (80, 1, 1280, 40),
    "COCO K 80, F 1280, mask of 40": (80, 1, 1280, 40),
    "OpenImages K 601, F 256, 10 neighbours": (601, 1, 256, 10),
    "K 2000, F 256, 10 neighbours": (2000, 1, 256, 10),
    "OpenImages K 9605, F 256, 10 neighbours": (9605, 1, 256, 10),
}
DENSITIES = {  # from sparse to dense
    f"OpenImages K 601, F 256, {neighbours} neighbours": (601, 1, 256, neighbours) for neighbours in (30, 90, 270, 540)
}
QUICK = "COCO K 80, F 1280, 6 neighbours"
IN_FEATURES = 300  # word vectors


def plain(value, src, dst, mask):
    logits = leaky_relu(dst.t()[:, :, None] + src.t()[:, None, :], 0.2)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(dim=2)
    return torch.bmm(weights, value.transpose(0, 1)).transpose(0, 1)


def gather(value, src, dst, neighbours):
    """The same, with the numbers of each label's neighbours, [K, N]."""
    weights = leaky_relu(dst[:, None] + src[neighbours], 0.2).softmax(dim=1)
    return torch.einsum("knh,knhf->khf", weights, value[neighbours])


def edges_of(nodes, neighbours):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(nodes).repeat_interleave(neighbours)
    sources = torch.cat([torch.randperm(nodes, generator=generator)[:neighbours] for _ in range(nodes)])
    return torch.stack([sources, targets])


def make_inputs(nodes, heads, features, device):
    generator = torch.Generator().manual_seed(0)
    shapes = (nodes, heads, features), (nodes, heads), (nodes, heads)
    leaves = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    return [(*leaves, torch.randn(shapes[0], generator=generator).to(device))] * 3


def training(attend):
    def step(*arguments):
        *leaves, incoming = arguments
        for leaf in leaves:
            leaf.grad = None
        attend(*leaves).backward(incoming)

    return step


def assert_same_results(contestants, leaves, incoming):
    results = [torch.autograd.grad(attend(*leaves), leaves, incoming) for attend in contestants.values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-3)


def rounds_for(nodes, quick):
    """Few for large graphs: a dense step over 9605 labels takes seconds."""
    return 3 if nodes > 5000 else 7 if quick else 31


def growth(nodes, neighbours):
    """Sweeps over K with 10 neighbours, and over the neighbours of 601 labels."""
    points = [{"over": "K", "at": nodes, "curve": "10 neighbours, training"}] if neighbours == 10 else []
    if nodes == 601:
        points.append({"over": "neighbours", "at": neighbours, "curve": "K 601, training"})
    return {"growth": points} if points else {}


def gatconv(layer, heads, features, in_features):
    """torch_geometric's layer with the same weights."""
    geometric = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    peer = geometric.GATConv(in_features, features, heads, add_self_loops=False, bias=False)
    peer.load_state_dict(layer.state_dict())
    return peer


@pytest.mark.parametrize("size", SIZES | DENSITIES)
def bench_graph_attention(benchmark, record, device, quick, size):
    if quick and size != QUICK:
        pytest.skip("left out of --quick")
    torch._dynamo.reset()
    nodes, heads, features, neighbours = (SIZES | DENSITIES)[size]
    graph = Graph.from_edges(edges_of(nodes, neighbours), nodes).to(device)
    mask, inputs = graph.to_dense(), make_inputs(nodes, heads, features, device)
    given = mask if "mask" in size else graph
    compiled, compiled_gather = torch.compile(plain), torch.compile(gather)
    contestants = {
        "mlfast": lambda *leaves: graph_attention(*leaves, given),
        "eager": lambda *leaves: plain(*leaves, mask),
        "compile": lambda *leaves: compiled(*leaves, mask),
    }
    if given is graph:
        numbers = graph.indices.view(nodes, neighbours).long()
        contestants["eager gather"] = lambda *leaves: gather(*leaves, numbers)
        contestants["compile gather"] = lambda *leaves: compiled_gather(*leaves, numbers)
    *leaves, incoming = inputs[0]
    assert_same_results(contestants, leaves, incoming)
    steps = {name: training(attend) for name, attend in contestants.items()}
    median_us = race(benchmark, steps, inputs, "mlfast", rounds_for(nodes, quick))
    record(
        op="graph_attention",
        case=f"{size} training",
        size=size,
        mode="training",
        # Per node there are two vectors forward, three backward; per edge an index is read in either pass. Neighbours'
        # vectors may come from a cache.
        bytes=20 * features * heads * nodes + 8 * graph.num_edges,
        multiply_adds=3 * features * heads * graph.num_edges,  # one sum of vectors forward; two products backward
        **growth(nodes, neighbours),
        median_us=median_us,
    )


def with_gradients(module, x, *neighbourhood):
    """A call that runs the module forward and backward and returns the gradients of its weights and input."""
    incoming = torch.randn_like(module(x, *neighbourhood))

    def run():
        module(x, *neighbourhood).backward(incoming)
        grads = [x.grad, *(parameter.grad for parameter in module.parameters())]
        module.zero_grad()
        x.grad = None
        return grads

    return run


def assert_same_gradients(mine, theirs):
    for one, other in zip(mine(), theirs(), strict=True):
        if other is not None:  # x needs none where it is the label vectors
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


@pytest.mark.parametrize("part", ["whole", "attention"])
@pytest.mark.parametrize("size", [size for size in SIZES if "mask" not in size])
def bench_graph_attention_layer(benchmark, record, device, quick, size, part):
    if quick and size != QUICK:
        pytest.skip("left out of --quick")
    nodes, heads, features, neighbours = SIZES[size]
    edges, width = edges_of(nodes, neighbours).to(device), heads * features
    if part == "attention" and device.type == "cuda" and nodes > width:
        pytest.skip("there the layer takes its scores from the weights of the linear layer, which is left out")
    graph, in_features = Graph.from_edges(edges, nodes), IN_FEATURES if part == "whole" else width
    layer = GraphAttention(in_features, features, heads).to(device)
    peer = gatconv(layer, heads, features, in_features).to(device)
    x = torch.randn(nodes, in_features, device=device, requires_grad=part == "attention")
    if part == "attention":
        layer.lin = peer.lin = torch.nn.Identity()
    torch.manual_seed(0)
    steps = {"mlfast": with_gradients(layer, x, graph)}
    torch.manual_seed(0)
    steps["GATConv"] = with_gradients(peer, x, edges)
    assert_same_gradients(*steps.values())
    if part == "whole":
        steps["product alone"] = with_gradients(torch.nn.Linear(in_features, width, bias=False, device=device), x)
    median_us = race(benchmark, steps, [()] * 3, "mlfast", rounds_for(nodes // 2, quick))
    product = nodes * in_features if part == "whole" else 0
    record(
        op="graph_attention_layer",
        case=size if part == "whole" else f"{size}, attention alone",
        size=size,
        mode="layer",  # the README's table of training steps holds eager and compiled PyTorch, which are not here
        # Those of the op, and of the product: x is read twice, its weights once, and their gradient is written.
        bytes=20 * width * nodes + 8 * graph.num_edges + (8 * (nodes + width) * in_features if product else 0),
        multiply_adds=width * 3 * graph.num_edges + 2 * width * product,
        **(growth(nodes, neighbours) if part == "whole" else {}),
        median_us=median_us,
    )
