"""Training of a diffusion prior."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from equireg.gaussian import ImageStatistics
from equireg.groups import get_group
from equireg.noise import SampleNoise, Stream
from equireg.priors import VPPrior
from equireg.priors.networks import as_batch
from lightning_modules.training import augment, describe, log_pictures, scheduled


class DiffusionPriorTraining(LightningModule):
    """Denoising training of a VP prior (Ho et al., NeurIPS 2020, eq. 14), with a sample grid per validation.

    ``test`` compares its denoising error with the best linear denoiser's, which knows the training covariance: a prior
    that is not clearly better has learned nothing that a posterior sampler could use.

    Args:
        prior: the prior to train; random weights are asked for by name.
        lr: highest learning rate of Adam.
        warmup_steps: steps of linear warm-up.
        decay_steps: last steps, over which the learning rate falls linearly to 0.
        augmentation: name of a group whose random elements are applied to training images; none when null.
        num_samples: images in the sample grid.
        sample_steps: ancestral steps of the grid.
        test_sigmas: noise levels of ``test``, standard deviations on [-1, 1] images.
        export: file that the trained (averaged) weights are written to at the end of ``fit``.
    """

    def __init__(
        self,
        prior: VPPrior,
        lr: float = 3e-4,
        warmup_steps: int = 500,
        decay_steps: int = 0,
        augmentation: str | None = "hflip",
        num_samples: int = 16,
        sample_steps: int = 100,
        test_sigmas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0),
        export: str | None = None,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.group = None if augmentation is None else get_group(augmentation)
        self.num_samples = num_samples
        self.sample_steps = sample_steps
        self.test_sigmas = test_sigmas
        self.export = export
        self.register_buffer("alpha_bar", torch.from_numpy(prior.alpha_bar).float(), persistent=False)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return scheduled(optimizer, self.warmup_steps, self.decay_steps, self.trainer.max_steps)

    def setup(self, stage: str) -> None:
        self.prior.check_shape(self.trainer.datamodule.image_shape)
        if stage == "test":
            self.errors = torch.nn.ModuleList(MeanMetric() for _ in range(2 * len(self.test_sigmas)))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x_0 = augment(batch["x"], self.group)
        # stratified over the batch: the same expectation as independent timesteps, less variance
        strata = (torch.arange(len(x_0), device=self.device) + torch.rand(len(x_0), device=self.device)) / len(x_0)
        loss = self._loss(x_0, (strata * len(self.alpha_bar)).long(), torch.randn_like(x_0)).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x_0, indices = batch["x"], batch["index"].tolist()
        eps = SampleNoise(indices, 0, Stream.SAMPLER).randn(tuple(x_0.shape[1:]), like=x_0)
        t = (batch["index"] * 7919) % len(self.alpha_bar)  # fixed timesteps, spread evenly by a prime stride
        self.log("val/loss", self._loss(x_0, t, eps).mean(), prog_bar=True, sync_dist=True, batch_size=len(x_0))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            log_pictures(self, "samples", self.sample(self.num_samples))

    def on_fit_end(self) -> None:
        if self.export and self.trainer.is_global_zero:
            self.prior.save(Path(self.export))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        describe(checkpoint, self.prior.description, "prior.network.unet.")

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Unconditional images (count, C, H, W) by ancestral sampling, the same ones at every call."""
        noise = SampleNoise(range(count), 0, Stream.SAMPLER)
        shape = self.trainer.datamodule.image_shape
        x_t = noise.randn(shape, like=self.alpha_bar)
        for step in self.prior.schedule(self.sample_steps):
            x_t = self.prior.ancestral_step(x_t, self.prior(x_t, step), step, noise).float()
        return x_t

    def on_test_start(self) -> None:
        self.statistics = ImageStatistics.of(self.trainer.datamodule.dataset("train"))

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """Root mean square denoising errors of the prior and of the linear denoiser at the same noisy images."""
        x_0 = batch["x"]
        noise = SampleNoise(batch["index"].tolist(), 0, Stream.MEASUREMENT)
        for j, wanted in enumerate(self.test_sigmas):
            sigmas = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()
            t = int((sigmas - wanted).abs().argmin())  # the nearest level the network was trained on
            sigma = float(sigmas[t])
            noisy = x_0 + sigma * noise.randn(tuple(x_0.shape[1:]), like=x_0)
            denoised = self._denoise(noisy, t)
            linear = self.statistics.denoise(noisy.cpu(), sigma).to(noisy)
            for metric, estimate in zip(self.errors[2 * j : 2 * j + 2], (denoised, linear), strict=True):
                metric.update((estimate - x_0).square().flatten(1).mean(1))

    def on_test_epoch_end(self) -> None:
        log_pictures(self, "samples", self.sample(self.num_samples))
        for j, sigma in enumerate(self.test_sigmas):
            prior, linear = (metric.compute().sqrt() for metric in self.errors[2 * j : 2 * j + 2])
            self.log(f"test/rmse_prior_sigma{sigma:g}", prior)
            self.log(f"test/rmse_linear_sigma{sigma:g}", linear)
            self.log(f"test/ratio_sigma{sigma:g}", prior / linear)

    def _denoise(self, noisy: Tensor, t: int) -> Tensor:
        """x0_hat, unclipped, from x_0 + sigma_t n."""
        x_t = self.alpha_bar[t].sqrt() * noisy
        return self.prior.tweedie(x_t, self.prior.network(x_t, as_batch(t, x_t)), float(self.alpha_bar[t]))

    def _loss(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Squared error of the network's answer per image (B,), for x_0 noised with eps to the timesteps t (B,)."""
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
        error = self.prior.network(x_t, t).float() - self.prior.target(x_0, eps, alpha_bar)
        return error.square().flatten(1).mean(1)
