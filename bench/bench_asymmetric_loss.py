"""asymmetric_loss against eager PyTorch, torch.compile and timm, forward alone and training (forward + backward).

``eager`` is mlfast's own reference in plain PyTorch; ``eager pow`` is the form of the public code: sigmoids,
clamped logarithms, a power; ``eager fixed`` has the options of the run written into the code, and knows hard labels
alone.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.losses import SIZES, forward, race_losses, training
from mlfast.functional import asymmetric_loss
from mlfast.ops.asymmetric_loss import check_options, reference
from mlfast.torchvision_compat import import_torchvision

OPTIONS = check_options(4.0, 0.0, 0.05, 0.0, False, "sum")  # ASL's own, on COCO
OPERATIONS = {training: 124, forward: 109}  # of an element with a hard label: docs/asymmetric_loss.md


def plain_reference(logits, target):
    return reference(logits, target, None, OPTIONS)


def plain_pow(logits, target):
    gamma_neg, gamma_pos, clip, *_ = OPTIONS
    p = torch.sigmoid(logits)
    q = (1 - p + clip).clamp(max=1)
    loss = target * torch.log(p.clamp(min=1e-8)) + (1 - target) * torch.log(q.clamp(min=1e-8))
    focus = torch.pow(1 - p * target - q * (1 - target), gamma_pos * target + gamma_neg * (1 - target))
    return -(loss * focus).sum()


def plain_fixed(logits, target):
    """For gammas of 4 and 0, a clip, and hard or unknown labels."""
    q = (torch.sigmoid(-logits) + OPTIONS.clip).clamp(max=1)
    squared = (1 - q).square()
    terms = target * F.logsigmoid(logits) + (1 - target) * squared.square() * torch.log(q)
    return -torch.where(target >= 0, terms, 0).sum()


def timm_loss():
    import_torchvision()
    from timm.loss import AsymmetricLossMultiLabel

    loss = AsymmetricLossMultiLabel(gamma_neg=OPTIONS.gamma_neg, gamma_pos=OPTIONS.gamma_pos, clip=OPTIONS.clip)
    loss.reduction = "sum"  # timm's default is a mean over the batch; older versions know nothing but the sum
    return loss


def contestants():
    torch._dynamo.reset()
    return {
        "mlfast": asymmetric_loss,
        "eager": plain_reference,
        "compile": torch.compile(plain_reference),
        "eager pow": plain_pow,
        "compile pow": torch.compile(plain_pow),
        "eager fixed": plain_fixed,
        "compile fixed": torch.compile(plain_fixed),
        "timm": timm_loss(),
    }


@pytest.mark.parametrize("mode", [training, forward])
@pytest.mark.parametrize("size", SIZES)
def bench_asymmetric_loss(benchmark, record, device, quick, size, mode):
    race_losses(
        "asymmetric_loss", contestants(), plain_reference, OPERATIONS, benchmark, record, device, quick, size, mode
    )
