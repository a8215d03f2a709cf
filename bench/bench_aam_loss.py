"""aam_loss against eager PyTorch and torch.compile, forward (no gradient) and training (forward + backward).

``eager`` is mlfast's own reference in plain PyTorch: numerically safe. ``eager pow`` is the straightforward way to
write the loss, which PyTorch runs faster; its gradient is NaN where a sigmoid
underflows and an exponent is below 1. Both are also compiled, so that ratios can be taken against the faster one.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.race import number_of_sets, race
from mlfast.functional import aam_loss
from mlfast.ops.aam_loss import check_options, reference

OPTIONS = check_options(23.0, 0.0, 0.7, 1.0, 0.0, 0.0, 0.0, "sum")  # the paper's, on COCO
SIZES = {
    "VOC 84 x 20": (84, 20),
    "COCO 56 x 80": (56, 80),
    "COCO 84 x 80": (84, 80),
    "VG500 84 x 500": (84, 500),
    "OpenImages 512 x 601": (512, 601),
    "OpenImages 256 x 9605": (256, 9605),
    "ImageNet-21k 64 x 21841": (64, 21841),
}
QUICK = ("COCO 56 x 80", "OpenImages 512 x 601", "OpenImages 256 x 9605")


def plain_reference(cos, target):
    return reference(cos, target, None, OPTIONS)


def plain_pow(cos, target):
    scale, margin, k, gamma_neg, gamma_pos, *_ = OPTIONS
    u, v = scale * (cos - margin), -scale * (cos + margin)
    known, y = target >= 0, target.to(cos.dtype)
    terms = k * y * F.logsigmoid(u) + (1 - k) * (1 - y) * F.logsigmoid(v)
    base = torch.sigmoid(v) * y + torch.sigmoid(u) * (1 - y)
    loss = terms * base.pow(gamma_pos * y + gamma_neg * (1 - y))
    return -torch.where(known, loss, 0).sum() / scale


def contestants():
    torch._dynamo.reset()
    return {
        "mlfast": aam_loss,
        "eager": plain_reference,
        "eager pow": plain_pow,
        "compile": torch.compile(plain_reference),
        "compile pow": torch.compile(plain_pow),
    }


def training(loss):
    def step(cos, target, byte_target):
        cos.grad = None
        loss(cos, target).backward()

    return step


def forward(loss):
    def step(cos, target, byte_target):
        with torch.no_grad():
            loss(cos, target)

    return step


def byte_targets(step):
    return lambda cos, target, byte_target: step(cos, byte_target, byte_target)


def make_inputs(rows, classes):
    sets = []
    for seed in range(number_of_sets(rows * classes * 13)):
        g = torch.Generator().manual_seed(seed)
        cos = (torch.rand(rows, classes, generator=g) * 2 - 1).requires_grad_()
        target = torch.rand(rows, classes, generator=g) < 3 / classes  # about three labels per image
        sets.append((cos, target.float(), target.to(torch.uint8)))
    return sets


def assert_same_results(losses, cos, target):
    truth = plain_reference(cos.double(), target.double())
    for name, loss in losses.items():
        assert loss(cos, target).item() == pytest.approx(truth.item(), rel=1e-5), name


@pytest.mark.parametrize("mode", [training, forward])
@pytest.mark.parametrize("size", SIZES)
def bench_aam_loss(benchmark, record, bandwidth, quick, size, mode):
    if quick and (size not in QUICK or mode is not training):
        pytest.skip("left out of --quick")
    rows, classes = SIZES[size]
    inputs, losses = make_inputs(rows, classes), contestants()
    assert_same_results(losses, *inputs[0][:2])
    steps = {name: mode(loss) for name, loss in losses.items()}
    steps["mlfast uint8"] = byte_targets(mode(aam_loss))
    rounds = max(15, min(300, 20_000_000 // (rows * classes))) // (3 if quick else 1)
    medians = race(benchmark, steps, inputs, "mlfast", rounds)
    moved = rows * classes * (12 if mode is training else 8)
    record(
        op="aam_loss",
        case=f"{size} {mode.__name__}",
        size=size,
        mode=mode.__name__,
        rows=rows,
        classes=classes,
        bytes=moved,
        median_us={name: round(value * 1e6, 1) for name, value in medians.items()},
        percent_of_copy_bandwidth=round(100 * moved / medians["mlfast"] / bandwidth, 1),
    )


def bench_call_overhead(benchmark, record):
    """One label, forward + backward: what a call costs before any arithmetic, beside PyTorch's own smallest loss."""
    cos = torch.zeros(1, 1, requires_grad=True)
    target = torch.ones(1, 1)
    steps = {"mlfast": training(aam_loss), "x.sum()": training(lambda cos, target: cos.sum())}
    medians = race(benchmark, steps, [(cos, target, target)] * 3, "mlfast", 2000)
    record(op="call_overhead", case="1 x 1 training", median_us={n: round(v * 1e6, 1) for n, v in medians.items()})
