"""Attention over a complete graph against dense eager PyTorch and torch.compile of it, forward + backward.

The dense form makes K x K weights, so it is timed up to K = 9605 (369 MB per float32 tensor). ``eager sorted`` is our
algorithm in plain PyTorch: what the kernels bring apart from it.
"""

import warnings

import pytest
import torch
from torch.nn import functional as F

from bench.race import number_of_sets, race
from mlfast.functional import graph_attention
from mlfast.ops.graph_attention import reference

COLUMNS, SLOPE = 256, 0.2
# Labels, and rounds: a round of the last takes the dense forms seconds.
SIZES = {
    "COCO K 80": (80, 50),
    "VG500 K 500": (500, 20),
    "K 2000": (2000, 5),
    "OpenImages K 9605": (9605, 3),
    "K 30000": (30_000, 7),
    "K 100000": (100_000, 5),
}
QUICK = "VG500 K 500"
MOST_DENSE = 9605


def fused(value, src, dst, slope):
    return graph_attention(value, src, dst, negative_slope=slope)


def plain(value, src, dst, slope):
    return reference(value, src, dst, None, slope)


def plain_sorted(value, src, dst, slope):
    """Sources in descending order; a row meets those above -dst without, the others with the slope. For one head."""
    src, dst = src[:, 0], dst[:, 0]
    order = src.argsort(descending=True)
    src, terms = src[order], torch.cat([value[order, 0], value.new_ones(len(value), 1)], dim=1)
    top = src[0]
    steep, flat = (F.pad((terms * (s * (src - top)).exp()[:, None]).cumsum(0), (0, 0, 1, 0)) for s in (1.0, slope))
    split = torch.searchsorted(-src.detach(), dst.detach())
    largest = F.leaky_relu(dst + top, slope)
    before, after = (dst + top - largest).exp()[:, None], (slope * (dst + top) - largest).exp()[:, None]
    sums = before * steep[split] + after * (flat[-1] - flat[split])
    return (sums[:, :-1] / sums[:, -1:])[:, None]


def training(attention):
    def step(value, src, dst, incoming):
        return torch.autograd.grad(attention(value, src, dst, SLOPE), (value, src, dst), incoming)

    return step


def make_inputs(nodes, device):
    sets = []
    for seed in range(min(8, number_of_sets(nodes * COLUMNS * 4))):
        g = torch.Generator().manual_seed(seed)
        shapes = (nodes, 1, COLUMNS), (nodes, 1), (nodes, 1)
        leaves = [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]
        sets.append((*leaves, torch.rand(shapes[0], generator=g).to(device)))
    return sets


def contestants(nodes):
    torch._dynamo.reset()
    attentions = {"mlfast": fused}
    if nodes <= MOST_DENSE:
        attentions |= {"eager": plain, "compile": torch.compile(plain)}
    attentions |= {"eager sorted": plain_sorted, "compile sorted": torch.compile(plain_sorted)}
    return {name: training(attention) for name, attention in attentions.items()}


def those_that_compile(steps, inputs):
    """All but what PyTorch cannot compile: 2.11 fails at the sums of the sorted form for a GPU."""
    able = {}
    for name, step in steps.items():
        try:
            step(*inputs)
        except torch._inductor.exc.InductorError as error:
            warnings.warn(f"{name} is left out, PyTorch {torch.__version__} does not compile it: {error}", stacklevel=2)
        else:
            able[name] = step
    return able


def assert_same_results(steps, nodes, inputs):
    expected = steps["mlfast"](*inputs)
    for step in list(steps.values())[1:]:
        torch.testing.assert_close(step(*inputs), expected, rtol=1e-3, atol=1e-3 * nodes**0.5)


@pytest.mark.parametrize("size", SIZES)
def bench_graph_attention_complete(benchmark, record, device, quick, size):
    if quick and size != QUICK:
        pytest.skip("left out of --quick")
    nodes, rounds = SIZES[size]
    inputs = make_inputs(nodes, device)
    steps = those_that_compile(contestants(nodes), inputs[0])
    assert_same_results(steps, nodes, inputs[0])
    median_us = race(benchmark, steps, inputs, "mlfast", rounds)
    record(
        op="graph_attention_complete",
        case=f"{size}, F {COLUMNS} training",
        size=size,
        mode="training",
        # Forward reads the values and writes as much; backward reads values and gradients, and writes.
        bytes=nodes * COLUMNS * 4 * (2 + 3),
        operations=20 * nodes * COLUMNS,
        growth={"over": "K", "at": nodes, "curve": f"F {COLUMNS}, training"},
        median_us=median_us,
    )
