"""Training of a diffusion prior."""

import torch
from torch import Tensor

from equireg.gaussian import ImageStatistics
from equireg.groups import get_group
from equireg.noise import Noise, SampleNoise, Stream
from equireg.priors import VPPrior
from equireg.priors.networks import as_batch
from lightning_modules.prior_training import PriorTraining
from lightning_modules.training import augment


class DiffusionPriorTraining(PriorTraining):
    """Denoising training of a VP prior (Ho et al., NeurIPS 2020, eq. 14), with a sample grid per validation.

    ``test`` compares its denoising error with the best linear denoiser's, see ``PriorTraining``.

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

    weights_prefix = "prior.network.unet."

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
        super().__init__(prior, lr, warmup_steps, decay_steps, num_samples, test_sigmas, export)
        self.group = None if augmentation is None else get_group(augmentation)
        self.sample_steps = sample_steps
        self.register_buffer("alpha_bar", torch.from_numpy(prior.alpha_bar).float(), persistent=False)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x_0 = self.training_targets(batch)
        # stratified over the batch: the same expectation as independent timesteps, less variance
        strata = (torch.arange(len(x_0), device=self.device) + torch.rand(len(x_0), device=self.device)) / len(x_0)
        loss = self._loss(x_0, (strata * len(self.alpha_bar)).long(), torch.randn_like(x_0)).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x_0, indices = self.targets(batch), batch["index"].tolist()
        eps = SampleNoise(indices, 0, Stream.SAMPLER).randn(tuple(x_0.shape[1:]), like=x_0)
        t = (batch["index"] * 7919) % len(self.alpha_bar)  # fixed timesteps, spread evenly by a prime stride
        self.log("val/loss", self._loss(x_0, t, eps).mean(), prog_bar=True, sync_dist=True, batch_size=len(x_0))

    def training_targets(self, batch: dict) -> Tensor:
        """What the prior is to restore of a training batch, moved by random elements of the group."""
        return augment(batch["x"], self.group)

    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the prior samples."""
        return self.trainer.datamodule.image_shape

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Unconditional images (count, C, H, W) by ancestral sampling, the same ones at every call."""
        noise = SampleNoise(range(count), 0, Stream.SAMPLER)
        x_t = noise.randn(self.sample_shape(), like=self.alpha_bar)
        for step in self.prior.schedule(self.sample_steps):
            x_t = self.prior.ancestral_step(x_t, self.prior(x_t, step), step, noise).float()
        return x_t

    def on_test_start(self) -> None:
        self.statistics = ImageStatistics.of(self.trainer.datamodule.dataset("train"))

    def pictures(self, samples: Tensor) -> Tensor:
        return samples

    def denoise_both(self, x_0: Tensor, sigma: float, noise: Noise) -> tuple[Tensor, Tensor]:
        sigmas = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()
        t = int((sigmas - sigma).abs().argmin())  # the nearest level the network was trained on
        noisy = x_0 + sigmas[t] * noise.randn(tuple(x_0.shape[1:]), like=x_0)
        linear = self.statistics.denoise(noisy.cpu(), float(sigmas[t])).to(noisy)
        return self._denoise(noisy, t), linear

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
