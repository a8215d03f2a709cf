"""A whole training step, so that nobody takes an op's speed for a model's: SAM on a small timm model with AAMLoss.

``eager`` is the same model and step with every op of mlfast as its reference in plain PyTorch. SAM (Foret et al.,
arXiv:2010.01412): a gradient, a step of length rho up along it, the gradient there, and with that one the step of SGD.
"""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import mlfast
from bench.race import race
from mlfast.models import create_model

RHO = 0.05
BACKBONE, LABELS = "mobilenetv3_small_100", 80
SIZES = {  # head and its arguments, batch, image size; with dropout no two contestants would compute the same
    "mobilenetv3_small on COCO, 8 x 3 x 64 x 64": ("gap", {}, 8, 64),
    "mobilenetv3_small on COCO, 8 x 3 x 224 x 224": ("gap", {}, 8, 224),
    "mobilenetv3_small on COCO, ml_decoder, 4 x 3 x 128 x 128": ("ml_decoder", {"dropout": 0.0}, 4, 128),
}
QUICK = "mobilenetv3_small on COCO, 8 x 3 x 64 x 64"


BACKENDS = {"mlfast": nullcontext, "eager": partial(mlfast.use_backend, "reference")}


def sam_step(model, loss, backend):
    """A step on batches of images and targets, in the context that ``backend`` makes; returns the loss before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def gradient(images, target):
        optimizer.zero_grad()
        value = loss(model(images), target)
        value.backward()
        return value

    def step(images, target):
        with backend():
            value = gradient(images, target)
            weights = [p for p in model.parameters() if p.grad is not None]
            grads = [p.grad for p in weights]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            uphill = torch._foreach_mul(grads, RHO / (norm + 1e-12))
            with torch.no_grad():
                torch._foreach_add_(weights, uphill)
            gradient(images, target)
            with torch.no_grad():
                torch._foreach_sub_(weights, uphill)
            optimizer.step()
            optimizer.zero_grad()
        return value.detach()

    return step


def make_inputs(batch, image_size, labels, device):
    sets = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, 3, image_size, image_size, generator=g)
        sets.append((images.to(device), (torch.rand(batch, labels, generator=g) < 3 / labels).to(device)))
    return sets


@pytest.mark.parametrize("size", SIZES)
def bench_training_step(benchmark, record, device, quick, size):
    if quick and size != QUICK:
        pytest.skip("left out of --quick")
    head, head_args, batch, image_size = SIZES[size]
    torch.manual_seed(0)
    model, loss = create_model(BACKBONE, LABELS, head=head, head_args=head_args).to(device), mlfast.AAMLoss()
    inputs = make_inputs(batch, image_size, LABELS, device)
    steps = {name: sam_step(copy.deepcopy(model), loss, backend) for name, backend in BACKENDS.items()}
    for arguments in inputs[:2]:  # the second loss depends on the first step
        values = [step(*arguments) for step in steps.values()]
        torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=0)
    median_us = race(benchmark, steps, inputs, "mlfast", 10 if quick else 30)
    record(
        op="training_step",
        case=f"{size}, SAM, training",
        median_us=median_us,
    )
