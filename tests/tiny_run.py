"""A run of seconds for the tests of callbacks: three steps on images of 12x12 that are made up by their index."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import Dataset

from datamodules import ImageDataModule
from equireg.noise import Noise, SampleNoise, Stream
from equireg.operators import Operator, RandomInpainting
from equireg.priors import Step
from lightning_modules import PosteriorSampler

SHAPE = (1, 12, 12)
STEPS = 3


class TinyPrior(nn.Module):
    """One network call per step, like a prior."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Identity()

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Takes images of every shape."""


class TinySampler(PosteriorSampler):
    """Walks from noise to A^T y; goes wrong where it is told to.

    Attributes:
        restored: (index, draw) of what it restored, in order; a test's spy.
    """

    def __init__(
        self,
        operator: Operator | None = None,
        num_steps: int = STEPS,
        diverges_at: tuple[int, ...] = (),
        raises_at: tuple[int, ...] = (),
    ) -> None:
        super().__init__(TinyPrior(), operator or RandomInpainting((0.5, 0.6)))
        self.num_steps = num_steps
        self.diverges_at = diverges_at
        self.raises_at = raises_at
        self.restored: list[tuple[int, int]] = []

    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        indices = self.problem.indices
        if set(indices) & set(self.raises_at):
            raise ArithmeticError("told to fail")
        x_t = noise.randn(operator.image_shape, like=y)
        for k in range(self.num_steps):
            x_t = self.prior.network(0.5 * x_t + 0.5 * operator.adjoint(y))
            self.emit(Step(k, self.num_steps, alpha_bar=(k + 1) / (self.num_steps + 1), beta=0.1), x_t)
        self.restored += zip(indices, self.problem.draws, strict=True)
        diverged = torch.tensor([index in self.diverges_at for index in indices])
        return torch.where(diverged.view(-1, 1, 1, 1), torch.nan, x_t)


class TinyImages(Dataset):
    """Images (or, when given, their measurements) that depend on the index alone."""

    def __init__(self, count: int, shape: tuple[int, int, int], is_given: bool = False) -> None:
        self.indices = range(count)
        self.shape = shape
        self.is_given = is_given

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        x = SampleNoise([i], seed=0, stream=Stream.SAMPLER).randn(self.shape, like=torch.zeros(1))[0].tanh()
        sample = {"index": i, "name": f"image {i}"}
        if self.is_given:
            return sample | {"y": x, "parameters": {"mask": torch.ones(1, *self.shape[1:])}}
        return sample | {"x": x}


class TinyData(ImageDataModule):
    """``TinyImages``, two at once."""

    def __init__(
        self,
        count: int = 5,
        draws: int = 1,
        shape: tuple[int, int, int] = SHAPE,
        is_given: bool = False,
        batch_size: int = 2,
    ) -> None:
        super().__init__(batch_size=batch_size, draws=draws)
        self.images = TinyImages(count, shape, is_given)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape

    def dataset(self, split: str) -> Dataset:
        return self.images


def predict(
    run: Path,
    *callbacks: Callback,
    sampler: PosteriorSampler | None = None,
    data: ImageDataModule | None = None,
    **options: Any,
) -> Trainer:
    """Runs ``predict`` into the folder ``run``."""
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False} | options
    logger = TensorBoardLogger(run.parent, name=run.name, version="", default_hp_metric=False)
    trainer = Trainer(
        logger=options.pop("logger", logger),
        callbacks=list(callbacks),
        inference_mode=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )
    trainer.predict(sampler or TinySampler(), data or TinyData(), return_predictions=False)
    return trainer
