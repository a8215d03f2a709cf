"""cosine_linear against eager PyTorch and torch.compile, forward (no gradient) and training (forward + backward).

``eager`` normalises first, as one writes it; ``eager folded`` divides the products by the lengths. Both are also
compiled. ``products alone`` is a linear layer without the normalisation: what no contestant can do without.
"""

import pytest
import torch
from torch.nn import functional as F

from bench.race import number_of_sets, race
from mlfast.functional import cosine_linear

SIZES = {  # B x D x K: heads behind EfficientNetV2-s and TResNet-L with the paper's data sets, and all of Open Images
    "COCO 84 x 1280 x 80": (84, 1280, 80),
    "COCO 56 x 2048 x 80": (56, 2048, 80),
    "VG500 84 x 1280 x 500": (84, 1280, 500),
    "OpenImages 32 x 1280 x 9605": (32, 1280, 9605),
    "COCO 1 x 1280 x 80": (1, 1280, 80),  # one image
    "VG500 1024 x 1280 x 500": (1024, 1280, 500),  # the products decide
}
QUICK = ("COCO 84 x 1280 x 80", "training")


def plain(x, weight):
    return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1))


def folded(x, weight):
    lengths = x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    return F.linear(x, weight) / lengths.clamp(min=1e-24)


def contestants():
    torch._dynamo.reset()
    return {
        "mlfast": cosine_linear,
        "eager": plain,
        "products alone": F.linear,
        "compile": torch.compile(plain),
        "eager folded": folded,
        "compile folded": torch.compile(folded),
        "mlfast compiled": torch.compile(cosine_linear),
    }


def training(linear):
    def step(x, weight, incoming):
        x.grad = weight.grad = None
        linear(x, weight).backward(incoming)

    return step


def forward(linear):
    def step(x, weight, incoming):
        with torch.no_grad():
            linear(x, weight)

    return step


def make_inputs(sizes, device):
    batch, length, classes = sizes
    sets = []
    for seed in range(number_of_sets((batch + classes) * length * 4)):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, length, generator=g).to(device).requires_grad_()
        weight = torch.randn(classes, length, generator=g).to(device).requires_grad_()
        sets.append((x, weight, torch.rand(batch, classes, generator=g).to(device)))
    return sets


def assert_same_results(linears, x, weight, incoming):
    expected = torch.autograd.grad(plain(x.double(), weight.double()), (x, weight), incoming.double())
    for name, linear in linears.items():
        if name != "products alone":
            got = torch.autograd.grad(linear(x, weight), (x, weight), incoming)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", [training, forward])
@pytest.mark.parametrize("size", SIZES)
def bench_cosine_linear(benchmark, record, device, quick, size, mode):
    if quick and (size, mode.__name__) != QUICK:
        pytest.skip("left out of --quick")
    batch, length, classes = SIZES[size]
    inputs, linears = make_inputs(SIZES[size], device), contestants()
    assert_same_results(linears, *inputs[0])
    steps = {name: mode(linear) for name, linear in linears.items()}
    rounds = 15 if batch * length * classes > 10**8 else 100
    median_us = race(benchmark, steps, inputs, "mlfast", 5 if quick else rounds)
    # x and weight are read forward; backward reads them once more, and writes their gradients. Cosines are written, and
    # their gradient read.
    vectors, cosines = (batch + classes) * length, batch * classes
    moved = 4 * (3 * vectors + 2 * cosines if mode is training else vectors + cosines)
    record(
        op="cosine_linear",
        case=f"{size} {mode.__name__}",
        size=size,
        mode=mode.__name__,
        bytes=moved,
        multiply_adds=batch * length * classes * (3 if mode is training else 1),
        median_us=median_us,
    )
