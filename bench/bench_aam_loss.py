"""aam_loss against eager PyTorch and torch.compile, forward (no gradient) and training (forward + backward).

``eager`` is mlfast's own reference in plain PyTorch: numerically safe, for all options. ``eager pow`` is the
straightforward way to write the loss, which PyTorch runs faster; its gradient is NaN where a sigmoid underflows and an
exponent is below 1. ``eager fixed`` has the options of the run written into the code, and knows hard labels alone: what
one writes who will never change them. All are also compiled.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.losses import SIZES, forward, race_losses, training
from bench.race import race
from mlfast.functional import aam_loss
from mlfast.ops.aam_loss import check_options, reference

OPTIONS = check_options(23.0, 0.0, 0.7, 1.0, 0.0, 0.0, 0.0, "sum")  # the paper's, on COCO
OPERATIONS = {training: 75, forward: 68}  # of an element with a hard label: docs/aam_loss.md


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


def plain_fixed(cos, target):
    """For margin 0, gammas of 1 and 0, and hard or unknown labels."""
    u = OPTIONS.scale * cos
    log_p = F.logsigmoid(u)
    terms = OPTIONS.k * target * log_p + (1 - OPTIONS.k) * (1 - target) * torch.sigmoid(u) * (log_p - u)
    return -torch.where(target >= 0, terms, 0).sum() / OPTIONS.scale


def contestants():
    torch._dynamo.reset()
    return {
        "mlfast": aam_loss,
        "eager": plain_reference,
        "compile": torch.compile(plain_reference),
        "eager pow": plain_pow,
        "compile pow": torch.compile(plain_pow),
        "eager fixed": plain_fixed,
        "compile fixed": torch.compile(plain_fixed),
    }


@pytest.mark.parametrize("mode", [training, forward])
@pytest.mark.parametrize("size", SIZES)
def bench_aam_loss(benchmark, record, device, quick, size, mode):
    race_losses("aam_loss", contestants(), plain_reference, OPERATIONS, benchmark, record, device, quick, size, mode)


def bench_call_overhead(benchmark, record, device):
    """One label, forward + backward: what a call costs before any arithmetic, beside PyTorch's own smallest loss."""
    cos = torch.zeros(1, 1, device=device, requires_grad=True)
    target = torch.ones(1, 1, device=device)
    steps = {"mlfast": training(aam_loss), "x.sum()": training(lambda cos, target: cos.sum())}
    median_us = race(benchmark, steps, [(cos, target, target)] * 3, "mlfast", 2000)
    record(op="call_overhead", case="1 x 1 training", median_us=median_us)
