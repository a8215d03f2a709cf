"""reweight_pool against eager PyTorch and torch.compile, forward (no gradient) and training (forward + backward).

``eager`` is the formula as it is written. ``eager arranged`` never makes the weighted features, since the maximum of
w * f is w times the maximum or the minimum of f: in plain PyTorch the fastest forward. Both are also compiled, so that
ratios can be taken against the faster one.
"""

import pytest
import torch

from bench.race import number_of_sets, race
from mlfast.functional import reweight_pool

SIZES = {  # the paper's feature maps
    "84 x 1280 x 14 x 14": (84, 1280, 14, 14),
    "56 x 2048 x 14 x 14": (56, 2048, 14, 14),
    "32 x 1280 x 18 x 18": (32, 1280, 18, 18),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
QUICK = ("84 x 1280 x 14 x 14", "NCHW")


def plain(features, weight):
    weighted = features * weight[:, None, None]
    return weighted.mean(dim=(2, 3)) + weighted.amax(dim=(2, 3))


def plain_arranged(features, weight):
    peak = torch.where(weight >= 0, features.amax(dim=(2, 3)), features.amin(dim=(2, 3)))
    return weight * (features.mean(dim=(2, 3)) + peak)


def contestants():
    torch._dynamo.reset()
    return {
        "mlfast": reweight_pool,
        "eager": plain,
        "compile": torch.compile(plain),
        "eager arranged": plain_arranged,
        "compile arranged": torch.compile(plain_arranged),
    }


def training(pool):
    def step(features, weight, incoming):
        features.grad = weight.grad = None
        pool(features, weight).backward(incoming)

    return step


def forward(pool):
    def step(features, weight, incoming):
        with torch.no_grad():
            pool(features, weight)

    return step


def make_inputs(shape, layout, device):
    sets = []
    for seed in range(number_of_sets(torch.Size(shape).numel() * 4)):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(shape, generator=g).to(device, memory_format=layout).requires_grad_()
        weight = torch.randn(shape[1], generator=g).to(device).requires_grad_()
        sets.append((features, weight, torch.rand(shape[:2], generator=g).to(device)))
    return sets


def assert_same_results(pools, features, weight, incoming):
    leaves = features, weight
    expected = torch.autograd.grad(plain(features.double(), weight.double()), leaves, incoming.double())
    for pool in pools.values():
        got = torch.autograd.grad(pool(*leaves), leaves, incoming)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("mode", [training, forward])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def bench_reweight_pool(benchmark, record, device, quick, size, layout, mode):
    if quick and (size, layout) != QUICK:
        pytest.skip("left out of --quick")
    shape = SIZES[size]
    inputs, pools = make_inputs(shape, LAYOUTS[layout], device), contestants()
    assert_same_results(pools, *inputs[0])
    steps = {name: mode(pool) for name, pool in pools.items()}
    median_us = race(benchmark, steps, inputs, "mlfast", 5 if quick else 15)
    elements = torch.Size(shape).numel()
    record(
        op="reweight_pool",
        case=f"{size} {layout} {mode.__name__}",
        size=size,
        mode=mode.__name__,
        # One read of the features forward, one write of their gradient backward; all else is P times smaller.
        bytes=elements * 4 * (2 if mode is training else 1),
        operations=elements * 3,  # a multiplication, an addition and a comparison, forward
        median_us=median_us,
    )
