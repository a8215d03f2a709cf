"""Optimiser and learning rate schedule."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from mlfast.training.config import TrainConfig

# As in the paper's released training code; torch's own defaults are 25 and 10,000.
_START_DIVISOR = 100
_END_DIVISOR = 1000


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split parameters into weights, which decay, and biases and norms (anything of one dimension), which do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def create_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD with Nesterov momentum, or AdamW, as ``config.optimizer`` says."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)


def create_schedule(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> OneCycleLR:
    """OneCycle over all steps: a cosine rise to ``config.lr``, then a cosine fall. The momentum stays as configured."""
    return OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=total_steps,
        pct_start=config.warmup,
        div_factor=_START_DIVISOR,
        final_div_factor=_END_DIVISOR,
        cycle_momentum=False,
    )
