"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    optim: str,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW or RMSprop over a model's parameters; matrices decay, norms do not (there are no biases).

    optim: a name in OPTIMIZERS.  The defaults are those of transformers, hence of the alignment-handbook.
    RMSprop has alpha 0.99, no momentum and no use for `betas`, as the handbook's DPO ran it.  The state is
    made here and not in the first step: a trial of the memory sees it, and a checkpoint can be read into it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS[optim](groups, learning_rate, betas, eps)
    names = ("exp_avg", "exp_avg_sq") if optim == "adamw" else ("square_avg",)
    for parameter in parameters:
        state = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in names}
        device = parameter.device if optim == "adamw" else "cpu"  # where the fused step wants its counter
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=device), **state}
    return optimizer


def _adamw(
    groups: list[dict], learning_rate: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def _rmsprop(groups: list[dict], learning_rate: float, _betas: tuple, eps: float) -> torch.optim.RMSprop:
    return torch.optim.RMSprop(groups, lr=learning_rate, alpha=0.99, eps=eps)


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """The learning rate of step 0, 1, ... as a share of its peak, as transformers' schedulers give it.

    schedule: a name in SCHEDULES.  Warm-up rises linearly from 0 at step 0; after `total_steps` it stays at
    the end.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[schedule](min(1.0, progress))


OPTIMIZERS = {"adamw": _adamw, "rmsprop": _rmsprop}
# Progress in [0, 1] after the warm-up -> share of the peak.
SCHEDULES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
