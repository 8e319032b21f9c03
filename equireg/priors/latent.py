"""Latent diffusion priors: a diffusion prior on the codes of an autoencoder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from equireg.autoencoder import Autoencoder
from equireg.noise import Noise
from equireg.priors.ddim import DDIMStep
from equireg.priors.schedule import TimeMap, VPSchedule, VPStep
from equireg.priors.vp import Denoised, VPPrior
from equireg.weights import save_weights


class LatentPrior(nn.Module):
    """A VP prior on latents z = s E(x) (Rombach et al., CVPR 2022), with its encoder and its decoder x = D(z / s).

    It answers everything a ``VPPrior`` does, of latents z in the units its network was trained in. Images are in
    [-1, 1]; D is not clamped, so its images may leave that range a little.

    Args:
        prior: the prior on latents. Its clipping to [-1, 1] is switched off: latents have no bounds.
        autoencoder: the first stage; frozen. Any module with ``encode``, ``decode``, ``check_shape`` and the attributes
            ``family``, ``channels``, ``latent_channels``, ``factor`` and ``scale_factor`` will do; for posterior
            samples of the KL family also ``sample``.
        scale_factor: s. Left at None: what is recorded with the prior's weights, else the autoencoder's own.
        quantize: snap a latent to the nearest codes before it is decoded, with straight-through gradients; what the
            published samplers do with VQ autoencoders, hence the default there.
        enlarge: images are enlarged so many times before they are encoded, by repeating pixels, and reduced after they
            were decoded, by averaging, which commutes with flips and turns: 2 lets Stable Diffusion, made for 512
            pixels, restore images of 256.

    Raises:
        ValueError: if prior and autoencoder do not fit, a number is out of range, ``scale_factor`` contradicts the
            prior's weights, or ``quantize`` is asked of an autoencoder without codes.
    """

    space = "latent"

    def __init__(
        self,
        prior: VPPrior,
        autoencoder: Autoencoder,
        scale_factor: float | None = None,
        quantize: bool | None = None,
        enlarge: int = 1,
    ) -> None:
        super().__init__()
        if prior.image_shape[0] != autoencoder.latent_channels:
            raise ValueError(
                f"autoencoder: its latents have {autoencoder.latent_channels} channels, the prior was trained on "
                f"{prior.image_shape[0]}"
            )
        if scale_factor is not None and not scale_factor > 0:
            raise ValueError(f"scale_factor={scale_factor} must be positive")
        if enlarge < 1 or autoencoder.factor % enlarge:
            raise ValueError(f"enlarge={enlarge} must be positive and divide the autoencoder's {autoencoder.factor}")
        if quantize and autoencoder.family != "vq":
            raise ValueError(f"quantize=true needs an autoencoder of the family vq, this one is {autoencoder.family}")
        recorded = getattr(prior, "description", {}).get("scale_factor")
        if None not in (scale_factor, recorded) and scale_factor != recorded:
            raise ValueError(f"scale_factor={scale_factor} contradicts the prior's weights, trained with {recorded}")
        self.prior = prior
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        chosen = (scale_factor, recorded, autoencoder.scale_factor)
        self.scale_factor: float = next(value for value in chosen if value is not None)
        self.quantize = autoencoder.family == "vq" if quantize is None else quantize
        self.enlarge = enlarge
        prior.clip = False
        self.encoder = Pass(self._encode)
        self.decoder = Pass(self._decode)

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Latents z = s E(x) (B, c, h, w) of images x (B, C, H, W), differentiable.

        E is the mean of a KL encoder, the output of a VQ encoder before it is quantised.

        Args:
            x: images in [-1, 1].
            noise: draw E(x) from the KL encoder's Gaussian instead; one latent-shaped draw, none for VQ.
        """
        return self.encoder(x, noise)

    def decode(self, z: Tensor) -> Tensor:
        """Images D(z / s) (B, C, H, W) of latents z (B, c, h, w), differentiable, not clamped."""
        return self.decoder(z)

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """(c, h, w) of the latent of an image of this (C, H, W)."""
        _, height, width = image_shape
        return (self.autoencoder.latent_channels, height // self.factor, width // self.factor)

    @property
    def factor(self) -> int:
        """Side of the image pixels behind one latent pixel."""
        return self.autoencoder.factor // self.enlarge

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images whose latents the prior was trained on."""
        _, height, width = self.prior.image_shape
        return (self.autoencoder.channels, height * self.factor, width * self.factor)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when the autoencoder cannot take images of this (C, H, W), or the prior their latents."""
        channels, height, width = shape
        self.autoencoder.check_shape((channels, height * self.enlarge, width * self.enlarge))
        try:
            self.prior.check_shape(self.latent_shape(shape))
        except ValueError as error:
            raise ValueError(f"the latents of images of {height}x{width} pixels do not fit: {error}") from error

    @property
    def network(self) -> nn.Module:
        """The denoising network."""
        return self.prior.network

    @property
    def description(self) -> dict[str, Any]:
        """What the weight file of the prior says about it, scale factor included."""
        return self.prior.description | {"scale_factor": self.scale_factor}

    @property
    def num_train_timesteps(self) -> int:
        return self.prior.num_train_timesteps

    @property
    def alpha_bar(self) -> np.ndarray:
        """Cumulative products of the prior's schedule, float64, length T."""
        return self.prior.alpha_bar

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Type that the denoising network and the autoencoder compute in; None for that of their weights."""
        return self.prior.autocast_dtype

    @autocast_dtype.setter
    def autocast_dtype(self, dtype: torch.dtype | None) -> None:
        self.prior.autocast_dtype = dtype

    def schedule(self, respacing: str | int) -> VPSchedule:
        """The respaced process of the latents."""
        return self.prior.schedule(respacing)

    def forward(self, z_t: Tensor, step: VPStep | DDIMStep) -> Denoised:
        """The denoised latent, the noise and the log-variance at a step of the schedule."""
        return self.prior(z_t, step)

    def tweedie(self, z_t: Tensor, output: Tensor, alpha_bar: float) -> Tensor:
        """E[z_0 | z_t] from the network's output at z_t."""
        return self.prior.tweedie(z_t, output, alpha_bar)

    def denoise(self, z: Tensor, sigma: float, time_map: TimeMap = "native") -> Tensor:
        """E[z_0 | z] at z = z_0 + sigma n, see ``VPPrior.denoise``."""
        return self.prior.denoise(z, sigma, time_map)

    def ancestral_step(self, z_t: Tensor, denoised: Denoised, step: VPStep, noise: Noise) -> Tensor:
        """z_{t-1} ~ p(z_{t-1} | z_t)."""
        return self.prior.ancestral_step(z_t, denoised, step, noise)

    def target(self, z_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
        """What the network is trained to answer, see ``VPPrior.target``."""
        return self.prior.target(z_0, eps, alpha_bar)

    def save(self, path: str | Path) -> None:
        """Writes the prior, scale factor included, as a file that ``VPPrior(weights=path)`` reads."""
        save_weights(path, self.network.unet.state_dict(), self.description)

    def _encode(self, x: Tensor, noise: Noise | None) -> Tensor:
        with self._autocast(x):
            if self.enlarge > 1:
                x = interpolate(x, scale_factor=self.enlarge, mode="nearest")
            if noise is None or self.autoencoder.family == "vq":
                z = self.autoencoder.encode(x)
            else:
                z = self.autoencoder.sample(x, noise)
        return self.scale_factor * z.to(x.dtype)

    def _decode(self, z: Tensor) -> Tensor:
        with self._autocast(z):
            options = {} if self.autoencoder.family == "kl" or self.quantize else {"quantize": False}
            x = self.autoencoder.decode(z / self.scale_factor, **options).to(z.dtype)
        return x if self.enlarge == 1 else avg_pool2d(x, self.enlarge)

    def _autocast(self, like: Tensor) -> torch.autocast:
        """bfloat16 has float32's range, so that small gradients pass; images and latents keep their own type."""
        return torch.autocast(like.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


class Pass(nn.Module):
    """A function as a module of its own, so that hooks see its forward and backward passes."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs)
