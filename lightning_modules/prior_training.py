"""What the trainings of diffusion priors share: optimizer, export, samples, the comparison with the linear denoiser."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from equireg.noise import Noise, SampleNoise, Stream
from lightning_modules.training import describe, log_pictures, scheduled


class PriorTraining(LightningModule, ABC):
    """Trains a prior, writes its averaged weights, and tests it against the best linear denoiser.

    A prior that is not clearly better than that one, which knows mean and covariance of the training set, has learned
    nothing that a posterior sampler could use.

    Args:
        prior: the prior to train; random weights are asked for by name.
        lr: highest learning rate of Adam.
        warmup_steps: steps of linear warm-up.
        decay_steps: last steps, over which the learning rate falls linearly to 0.
        num_samples: samples in the grid of a validation.
        test_sigmas: noise levels of ``test``.
        export: file that the trained (averaged) weights are written to at the end of ``fit``.
    """

    weights_prefix: str
    """Of the names of the prior's weights in the state of this module."""

    def __init__(
        self,
        prior: nn.Module,
        lr: float,
        warmup_steps: int,
        decay_steps: int,
        num_samples: int,
        test_sigmas: tuple[float, ...],
        export: str | None,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.num_samples = num_samples
        self.test_sigmas = test_sigmas
        self.export = export

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """Unconditional samples (count, C, H, W), the same ones at every call."""

    @abstractmethod
    def pictures(self, samples: Tensor) -> Tensor:
        """The samples as pictures in [-1, 1]."""

    @abstractmethod
    def denoise_both(self, x_0: Tensor, sigma: float, noise: Noise) -> tuple[Tensor, Tensor]:
        """What the prior and what the linear denoiser make of x_0 at a noise level."""

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return scheduled(optimizer, self.warmup_steps, self.decay_steps, self.trainer.max_steps)

    def setup(self, stage: str) -> None:
        self.prior.check_shape(self.trainer.datamodule.image_shape)
        if stage == "test":
            self.errors = nn.ModuleList(MeanMetric() for _ in range(2 * len(self.test_sigmas)))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.show_samples()

    def on_fit_end(self) -> None:
        if self.export and self.trainer.is_global_zero:
            self.prior.save(Path(self.export))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        describe(checkpoint, self.prior.description, self.weights_prefix)

    def targets(self, batch: dict) -> Tensor:
        """What the prior is to restore of a batch."""
        return batch["x"]

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """Mean square denoising errors of the prior and of the linear denoiser at the same noisy inputs."""
        x_0 = self.targets(batch)
        noise = SampleNoise(batch["index"].tolist(), 0, Stream.MEASUREMENT)
        for j, sigma in enumerate(self.test_sigmas):
            estimates = self.denoise_both(x_0, sigma, noise)
            for metric, estimate in zip(self.errors[2 * j : 2 * j + 2], estimates, strict=True):
                metric.update((estimate - x_0).square().flatten(1).mean(1))

    def on_test_epoch_end(self) -> None:
        self.show_samples()
        for j, sigma in enumerate(self.test_sigmas):
            prior, linear = (metric.compute().sqrt() for metric in self.errors[2 * j : 2 * j + 2])
            self.log(f"test/rmse_prior_sigma{sigma:g}", prior)
            self.log(f"test/rmse_linear_sigma{sigma:g}", linear)
            self.log(f"test/ratio_sigma{sigma:g}", prior / linear)

    def show_samples(self) -> None:
        """Writes the grid of samples."""
        if self.num_samples:
            log_pictures(self, "samples", self.pictures(self.sample(self.num_samples)))
