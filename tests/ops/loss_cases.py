"""What the tests of the elementwise losses share: inputs, and the comparison with plain PyTorch and float64."""

import torch

import mlfast

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
    """Error at most twice that of plain PyTorch in the same dtype, plus four units in the last place."""
    got = loss_and_grad(function, scores, target, **options)
    with mlfast.use_backend("reference"):
        plain = loss_and_grad(function, scores, target, **options)
        truth = loss_and_grad(function, scores.double(), target, **options)
    for name, dtype, *values in zip(("loss", "grad"), (torch.float32, scores.dtype), got, plain, truth, strict=True):
        mine, theirs, exact = values
        dtype = torch.float64 if scores.dtype == torch.float64 else dtype
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max().item() + 1e-12
        bound = 2 * (theirs - exact).abs().nan_to_num(nan=0, posinf=0).max().item() + floor
        error = (mine - exact).abs().max().item()
        assert error <= bound, f"{name} of {options}: error {error:.3g}, allowed {bound:.3g}"
