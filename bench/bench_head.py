"""The ML-Decoder head as a whole, forward (no gradient) and training, on the feature maps of EfficientNetV2-s.

``eager`` is the same module with every op of mlfast as its reference in plain PyTorch; ``compile`` is that, compiled.
``eager loop`` has the last layer as the released codes write it: a product per group, in a slice of the output.
``layers alone`` is the head without that last layer, which no contestant can do without. No dropout.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlfast
from bench.race import number_of_sets, race

CHANNELS, SIDE = 1280, 14
SIZES = {"COCO 1 x 80": (1, 80), "COCO 4 x 80": (4, 80), "VG500 4 x 500": (4, 500), "OpenImages 4 x 9605": (4, 9605)}
QUICK = ("COCO 1 x 80", "training")


class GroupLoop(nn.Module):
    """mlfast.GroupLinear as a loop over the groups, with the same weights."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.num_classes = layer.weight, layer.num_classes

    def forward(self, x):
        """Map ``[B, L, D]`` to cosines ``[B, K]``."""
        out = x.new_zeros(x.shape[0], self.weight.shape[0], self.weight.shape[2])
        for i in range(self.weight.shape[0]):
            out[:, i, :] = F.normalize(x[:, i, :], dim=1) @ F.normalize(self.weight[i], dim=0)
        return out.flatten(1)[:, : self.num_classes]


def with_last_layer(head, layer):
    """A copy of the head that ends otherwise."""
    head = copy.deepcopy(head)
    head.projection = layer
    return head


def by_reference(head):
    def call(features):
        with mlfast.use_backend("reference"):
            return head(features)

    return call


def contestants(head, quick):
    """Each with weights of its own, so that none adds to the others' gradients."""
    torch._dynamo.reset()
    heads = {
        "mlfast": copy.deepcopy(head),
        "eager": copy.deepcopy(head),
        "compile": copy.deepcopy(head),
        "layers alone": with_last_layer(head, nn.Identity()),
        "eager loop": with_last_layer(head, GroupLoop(copy.deepcopy(head.projection))),
    }
    calls = {name: module if name == "mlfast" else by_reference(module) for name, module in heads.items()}
    if quick:  # compiling takes as long as all the rest
        del calls["compile"]
    else:
        calls["compile"] = by_reference(torch.compile(heads["compile"]))
    return heads, calls


def training(call, head):
    def step(features, incoming):
        out = call(features)
        out.backward(incoming if out.shape == incoming.shape else torch.ones_like(out))
        grads = features.grad, head.embed.weight.grad
        features.grad = None
        head.zero_grad()
        return out, *grads

    return step


def forward(call, head):
    def step(features, incoming):
        with torch.no_grad():
            return (call(features),)

    return step


def make_inputs(batch, classes, device):
    sets = []
    for seed in range(min(8, number_of_sets(batch * CHANNELS * SIDE**2 * 8))):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=g).to(device).requires_grad_()
        sets.append((features, torch.randn(batch, classes, generator=g).to(device)))
    return sets


def assert_same_results(steps, inputs):
    expected = steps["mlfast"](*inputs)
    for name, step in steps.items():
        if not name.endswith(" alone"):
            for got, wanted in zip(step(*inputs), expected, strict=True):
                scale = wanted.detach().abs().max().item()
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * scale, msg=name)


def multiply_adds(head, batch, classes):
    """The matrix products; docs/models.md has the formula."""
    tokens, queries, width, inner = SIDE**2, len(head.queries), head.embed.out_features, head.layer.linear1.out_features
    of_tokens = tokens * (CHANNELS * width + 2 * width**2)
    of_queries = queries * (2 * width**2 + 2 * width * inner + 2 * tokens * width)
    # Of the query side there is one for the batch, counted with the images.
    return batch * (of_tokens + of_queries + classes * width) - (batch - 1) * queries * width**2


@pytest.mark.parametrize("mode", [training, forward])
@pytest.mark.parametrize("size", SIZES)
def bench_head(benchmark, record, device, quick, size, mode):
    if quick and (size, mode.__name__) != QUICK:
        pytest.skip("left out of --quick")
    batch, classes = SIZES[size]
    torch.manual_seed(0)
    head = mlfast.MLDecoder(CHANNELS, classes, dropout=0.0).to(device)
    inputs, (heads, calls) = make_inputs(batch, classes, device), contestants(head, quick)
    steps = {name: mode(call, heads[name]) for name, call in calls.items()}
    assert_same_results(steps, inputs[0])
    median_us = race(benchmark, steps, inputs, "mlfast", 5 if quick else 15)
    # Features and weights are read forward; backward reads them once more and writes their gradients.
    elements = batch * (CHANNELS * SIDE**2 + classes) + sum(p.numel() for p in head.parameters())
    record(
        op="ml_decoder",
        case=f"{size} {mode.__name__}",
        size=size,
        mode=mode.__name__,
        bytes=4 * elements * (3 if mode is training else 1),
        multiply_adds=multiply_adds(head, batch, classes) * (3 if mode is training else 1),
        median_us=median_us,
    )
