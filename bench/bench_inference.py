"""A whole model at inference, so that nobody takes an op's speed for a model's.

``mlfast`` is the folded model, ``mlfast unfolded`` as it was trained; ``eager`` is the latter with every op of mlfast
as its reference in plain PyTorch. ``backbone alone`` is what no contestant can do without.
"""

import pytest
import torch

import mlfast
from bench.race import race
from mlfast.models import create_model

BACKBONE, LABELS, IMAGE = "mobilenetv3_small_100", 80, 224
SIZES = {  # head, batch
    "COCO gap, 1 x 3 x 224 x 224": ("gap", 1),
    "COCO ml_decoder, 1 x 3 x 224 x 224": ("ml_decoder", 1),
    "COCO ml_decoder, 8 x 3 x 224 x 224": ("ml_decoder", 8),
}
QUICK = "COCO ml_decoder, 1 x 3 x 224 x 224"


def by_reference(model):
    def call(images):
        with mlfast.use_backend("reference"):
            return model(images)

    return call


@pytest.mark.parametrize("size", SIZES)
def bench_inference(benchmark, record, device, quick, size):
    if quick and size != QUICK:
        pytest.skip("left out of --quick")
    head, batch = SIZES[size]
    torch.manual_seed(0)
    model = create_model(BACKBONE, LABELS, head=head).to(device).eval()
    calls = {
        "mlfast": model.fold(),
        "eager": by_reference(model),
        "backbone alone": model.backbone.forward_features,
        "mlfast unfolded": model,
    }
    inputs = [(torch.randn(batch, 3, IMAGE, IMAGE, device=device),) for _ in range(8)]
    with torch.no_grad():
        expected = calls["eager"](*inputs[0])
        for name in ("mlfast", "mlfast unfolded"):
            torch.testing.assert_close(calls[name](*inputs[0]), expected, rtol=1e-3, atol=1e-4, msg=name)
        median_us = race(benchmark, calls, inputs, "mlfast", 10 if quick else 50)
    record(
        op="inference",
        case=f"{BACKBONE.removesuffix('_100')} on {size}",
        size=size,
        mode="inference",
        median_us=median_us,
    )
