"""Variance-preserving (DDPM) diffusion priors."""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from equireg.noise import Noise
from equireg.priors.ddim import DDIMStep
from equireg.priors.networks import UNet, as_batch
from equireg.priors.schedule import (
    BetaSchedule,
    TimeMap,
    VPSchedule,
    VPStep,
    make_betas,
    space_timesteps,
    time_of_sigma,
)
from equireg.weights import RANDOM, load_state, load_weights, read_diffusers_config, save_weights, settle

Prediction = Literal["epsilon", "sample", "v_prediction"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]


class Denoised(NamedTuple):
    """What a prior says about x_t: the denoised estimate, the noise in x_t and the ancestral log-variance."""

    x0_hat: Tensor
    eps: Tensor
    log_variance: Tensor | float


class VPPrior(nn.Module):
    """A DDPM prior x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps on [-1, 1] (Ho et al., NeurIPS 2020).

    Args:
        weights: a .safetensors file of this library, a diffusers folder (config.json beside its .safetensors), or
            "random" for untrained weights, which need ``network``.
        network: arguments of diffusers' UNet2DModel; read from ``weights`` when left out, else checked against them.
        space_to_depth: blocks of pixels folded into channels in front of the network.
        prediction: what the network was trained to predict.
        variance: variance of the ancestral step; the learned ones take the second half of the network's channels.
            Of the fixed ones the small is the better in short chains.
        num_train_timesteps: T.
        beta_schedule, beta_start, beta_end: the noise schedule of the training.
        clip: clip x0_hat to [-1, 1], inside the autograd graph (guided-diffusion's habit).
        image_by_image: the same bits in every batch, at the price of batching; see ``UNet``.

    Arguments left at None take the value of the weights file, else the defaults of guided-diffusion: ``epsilon``,
    ``fixed_large`` (``learned_range`` when the network has twice the channels), 1000 steps, linear from 1e-4 to 0.02.

    Raises:
        FileNotFoundError: if the weights are not there.
        ValueError: if they are damaged or of another architecture, or if the arguments contradict each other.
    """

    kind = "vp_prior"

    space = "pixel"

    def __init__(
        self,
        weights: str,
        network: dict[str, Any] | None = None,
        space_to_depth: int | None = None,
        prediction: Prediction | None = None,
        variance: Variance | None = None,
        num_train_timesteps: int | None = None,
        beta_schedule: BetaSchedule | None = None,
        beta_start: float | None = None,
        beta_end: float | None = None,
        clip: bool = True,
        image_by_image: bool = False,
    ) -> None:
        super().__init__()
        asked = {
            "network": network,
            "space_to_depth": space_to_depth,
            "prediction": prediction,
            "variance": variance,
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        described, state = _read(weights)
        asked = settle(asked, described, weights)
        if asked["network"] is None:
            raise ValueError("weights='random' needs the arguments of the network: network={...}")
        self._complete(UNet(asked["network"], asked["space_to_depth"] or 1, image_by_image), asked, clip)
        if "scale_factor" in described:  # of the latents that it was trained on, see LatentPrior
            self.description["scale_factor"] = described["scale_factor"]
        if state is not None:
            load_state(self.network.unet, state, weights)

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        prediction: Prediction = "epsilon",
        variance: Variance | None = None,
        num_train_timesteps: int = 1000,
        beta_schedule: BetaSchedule = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip: bool = True,
    ) -> Self:
        """A prior around your own network, called as network(x_t, t) with t (B,).

        The network tells its ``in_channels``, ``out_channels``, ``image_size`` (H, W) and ``side_divisor``, as
        ``equireg.priors.UNet`` does.
        """
        prior = cls.__new__(cls)
        nn.Module.__init__(prior)
        asked = {
            "prediction": prediction,
            "variance": variance,
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        prior._complete(network, asked, clip)
        return prior

    def _complete(self, network: nn.Module, asked: dict[str, Any], clip: bool) -> None:
        self.network = network
        learned = network.out_channels == 2 * network.in_channels
        defaults = {
            "space_to_depth": 1,
            "prediction": "epsilon",
            "variance": "learned_range" if learned else "fixed_large",
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        chosen = defaults | given
        self.prediction: Prediction = chosen["prediction"]
        self.variance: Variance = chosen["variance"]
        if not learned:
            del chosen["variance"]  # a choice of the sampler, not of the weights
        self.description = {"kind": self.kind} | chosen
        if self.variance.startswith("learned") != learned:
            raise ValueError(
                f"variance={self.variance!r} does not fit a network with {network.in_channels} channels in and "
                f"{network.out_channels} out"
            )
        self.num_train_timesteps: int = self.description["num_train_timesteps"]
        self.clip = clip
        self.autocast_dtype: torch.dtype | None = None  # set to bfloat16 by samplers that run under bf16-mixed
        betas = make_betas(
            *(self.description[k] for k in ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end"))
        )
        self.alpha_bar: np.ndarray = np.cumprod(1 - betas)  # float64, length T

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) the prior was trained for."""
        return (self.network.in_channels, *self.network.image_size)

    @property
    def image_by_image(self) -> bool:
        """Whether the images of a batch are evaluated one after the other."""
        return getattr(self.network, "image_by_image", False)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when the prior cannot take images of this (C, H, W)."""
        channels, height, width = shape
        divisor = self.network.side_divisor
        if channels != self.network.in_channels:
            raise ValueError(f"images have {channels} channels, the prior was trained on {self.network.in_channels}")
        if height % divisor or width % divisor:
            raise ValueError(f"image sides {height}x{width} must be multiples of {divisor} for this prior")

    def schedule(self, respacing: str | int) -> VPSchedule:
        """The respaced process; see ``space_timesteps`` for the forms of ``respacing``."""
        return VPSchedule(self.alpha_bar, space_timesteps(self.num_train_timesteps, respacing))

    def forward(self, x_t: Tensor, step: VPStep | DDIMStep) -> Denoised:
        """x0_hat (Tweedie), eps and log-variance (-inf in DDIM chains) at a step of a schedule; x_t is (B, C, H, W)."""
        output, v = self._split(self._run_network(x_t, as_batch(step.t, x_t)))
        x0_hat = self.tweedie(x_t, output, step.alpha_bar)
        if self.prediction == "epsilon":
            eps = output
        else:
            eps = (x_t - math.sqrt(step.alpha_bar) * x0_hat) / math.sqrt(1 - step.alpha_bar)
        if self.clip:
            x0_hat = x0_hat.clamp(-1, 1)
        return Denoised(x0_hat, eps, self._log_variance(v, step))

    def tweedie(self, x_t: Tensor, output: Tensor, alpha_bar: float) -> Tensor:
        """E[x_0 | x_t], unclipped, from the network's output at x_t."""
        if self.prediction == "epsilon":
            return math.sqrt(1 / alpha_bar) * x_t - math.sqrt(1 / alpha_bar - 1) * output
        if self.prediction == "sample":
            return output
        return math.sqrt(alpha_bar) * x_t - math.sqrt(1 - alpha_bar) * output

    def denoise(self, x: Tensor, sigma: float, time_map: TimeMap = "native") -> Tensor:
        """E[x_0 | x] at x = x_0 + sigma n, unclipped: the network as a denoiser of Karras et al. (NeurIPS 2022).

        Args:
            x: (B, C, H, W).
            sigma: noise level, in the units of x_0.
            time_map: which timestep the network is told, see ``time_of_sigma``.
        """
        t = time_of_sigma(sigma, self.alpha_bar, time_map)
        x_t = x / math.sqrt(1 + sigma**2)
        output, _ = self._split(self._run_network(x_t, as_batch(t, x)))
        if self.prediction == "epsilon":  # not through x_t, whose rounding sigma would multiply
            return x - sigma * output
        return self.tweedie(x_t, output, 1 / (1 + sigma**2))

    @torch.no_grad()
    def ancestral_step(self, x_t: Tensor, denoised: Denoised, step: VPStep, noise: Noise) -> Tensor:
        """x_{t-1} ~ p(x_{t-1} | x_t) of Ho et al., eq. 7; the last step returns its mean, which is x0_hat.

        No gradient flows through it: guidance is the gradient of x0_hat alone.
        """
        x_prev = step.c_x0 * denoised.x0_hat + step.c_xt * x_t
        if step.is_last:
            return x_prev
        half = 0.5 * denoised.log_variance
        std = half.exp() if isinstance(half, Tensor) else math.exp(half)
        return x_prev + std * noise.randn(tuple(x_t.shape[1:]), like=x_t)

    def target(self, x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
        """What the network is trained to answer at x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return x_0
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0

    def save(self, path: str | Path) -> None:
        """Writes a file that ``VPPrior(weights=path)`` reads, in half precision."""
        save_weights(path, self.network.unet.state_dict(), self.description)

    def _run_network(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.autocast_dtype is None:
            return self.network(x_t, t)
        with torch.autocast(x_t.device.type, self.autocast_dtype):
            return self.network(x_t, t).to(x_t.dtype)

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.variance.startswith("learned"):
            return output.chunk(2, dim=1)
        return output, None

    def _log_variance(self, v: Tensor | None, step: VPStep | DDIMStep) -> Tensor | float:
        if not isinstance(step, VPStep):
            return -math.inf
        if self.variance == "fixed_small":
            return step.log_beta_small
        if self.variance == "fixed_large":
            return step.log_beta_large
        if self.variance == "learned":
            return v
        fraction = (v + 1) / 2  # Nichol & Dhariwal, eq. 15; v is not clipped in the published code
        return fraction * step.log_beta + (1 - fraction) * step.log_beta_small


def _read(weights: str) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Description and tensors behind the argument ``weights``; no tensors for random ones."""
    if weights == RANDOM:
        return {}, None
    if Path(weights).is_dir():
        network = {k: v for k, v in read_diffusers_config(weights).items() if not k.startswith("_")}
        return {"network": network}, UNet2DModel.from_pretrained(weights, use_safetensors=True).state_dict()
    return load_weights(weights, VPPrior.kind)
