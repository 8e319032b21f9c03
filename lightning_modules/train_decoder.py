"""Training of the decoder of an autoencoder, for latent samplers."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from equireg.autoencoder import Autoencoder
from lightning_modules.train_autoencoder import AutoencoderTraining
from lightning_modules.training import augment, in_batches


class DecoderTraining(AutoencoderTraining):
    """Trains the decoder alone: the encoder stays as it is, bit for bit, and so do its features as an MPE function.

    Latent samplers ask more of a decoder than reconstruction. Its equivariance is what Equi-PSLD, Equi-ReSample and
    Equi-LatentDAPS penalise, so it is trained on latents in two poses; and the latents that samplers decode are not
    exactly an encoder's, so it sees them with noise. At the end the latents are standardised (mean 0 and deviation 1 in
    every channel, folded into the convolutions around them), which is the scale that diffusion schedules are made for.

    Args:
        autoencoder: a trained one of the KL family; its encoder is frozen.
        equivariance_weight: weight of the relative squared equivariance error of the decoder on training latents.
        latent_noise: deviation of the noise on the training latents, in units of each channel's own deviation.
        group, lr, warmup_steps, decay_steps, test_sigmas, num_pictures, export: see ``AutoencoderTraining``;
            ``test_sigmas`` are noise levels on standardised latents here.

    Raises:
        ValueError: if the autoencoder is of the VQ family, whose codes fix the scale of its latents, or the noise is
            negative.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        group: str = "hflip",
        lr: float = 5e-4,
        warmup_steps: int = 200,
        decay_steps: int = 0,
        equivariance_weight: float = 0.5,
        latent_noise: float = 0.05,
        test_sigmas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0),
        num_pictures: int = 8,
        export: str | None = None,
    ) -> None:
        super().__init__(
            autoencoder,
            group,
            lr,
            warmup_steps,
            decay_steps,
            equivariance_weight=equivariance_weight,
            test_sigmas=test_sigmas,
            num_pictures=num_pictures,
            export=export,
        )
        if autoencoder.family != "kl":
            raise ValueError(f"autoencoder: of the family {autoencoder.family}; only latents of kl can be standardised")
        if latent_noise < 0:
            raise ValueError(f"latent_noise={latent_noise} must not be negative")
        self.latent_noise = latent_noise
        autoencoder.requires_grad_(False)
        autoencoder.net.decoder.requires_grad_(True)

    def on_fit_start(self) -> None:
        self.latent_mean, self.latent_std = self._latent_statistics()

    on_test_start = on_fit_start

    @torch.no_grad()
    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (c,) of every channel of the training latents."""
        images = in_batches(self.trainer.datamodule.dataset("train"))
        z = torch.cat([self.autoencoder.encode(x.to(self.device)) for x, _ in images])
        std, mean = torch.std_mean(z, dim=(0, 2, 3))
        return mean, std

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x = augment(batch["x"], self.group)
        with torch.no_grad():
            z = self.autoencoder.encode(x).float()
        g = self.random_elements(x)
        latents = torch.cat([z, self.group.transform_features(z, g)])
        noise = self.latent_noise * self.latent_std.view(1, -1, 1, 1) * torch.randn_like(latents)
        images = self.autoencoder.decode(latents + noise).float()
        error = mse_loss(images, torch.cat([x, self.group.transform(x, g)]))
        here, moved = images.chunk(2)
        equivariance = (self.group.transform(here, g) - moved).square().mean() / x.square().mean()
        self.log_dict({"train/mse": error, "train/equivariance": equivariance}, prog_bar=True)
        return error + self.equivariance_weight * equivariance

    def on_fit_end(self) -> None:
        self.autoencoder.standardize(self.latent_mean, self.latent_std)
        super().on_fit_end()

    def probed(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor | float]:
        return self.autoencoder.decode, self.autoencoder.encode(x), self.latent_std.view(1, -1, 1, 1)
