"""What the modules that train something share."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import Dataset

from equireg.groups import Group
from equireg.pictures import encode_png, picture_grid, to_uint8
from equireg.runs import atomic_write


def scheduled(optimizer: torch.optim.Optimizer, warmup: int, decay: int = 0, max_steps: int = -1) -> dict[str, Any]:
    """The optimizer with a learning rate that rises linearly, stays, and falls linearly to 0 at the end.

    Args:
        optimizer: holds the highest learning rate.
        warmup: steps of the rise.
        decay: steps of the fall; 0 leaves it out.
        max_steps: the last step of the training, where the fall ends.

    Raises:
        ValueError: if there is a fall but no last step.
    """
    if decay and max_steps < 1:
        raise ValueError(f"decay_steps={decay} needs trainer.max_steps: the learning rate falls towards the last step")

    def factor(step: int) -> float:
        rise = (step + 1) / max(warmup, 1)
        fall = (max_steps - step) / decay if decay else 1.0
        return max(0.0, min(1.0, rise, fall))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine(optimizer: torch.optim.Optimizer, warmup: int, max_steps: int | float) -> dict[str, Any]:
    """The optimizer with a learning rate that rises linearly and falls to 0 like half a cosine.

    Args:
        optimizer: holds the highest learning rate.
        warmup: steps of the rise.
        max_steps: the last step of the training, where the fall ends.

    Raises:
        ValueError: if the training has no last step.
    """
    if not 1 <= max_steps < math.inf:
        raise ValueError("the learning rate falls towards the last step: trainer.max_steps or max_epochs is missing")

    def factor(step: int) -> float:
        fall = (1 + math.cos(math.pi * min(1.0, step / max_steps))) / 2
        return min((step + 1) / max(warmup, 1), 1.0) * fall

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def describe(checkpoint: dict[str, Any], description: dict[str, Any], prefix: str) -> None:
    """Notes in a checkpoint what its weights are, so that ``cli.py export`` needs nothing else.

    Args:
        checkpoint: what Lightning is about to save.
        description: of ``save_weights``.
        prefix: of the names of the weights in the checkpoint's state.
    """
    checkpoint["description"] = description
    checkpoint["weights_prefix"] = prefix


def in_batches(dataset: Dataset, size: int = 64) -> Iterator[tuple[Tensor, list[int]]]:
    """The images (B, C, H, W) of a data set in order, with their indices, ``size`` at a time."""
    for start in range(0, len(dataset), size):
        samples = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        yield torch.stack([sample["x"] for sample in samples]), [sample["index"] for sample in samples]


def augment(x: Tensor, group: Group | None) -> Tensor:
    """Every image moved by an element drawn uniformly from the whole group, identity included."""
    if group is None:
        return x
    return group.transform(x, torch.randint(len(group.elements), (len(x),), device=x.device))


def log_pictures(module: LightningModule, tag: str, images: Tensor) -> None:
    """Writes images (N, C, H, W) in [-1, 1] as one grid to TensorBoard and to ``<tag>.png`` in the run's folder."""
    if not (isinstance(module.logger, TensorBoardLogger) and module.trainer.is_global_zero):
        return
    grid = picture_grid(images)
    module.logger.experiment.add_image(tag, grid, module.global_step)
    atomic_write(Path(module.logger.log_dir) / f"{tag}.png", encode_png(to_uint8(2 * grid - 1)))
