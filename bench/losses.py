"""What the benchmarks of the elementwise losses share: sizes, inputs, steps, and the race itself."""

import pytest
import torch

import mlfast
from bench.race import number_of_sets, race
from mlfast import SparseTargets

SIZES = {
    "VOC 84 x 20": (84, 20),
    "COCO 56 x 80": (56, 80),
    "COCO 84 x 80": (84, 80),
    "VG500 84 x 500": (84, 500),
    "OpenImages 512 x 601": (512, 601),
    "OpenImages 256 x 9605": (256, 9605),
    "OpenImages 1024 x 9605": (1024, 9605),
    "ImageNet-21k 64 x 21841": (64, 21841),
}
QUICK = ("COCO 56 x 80", "OpenImages 256 x 9605")
GPU_ONLY = "OpenImages 1024 x 9605"


def training(loss):
    def step(cos, target, *others):
        cos.grad = None
        loss(cos, target).backward()

    return step


def forward(loss):
    def step(cos, target, *others):
        with torch.no_grad():
            loss(cos, target)

    return step


def byte_targets(step):
    return lambda cos, target, byte_target, sparse: step(cos, byte_target)


def sparse_targets(step):
    return lambda cos, target, byte_target, sparse: step(cos, sparse)


def on_triton(step):
    """The loss's other kernels on a GPU, where those in CUDA C++ come first."""

    def call(*arguments):
        with mlfast.use_backend("triton"):
            step(*arguments)

    return call


def make_inputs(rows, classes, device):
    sets = []
    for seed in range(number_of_sets(rows * classes * 13)):
        g = torch.Generator().manual_seed(seed)
        cos = (torch.rand(rows, classes, generator=g) * 2 - 1).to(device).requires_grad_()
        target = (torch.rand(rows, classes, generator=g) < 3 / classes).to(device)  # about three labels per image
        sets.append((cos, target.float(), target.to(torch.uint8), SparseTargets.from_dense(target)))
    return sets


def assert_same_results(losses, reference, scores, target):
    exact = scores.detach().double().requires_grad_()
    truth = reference(exact, target.double())
    (slope,) = torch.autograd.grad(truth, exact)
    for name, loss in losses.items():
        value = loss(scores, target)
        assert value.item() == pytest.approx(truth.item(), rel=1e-5), name
        (grad,) = torch.autograd.grad(value, scores)
        torch.testing.assert_close(grad.double(), slope, rtol=1e-3, atol=1e-5, msg=name)


def race_losses(op, contestants, reference, operations, benchmark, record, device, quick, size, mode):
    """Races every way to compute one loss.

    ``contestants`` begins with mlfast's own, under the name "mlfast"; ``operations`` counts those of an element, by
    mode.
    """
    if quick and (size not in QUICK or mode is not training):
        pytest.skip("left out of --quick")
    if size == GPU_ONLY and device.type != "cuda":
        pytest.skip("for a GPU")
    rows, classes = SIZES[size]
    inputs = make_inputs(rows, classes, device)
    assert_same_results(contestants, reference, *inputs[0][:2])
    steps = {name: mode(loss) for name, loss in contestants.items()}
    # Ours are kept apart: the second of two would find its code in the caches. "mlfast" itself comes last in a round.
    mine, first, second, *rest = steps
    steps |= {"mlfast sparse": sparse_targets(steps[mine]), "mlfast uint8": byte_targets(steps[mine])}
    steps = {name: steps[name] for name in (mine, first, "mlfast sparse", second, "mlfast uint8", *rest)}
    if device.type == "cuda":
        steps["mlfast triton"] = on_triton(steps[mine])
    rounds = max(15, min(300, 20_000_000 // (rows * classes))) // (3 if quick else 1)
    median_us = race(benchmark, steps, inputs, "mlfast", rounds)
    elements = rows * classes
    record(
        op=op,
        case=f"{size} {mode.__name__}",
        size=size,
        mode=mode.__name__,
        rows=rows,
        classes=classes,
        bytes=elements * (12 if mode is training else 8),  # float32 scores and targets, and the gradient
        operations=elements * operations[mode],
        growth={"over": "B x K", "at": elements, "curve": mode.__name__},
        median_us=median_us,
    )
