"""Loss, optimiser and learning rate schedule of a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import mlfast
from mlfast.training.config import TrainConfig

# As in the paper's released training code; torch's own defaults are 25 and 10,000.
_START_DIVISOR = 100
_END_DIVISOR = 1000


def create_loss(config: TrainConfig) -> nn.Module:
    """The loss that ``config.loss`` names, summed over images and classes."""
    smoothing, gammas = config.label_smoothing, (config.gamma_neg, config.gamma_pos)
    if config.loss == "aam":
        return mlfast.AAMLoss(config.scale, config.margin, config.k, *gammas, config.prob_shift, smoothing)
    if config.loss == "asl":
        return mlfast.AsymmetricLoss(*gammas, clip=config.prob_shift, label_smoothing=smoothing)
    return mlfast.AsymmetricLoss(0.0, 0.0, clip=0.0, label_smoothing=smoothing)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Weights, which decay; biases, which do not; and others that do not.

    These are norms and all of one dimension, the queries of a head, and what timm names for a backbone, such as the
    position embeddings and class token of a vision transformer. Biases are apart, since ``config.bias_lr`` multiplies
    their learning rate.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    spared = _without_decay(model)
    is_bias = {name: weight.ndim <= 1 and name.endswith("bias") for name, weight in trained}
    decays = {name: weight.ndim > 1 and name not in spared for name, weight in trained}
    weights = [weight for name, weight in trained if decays[name]]
    biases = [weight for name, weight in trained if is_bias[name]]
    others = [weight for name, weight in trained if not (decays[name] or is_bias[name])]
    groups: list[dict[str, object]] = [
        {"params": weights, "weight_decay": config.weight_decay, "lr": config.lr},
        {"params": biases, "weight_decay": 0.0, "lr": config.lr * config.bias_lr},
        {"params": others, "weight_decay": 0.0, "lr": config.lr},
    ]
    return [group for group in groups if group["params"]]


def _without_decay(model: nn.Module) -> set[str]:
    """Names of parameters that a decay would draw to nothing, rather than keep a function smooth."""
    backbone: Any = getattr(model, "backbone", None)
    named = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    queries = {name for name, _ in model.named_parameters() if name.endswith("queries")}
    return queries | {f"backbone.{name}" for name in named}


def create_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD with momentum, or AdamW, as ``config.optimizer`` says; fused where torch has that."""
    groups = parameter_groups(model, config)
    fused = all(weight.device.type in ("cpu", "cuda") for weight in model.parameters()) or None
    if config.optimizer == "adamw":
        return AdamW(groups, betas=(config.momentum, 0.999), fused=fused)
    optimizer = SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        # What a first step makes of nothing. The fused one leaves it as it finds the memory where float16 overflows.
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def create_schedule(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> OneCycleLR:
    """OneCycle over all steps: a cosine rise to each group's learning rate, then a cosine fall.

    The momentum stays as configured, or with ``config.cycle_momentum`` falls from 0.95 to 0.85 and returns, as in the
    released code.
    """
    # A rise of exactly one step has no length, by which torch divides.
    warmup = config.warmup * (1 + 1e-6) if math.isclose(config.warmup * total_steps, 1) else config.warmup
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=warmup,
        div_factor=_START_DIVISOR,
        final_div_factor=_END_DIVISOR,
        cycle_momentum=config.cycle_momentum,
    )
