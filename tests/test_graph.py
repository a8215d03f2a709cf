"""mlfast.Graph: what is built from edges, a matrix or CSR, and what is refused."""

import numpy as np
import pytest
import torch

import mlfast
from mlfast.graph import Graph, dense_from

EDGES = torch.tensor([[1, 2, 0, 1, 1], [0, 0, 2, 0, 2]])  # sources, targets; 1 -> 0 twice
MATRIX = torch.tensor([[0.0, 1, 2], [0, -1, 0], [1, 0.5, 0]])


def assert_is_the_graph(graph):
    assert graph.num_nodes == 3 and graph.num_edges == 4 and graph.density == 4 / 9
    assert graph.indptr.tolist() == [0, 2, 2, 4] and graph.indices.tolist() == [1, 2, 0, 1]
    assert graph.indptr_t.tolist() == [0, 1, 3, 4] and graph.indices_t.tolist() == [2, 0, 2, 0]
    assert graph.edges_t.tolist() == [2, 0, 3, 1]
    assert torch.equal(graph.to_dense(), MATRIX > 0)
    assert graph.indices.dtype == graph.indices_t.dtype == torch.int32


def test_constructors_agree():
    assert mlfast.Graph is Graph
    assert_is_the_graph(Graph.from_edges(EDGES, 3))
    assert_is_the_graph(Graph.from_edges(EDGES.int().flip(1), np.int64(3)))
    assert_is_the_graph(Graph.from_dense(MATRIX))
    assert_is_the_graph(Graph.from_dense(MATRIX > 0))
    assert_is_the_graph(Graph.from_csr(torch.tensor([0, 2, 2, 5]), torch.tensor([2, 1, 1, 0, 0])))


def test_self_loops_are_added_once():
    graph = Graph.from_edges(torch.tensor([[0, 1], [0, 0]]), 3, add_self_loops=True)
    assert graph.to_dense().int().tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("nodes", [50, 400])
def test_dense_graphs_keep_their_mask(nodes):
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.rand(nodes, nodes, generator=generator) < dense_from(nodes) + more for more in (-0.08, 0.08))
    assert Graph.from_dense(few).mask is None
    assert torch.equal(Graph.from_dense(many).mask, many)


def test_no_nodes_and_no_edges():
    assert Graph.from_edges(torch.zeros(2, 0).long(), 0).density == 0
    nobody = Graph.from_edges(torch.zeros(2, 0).long(), 2)
    assert nobody.indptr.tolist() == [0, 0, 0] and nobody.num_edges == 0
    assert Graph.from_csr(torch.tensor([0]), torch.zeros(0).long()).num_nodes == 0


def test_repr_and_to():
    graph = Graph.from_dense(MATRIX)
    assert repr(graph) == "Graph(3 nodes, 4 edges, density 0.444, cpu)"
    assert graph.to("cpu") is graph
    assert graph.to(torch.device("cpu", 0), non_blocking=True) is graph
    with pytest.raises(TypeError, match=r"Graph\.to takes a device.*got torch\.float16"):
        graph.to(torch.float16)
    moved = graph.to("meta")
    assert moved.device.type == moved.edges_t.device.type == "meta" and moved.num_nodes == 3


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: Graph.from_edges(EDGES.float(), 3),
            TypeError,
            "edge_index must be an integer tensor, got torch.float32",
        ),
        (lambda: Graph.from_edges(EDGES.t(), 3), ValueError, r"\[2, E\], .* got \[5, 2\]; pass edge_index.t"),
        (lambda: Graph.from_edges(EDGES, 2), ValueError, r"edge_index must be in \[0, 2\), got 2; .* number of nodes"),
        (
            lambda: Graph.from_edges(EDGES - 1, 3),
            ValueError,
            r"edge_index must be in \[0, 3\), got -1; count nodes from 0",
        ),
        (lambda: Graph.from_edges(EDGES, 3.0), TypeError, "num_nodes must be an integer, got float 3.0"),
        (lambda: Graph.from_edges(EDGES, -1), ValueError, "num_nodes must be from 0"),
        (lambda: Graph.from_dense(MATRIX[:2]), ValueError, r"matrix must be \[K, K\], got \[2, 3\]"),
        (lambda: Graph.from_dense([[1]]), TypeError, "matrix must be a bool, integer or float tensor, got list"),
        (
            lambda: Graph.from_dense(MATRIX / MATRIX.sum(1, keepdim=True).clamp(min=0)),
            ValueError,
            r"got NaN at \[1, 0\], 2 in all; .* matrix.nan_to_num\(0\)",
        ),
        (lambda: Graph(*EDGES, 3), TypeError, "make one by Graph.from_edges, Graph.from_dense or Graph.from_csr"),
        (lambda: Graph.from_csr(EDGES[0, :0], EDGES[0, :0]), ValueError, r"a graph without nodes has \[0\]"),
        (lambda: Graph.from_csr(torch.tensor([2, 2]), torch.tensor([0, 0])), ValueError, "cumulative sum with a 0"),
        (
            lambda: Graph.from_csr(torch.tensor([0, 2]), torch.tensor([0, 1])),
            ValueError,
            r"indices must be in \[0, 1\)",
        ),
        (
            lambda: Graph.from_csr(torch.zeros(2, 2).int(), torch.tensor([0])),
            ValueError,
            "indptr must have one dimension",
        ),
    ],
)
def test_errors_say_what_to_do(build, error, message):
    with pytest.raises(error, match=message):
        build()
