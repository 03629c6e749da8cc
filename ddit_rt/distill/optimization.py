"""What moves the weights of an adapter: optimizer, learning-rate schedule, moving average."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from ..errors import ConfigError
from ..families import Family
from .config import DistillConfig


def optimizer_name(config: DistillConfig, family: Family) -> str:
    """``"prodigy"`` or ``"adamw"``: the one asked for, or with ``"auto"`` the family's."""
    return family.distill_optimizer if config.optimizer == "auto" else config.optimizer


def build_optimizer(config: DistillConfig, family: Family, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of ``parameters``, at its full learning rate.

    Raises:
        ConfigError: Prodigy is not installed.
    """
    if optimizer_name(config, family) == "adamw":
        lr = 1e-4 if config.lr is None else config.lr
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ConfigError("the Prodigy optimizer is in the extra: pip install 'ddit-rt[distill]'.") from error
    lr = 1.0 if config.lr is None else config.lr
    return Prodigy(
        list(parameters), lr=lr, weight_decay=config.weight_decay, use_bias_correction=True, safeguard_warmup=True
    )


def build_schedule(config: DistillConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The learning rate: a linear rise, a constant, a linear fall (:meth:`DistillConfig.lr_factor`).

    ``diffusers.optimization.get_scheduler`` has no such shape: its schedules fall from the end of the rise, or never.
    """
    return LambdaLR(optimizer, config.lr_factor)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights, for ``update_parameters(model)`` after every step.

    The decay rises with the number n of updates as min(``decay``, (1 + n) / (10 + n)), and the first update copies the
    weights; both are what ``diffusers.training_utils.EMAModel`` does. Unlike there the average is a module that can be
    run and saved as it is, without a further copy.

    Args:
        model: Is copied.
        decay: In [0, 1]; 0 keeps the weights themselves.
    """

    def update(averaged: list[torch.Tensor], weights: list[torch.Tensor], count: torch.Tensor) -> None:
        updates = int(count)
        torch._foreach_lerp_(averaged, weights, 1 - min(decay, (1 + updates) / (10 + updates)))

    return AveragedModel(model, multi_avg_fn=update).requires_grad_(False)
