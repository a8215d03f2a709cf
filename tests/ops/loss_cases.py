"""What the tests of the elementwise losses share: inputs, and the comparison with plain PyTorch and float64."""

import torch

import mlfast
from mlfast.ops._dtypes import computing_dtype
from tests.ops.policy import assert_error

GAMMAS = [(0.0, 0.0), (1.0, 0.0), (2.0, 1.0), (4.0, 3.0), (0.5, 0.3)]


def example(rows, classes, dtype, kind, device="cpu", seed=0):
    """Scores in [-1, 1], and targets of an integer type, or hard or soft floats; all but bool have unknowns."""
    g = torch.Generator().manual_seed(seed)
    scores = (torch.rand(rows, classes, generator=g) * 2 - 1).to(dtype)
    target = (torch.rand(rows, classes, generator=g) < 0.1).float()
    if kind == "soft":
        target = torch.rand(rows, classes, generator=g)
    unknown = torch.rand(rows, classes, generator=g) < 0.1
    if kind != torch.bool:
        target[unknown] = -1
    if isinstance(kind, torch.dtype):
        target = target.to(torch.int8).to(kind)
    return scores.to(device), target.to(device)


def loss_and_grad(function, scores, target, **options):
    """The loss, and its gradient for an uneven incoming gradient, both in float64."""
    scores = scores.detach().clone().requires_grad_()
    loss = function(scores, target, **options)
    incoming = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    (grad,) = torch.autograd.grad(loss, scores, incoming)
    return loss.detach().double().cpu(), grad.double().cpu()


def assert_as_good_as_pytorch(function, scores, target, **options):
    """Loss and gradient against float64, by the policy."""
    got = loss_and_grad(function, scores, target, **options)
    with mlfast.use_backend("reference"):
        plain = loss_and_grad(function, scores, target, **options)
        truth = loss_and_grad(function, scores.double(), target, **options)
    dtypes = computing_dtype(scores.dtype), scores.dtype
    for name, mine, theirs, exact, dtype in zip(("loss", "grad"), got, plain, truth, dtypes, strict=True):
        assert_error(f"{name} of {options}", mine, theirs, exact, dtype)
