"""group_linear as cosines against eager PyTorch and torch.compile, forward (no gradient) and training.

``eager loop`` is the group fully-connected layer of ML-Decoder as the released codes write it: a product per group, in
a slice of the output. ``eager bmm`` is one batched product of the normalised tensors, ``eager folded`` one of the
tensors as they are, divided by their lengths, and where there is one slot a sum of products. These two are also
compiled; the compiled loop, hundreds of products, is left out.
``products alone`` is that product of tensors as they are, without norms: what nobody can do without.
"""

import pytest
import torch
from torch.nn import functional as F

from bench.race import number_of_sets, race
from mlfast.functional import group_linear

SIZES = {  # batch, groups, features, slots, classes
    "COCO 56 x 80": (56, 80, 768, 1, 80),
    "VG500 84 x 500": (84, 100, 768, 5, 500),
    "OpenImages 84 x 601": (84, 100, 768, 7, 601),
    "84 x 700": (84, 100, 768, 7, 700),
    "84 x 2400": (84, 100, 768, 24, 2400),
    "OpenImages 32 x 9605": (32, 100, 768, 97, 9605),
}
QUICK = ("COCO 56 x 80", "training")


def fused(x, weight, classes):
    return group_linear(x, weight, num_classes=classes, cosine=True)


def plain_loop(x, weight, classes):
    out = x.new_zeros(x.shape[0], weight.shape[0], weight.shape[2])
    for i in range(weight.shape[0]):
        out[:, i, :] = F.normalize(x[:, i, :], dim=1) @ F.normalize(weight[i], dim=0)
    return out.flatten(1)[:, :classes]


def plain_bmm(x, weight, classes):
    cosines = torch.bmm(F.normalize(x, dim=2).transpose(0, 1), F.normalize(weight, dim=1))
    return cosines.transpose(0, 1).flatten(1)[:, :classes]


def plain_folded(x, weight, classes):
    if weight.shape[2] == 1:
        dots = (x * weight[:, :, 0]).sum(2, keepdim=True)
    else:
        dots = torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
    lengths = x.norm(dim=2)[:, :, None] * weight.norm(dim=1)
    return (dots / lengths.clamp(min=1e-24)).flatten(1)[:, :classes]


def products(x, weight, classes):
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).flatten(1)[:, :classes]


def contestants():
    torch._dynamo.reset()
    return {
        "mlfast": fused,
        "eager bmm": plain_bmm,
        "compile bmm": torch.compile(plain_bmm),
        "eager folded": plain_folded,
        "compile folded": torch.compile(plain_folded),
        "products alone": products,
        "eager loop": plain_loop,
    }


def training(layer):
    def step(x, weight, incoming):
        x.grad = weight.grad = None
        layer(x, weight, incoming.shape[1]).backward(incoming)

    return step


def forward(layer):
    def step(x, weight, incoming):
        with torch.no_grad():
            layer(x, weight, incoming.shape[1])

    return step


def make_inputs(size, device):
    batch, groups, features, slots, classes = size
    sets = []
    for seed in range(number_of_sets((batch + slots) * groups * features * 4)):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, groups, features, generator=g).to(device).requires_grad_()
        weight = torch.randn(groups, features, slots, generator=g).to(device).requires_grad_()
        sets.append((x, weight, torch.rand(batch, classes, generator=g).to(device)))
    return sets


def assert_same_results(layers, x, weight, incoming):
    leaves, classes = (x, weight), incoming.shape[1]
    expected = torch.autograd.grad(plain_bmm(x.double(), weight.double(), classes), leaves, incoming.double())
    for name, layer in layers.items():
        if name != "products alone":
            got = torch.autograd.grad(layer(*leaves, classes), leaves, incoming)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def growth(size, mode):
    """A sweep over K where all else is the same."""
    batch, groups, _, _, classes = size
    return {"growth": {"over": "K", "at": classes, "curve": mode}} if (batch, groups) == (84, 100) else {}


@pytest.mark.parametrize("mode", [training, forward])
@pytest.mark.parametrize("size", SIZES)
def bench_group_linear(benchmark, record, device, quick, size, mode):
    if quick and (size, mode.__name__) != QUICK:
        pytest.skip("left out of --quick")
    batch, groups, features, slots, classes = SIZES[size]
    inputs, layers = make_inputs(SIZES[size], device), contestants()
    assert_same_results(layers, *inputs[0])
    steps = {name: mode(layer) for name, layer in layers.items()}
    median_us = race(benchmark, steps, inputs, "mlfast", 5 if quick else 15)
    # x and the weights are read forward; backward reads them once more and writes the gradients. The output is written,
    # and its gradient read.
    vectors, out = (batch + slots) * groups * features, batch * classes
    record(
        op="group_linear",
        case=f"{size} {mode.__name__}",
        size=size,
        mode=mode.__name__,
        bytes=4 * (3 * vectors + 2 * out if mode is training else vectors + out),
        multiply_adds=batch * classes * features * (3 if mode is training else 1),
        **growth(SIZES[size], mode.__name__),
        median_us=median_us,
    )
