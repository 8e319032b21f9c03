"""Training of a diffusion prior on fields."""

import torch
from torch import Tensor

from equireg.gaussian import ImageStatistics
from equireg.groups import get_group
from equireg.noise import Noise, SampleNoise, Stream
from equireg.pde.noise_basis import NoiseBasis
from equireg.pictures import field_pictures
from equireg.priors import EDMPrior
from lightning_modules.prior_training import PriorTraining
from lightning_modules.training import augment

FITTED = 8192
"""Fields that a linear denoiser is fitted to, at most."""


class FunctionPriorTraining(PriorTraining):
    """Denoising training of an EDM prior on fields x = (a, u) (Karras et al., NeurIPS 2022, eq. 7), with its own noise.

    A linear denoiser in the network is fitted to the training set before the first step, unless its weights have one.
    With exponential noise this is the training of FunDPS, with white noise that of DiffusionPDE. ``test`` compares its
    denoising error with the best linear denoiser's, see ``PriorTraining``.

    Args:
        prior: the prior to train; random weights are asked for by name.
        lr: highest learning rate of Adam.
        warmup_steps: steps of linear warm-up.
        decay_steps: last steps, over which the learning rate falls linearly to 0.
        p_mean, p_std: mean and standard deviation of log sigma. The published -1.2 spends most of the training where
            smooth fields are nearly known; -0.4 suits them better.
        augmentation: name of a group whose random elements move the training fields; none when null. A true symmetry of
            the equation and of its fields' law multiplies the data: ``helmholtz_d4``, ``navier_stokes_torus``.
        num_samples: fields in the grid of a validation.
        sample_steps: Heun steps of the grid.
        test_sigmas: noise levels of ``test``, in units of normalised fields (standard deviation 0.5).
        export: file that the trained (averaged) weights are written to at the end of ``fit``.

    Raises:
        ValueError: if ``p_std`` is not positive or the group is unknown; in ``setup`` if it does not act on the fields.
    """

    weights_prefix = "prior.network."

    def __init__(
        self,
        prior: EDMPrior,
        lr: float = 1e-4,
        warmup_steps: int = 500,
        decay_steps: int = 0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        augmentation: str | None = None,
        num_samples: int = 8,
        sample_steps: int = 18,
        test_sigmas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0),
        export: str | None = None,
    ) -> None:
        super().__init__(prior, lr, warmup_steps, decay_steps, num_samples, test_sigmas, export)
        if not p_std > 0:
            raise ValueError(f"p_std={p_std} must be positive")
        self.p_mean = p_mean
        self.p_std = p_std
        self.group = None if augmentation is None else get_group(augmentation)
        self.sample_steps = sample_steps

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.prior.check_equation(getattr(self.trainer.datamodule, "pde", None))
        if self.group is not None:
            self.group.check_shape(self.trainer.datamodule.image_shape)

    def on_fit_start(self) -> None:
        if self.prior.linear is not None and not self.prior.linear.fitted:
            self.prior.linear.fit(self.training_fields(FITTED))

    def training_fields(self, most: int | None = None) -> Tensor:
        """The fields of the training set, normalised; no more than ``most`` of them."""
        dataset = self.trainer.datamodule.dataset("train")
        count = len(dataset) if most is None else min(most, len(dataset))
        return self.prior.normalize(torch.stack([dataset[i]["x"] for i in range(count)]).to(self.device))

    def targets(self, batch: dict) -> Tensor:
        return self.prior.normalize(batch["x"])

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x_0 = self.prior.normalize(augment(batch["x"], self.group))
        # stratified over the batch: the same expectation as independent levels, less variance
        strata = (torch.arange(len(x_0), device=self.device) + torch.rand(len(x_0), device=self.device)) / len(x_0)
        noise = self.prior.draw_noise(GlobalNoise(len(x_0)), tuple(x_0.shape[1:]), like=x_0)
        loss = self._loss(x_0, self._sigma(strata), noise).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x_0, index = self.targets(batch), batch["index"]
        noise = SampleNoise(index.tolist(), 0, Stream.SAMPLER)
        noise = self.prior.draw_noise(noise, tuple(x_0.shape[1:]), like=x_0)
        strata = ((index * 7919) % 1000 + 0.5) / 1000  # fixed levels, spread evenly by a prime stride
        loss = self._loss(x_0, self._sigma(strata), noise).mean()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(x_0))

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        noise = SampleNoise(range(count), 0, Stream.SAMPLER)
        shape = self.trainer.datamodule.image_shape
        steps = self.prior.steps(self.sample_steps)
        x = steps[0].sigma * self.prior.draw_noise(noise, shape, like=torch.zeros(1, device=self.device))
        for step in steps:
            x, _ = self.prior.heun_step(x, step)
        return x

    def pictures(self, samples: Tensor) -> Tensor:
        return field_pictures(samples, largest=3 * self.prior.sigma_data)

    def on_test_start(self) -> None:
        fields = self.training_fields().cpu()
        self.basis = NoiseBasis(self.prior.noise, fields.shape[-1])
        self.statistics = ImageStatistics(self.basis.whiten(fields))

    def denoise_both(self, x_0: Tensor, sigma: float, noise: Noise) -> tuple[Tensor, Tensor]:
        noisy = x_0 + sigma * self.prior.draw_noise(noise, tuple(x_0.shape[1:]), like=x_0)
        linear = self.basis.colour(self.statistics.denoise(self.basis.whiten(noisy.cpu()), sigma))
        return self.prior.denoise(noisy, sigma), linear.to(noisy)

    def _sigma(self, strata: Tensor) -> Tensor:
        """The levels (B,) at these quantiles of their distribution."""
        return torch.exp(self.p_mean + self.p_std * torch.special.ndtri(strata))

    def _loss(self, x_0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Weighted squared error per field (B,), a mean over its points where the papers have the sum."""
        error = self.prior.denoise(x_0 + sigma.view(-1, 1, 1, 1) * noise, sigma) - x_0
        return self.prior.loss_weight(sigma) * error.square().flatten(1).mean(1)


class GlobalNoise:
    """Draws of a training, from torch's global generator."""

    def __init__(self, count: int) -> None:
        self.count = count

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normals (count, *shape)."""
        return torch.randn(self.count, *shape, device=like.device, dtype=like.dtype)
