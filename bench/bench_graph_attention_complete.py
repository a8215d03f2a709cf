"""Attention over a complete graph against dense eager PyTorch and torch.compile of it, forward + backward.

The dense form makes K x K weights, so it is timed up to K = 9605 (369 MB per float32 tensor). Beyond, our own times
tell how the cost grows.
"""

import math

import pytest
import torch

from bench.race import number_of_sets, race
from mlfast.ops._graph_attention_complete import complete_attention, reference

COLUMNS, SLOPE = 256, 0.2
# Labels, and rounds: a round of the last takes the dense forms seconds.
SIZES = {80: 50, 500: 20, 2000: 5, 9605: 2}
GROWTH = (1000, 3000, 10_000, 30_000, 100_000)


def training(attention):
    def step(value, src, dst, incoming):
        return torch.autograd.grad(attention(value, src, dst, SLOPE), (value, src, dst), incoming)

    return step


def make_inputs(nodes, device, most=8):
    sets = []
    for seed in range(min(most, number_of_sets(nodes * COLUMNS * 4))):
        g = torch.Generator().manual_seed(seed)
        shapes = (nodes, 1, COLUMNS), (nodes, 1), (nodes, 1)
        leaves = [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]
        sets.append((*leaves, torch.rand(shapes[0], generator=g).to(device)))
    return sets


def bytes_moved(nodes):
    """Forward reads the values twice and writes as much; backward reads values and gradients twice, and writes."""
    return nodes * COLUMNS * 4 * (3 + 5)


def row(nodes, medians, bandwidth):
    return dict(
        op="graph_attention_complete",
        case=f"K {nodes}, F {COLUMNS}",
        size=f"K {nodes}",
        mode="training",
        bytes=bytes_moved(nodes),
        median_us={name: round(value * 1e6, 1) for name, value in medians.items()},
        percent_of_copy_bandwidth=round(100 * bytes_moved(nodes) / medians["mlfast"] / bandwidth, 1),
    )


@pytest.mark.parametrize("nodes", SIZES)
def bench_graph_attention_complete(benchmark, record, device, bandwidth, quick, nodes):
    if quick and nodes > 500:
        pytest.skip("left out of --quick")
    torch._dynamo.reset()
    attentions = {"mlfast": complete_attention, "eager": reference, "compile": torch.compile(reference)}
    steps = {name: training(attention) for name, attention in attentions.items()}
    inputs = make_inputs(nodes, device, 1 if nodes > 5000 else 8)
    expected = steps["eager"](*inputs[0])
    for name in ("mlfast", "compile"):
        torch.testing.assert_close(steps[name](*inputs[0]), expected, rtol=1e-3, atol=1e-3 * nodes**0.5)
    medians = race(benchmark, steps, inputs, "mlfast", SIZES[nodes])
    record(**row(nodes, medians, bandwidth))


def bench_growth(benchmark, record, device, bandwidth):
    """Our own time from a thousand nodes to a hundred thousand, and the exponent that fits it."""
    step, points = training(complete_attention), []
    steps = {f"K {nodes}": (lambda inputs: lambda: step(*inputs[0]))(make_inputs(nodes, device, 1)) for nodes in GROWTH}
    medians = race(benchmark, steps, [()], f"K {GROWTH[-1]}", 7)
    for nodes in GROWTH:
        points.append((math.log(nodes), math.log(medians[f"K {nodes}"])))
        record(**row(nodes, {"mlfast": medians[f"K {nodes}"]}, bandwidth) | {"op": "graph_attention_complete, growth"})
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    benchmark.extra_info["exponent"] = exponent
    print(f"time grows as K^{exponent:.2f}; K log K would be {math.log(100 * math.log(1e5) / math.log(1e3), 100):.2f}")
