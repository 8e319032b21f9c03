"""Diffusion priors in sigma: fields x_0 + sigma g, with white noise or noise of function space."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from equireg.noise import Noise
from equireg.pde.equations import PDE, SIGMA_DATA, Normalizer, get_equation
from equireg.pde.random_fields import ExponentialNoise, RandomField, WhiteNoise
from equireg.priors.edm_networks import FieldUNet, SongUNet, SongUNO
from equireg.priors.schedule import SigmaStep, power_sigmas, sigma_steps
from equireg.priors.spectral import SpectralDenoiser
from equireg.weights import RANDOM, load_state, load_weights, save_weights, settle

Architecture = Literal["FieldUNet", "SongUNO", "SongUNet"]
NoiseKind = Literal["exponential", "white"]

ARCHITECTURES: dict[str, type[nn.Module]] = {"FieldUNet": FieldUNet, "SongUNO": SongUNO, "SongUNet": SongUNet}


class EDMPrior(nn.Module):
    """A prior on two-channel fields x = (a, u), preconditioned as in EDM (Karras et al., NeurIPS 2022, Table 1).

    The chain runs on normalised fields (standard deviation 0.5 per channel): x_sigma = x_0 + sigma g with g of unit
    variance, white (EDM, DiffusionPDE) or a Gaussian random field (FunDPS). D(x, sigma) = c_skip x + c_out F(c_in x,
    ln(sigma) / 4); a ``FieldUNet`` with a linear denoiser has its estimate in the place of c_skip x, and its error in
    that of c_out. The network computes in float32 whatever the dtype of x.

    Args:
        weights: a .safetensors file of this library, or "random" for untrained weights, which need ``network``.
        pde: the equation whose fields these are.
        architecture: class of the network: ``FieldUNet``, ``SongUNO`` (FunDPS) or ``SongUNet`` (DiffusionPDE).
        network: arguments of that class.
        mean, std: of the channels in physical units, so that x_norm = (x - mean) 0.5 / std.
        noise: the law of g: ``exponential`` (the one of FunDPS, see ``ExponentialNoise``) or ``white``.
        noise_scale: length of the exponential noise, the published code's ``rbf_scale``.
        sigma_data: standard deviation that the preconditioning assumes.
        sigma_min, sigma_max: noise levels the network was made for; samplers stay between them.

    Arguments left at None take the value of the weights file, else: the published constants of ``pde``, ``FieldUNet``,
    exponential noise of scale 0.05, sigma_data 0.5, all levels.

    Raises:
        FileNotFoundError: if the weights are not there.
        ValueError: if they are damaged or of another architecture, or if an argument is out of range or contradicts
            them.
    """

    kind = "edm_prior"

    space = "field"

    def __init__(
        self,
        weights: str,
        pde: PDE | None = None,
        architecture: Architecture | None = None,
        network: dict[str, Any] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        noise: NoiseKind | None = None,
        noise_scale: float | None = None,
        sigma_data: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        super().__init__()
        asked = {
            "pde": pde,
            "architecture": architecture,
            "network": network,
            "mean": mean,
            "std": std,
            "noise": noise,
            "noise_scale": noise_scale,
            "sigma_data": sigma_data,
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
        }
        described, state = ({}, None) if weights == RANDOM else load_weights(weights, self.kind)
        asked = settle(asked, described, weights)
        if asked["network"] is None:
            raise ValueError("weights='random' needs the arguments of the network: network={...}")
        name = asked["architecture"] or "FieldUNet"
        if name not in ARCHITECTURES:
            raise ValueError(f"architecture={name!r} is unknown; available: {', '.join(ARCHITECTURES)}")
        try:
            network_module = ARCHITECTURES[name](**asked["network"])
        except TypeError as error:
            raise ValueError(f"network: {error}") from error
        self._complete(network_module, asked | {"architecture": name})
        if state is not None:
            if isinstance(self.network, SongUNO):
                self.network.adopt_ranks(state)
            load_state(self.network, state, weights)

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        pde: PDE | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        noise: NoiseKind = "exponential",
        noise_scale: float = 0.05,
        sigma_data: float = SIGMA_DATA,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ) -> Self:
        """A prior around your own network, called as network(x, c_noise) with c_noise (B,).

        The network tells its ``in_channels``, ``image_size`` (H, W) and ``side_divisor``, as ``FieldUNet`` does.
        """
        prior = cls.__new__(cls)
        nn.Module.__init__(prior)
        asked = {"pde": pde, "mean": mean, "std": std, "noise": noise, "noise_scale": noise_scale}
        prior._complete(network, asked | {"sigma_data": sigma_data, "sigma_min": sigma_min, "sigma_max": sigma_max})
        return prior

    def _complete(self, network: nn.Module, asked: dict[str, Any]) -> None:
        self.network = network
        pde = asked["pde"]
        constants = {} if pde is None else {"mean": get_equation(pde).mean, "std": get_equation(pde).std}
        defaults = {"noise": "exponential", "noise_scale": 0.05, "sigma_data": SIGMA_DATA, "sigma_min": 0.0}
        chosen = constants | defaults | {name: value for name, value in asked.items() if value is not None}
        if "mean" not in chosen or "std" not in chosen:
            raise ValueError("mean and std of the fields are needed where pde is not given")
        if chosen["noise"] not in ("exponential", "white"):
            raise ValueError(f"noise={chosen['noise']!r} must be 'exponential' or 'white'")
        if not chosen["sigma_data"] > 0:
            raise ValueError(f"sigma_data={chosen['sigma_data']} must be positive")
        chosen |= {name: list(map(float, chosen[name])) for name in ("mean", "std")}
        self.pde: PDE | None = pde
        self.normalizer = Normalizer(chosen["mean"], chosen["std"])
        exponential = chosen["noise"] == "exponential"
        self.noise: RandomField = ExponentialNoise(chosen["noise_scale"]) if exponential else WhiteNoise()
        self.sigma_data: float = chosen["sigma_data"]
        self.sigma_min: float = chosen["sigma_min"]
        self.sigma_max: float = chosen.get("sigma_max", math.inf)
        self.autocast_dtype: torch.dtype | None = None  # set to bfloat16 by samplers that run under bf16-mixed
        self.description = {"kind": self.kind} | {k: v for k, v in chosen.items() if v != math.inf}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) the prior was trained for."""
        return (self.network.in_channels, *self.network.image_size)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when the prior cannot take fields of this (C, H, W)."""
        channels, height, width = shape
        divisor = self.network.side_divisor
        if channels != self.network.in_channels:
            raise ValueError(f"fields have {channels} channels, the prior was trained on {self.network.in_channels}")
        if height % divisor or width % divisor:
            raise ValueError(f"field sides {height}x{width} must be multiples of {divisor} for this prior")
        if self.linear is not None and (height, width) != self.network.image_size:
            raise ValueError(
                f"fields are {height}x{width}, the prior's linear denoiser is for {self.linear.side} a side"
            )

    def check_equation(self, pde: str | None) -> None:
        """Raises ValueError when fields of this equation are not what the prior is about."""
        if None not in (pde, self.pde) and pde != self.pde:
            raise ValueError(f"the prior is on fields of {self.pde}, the data are of {pde}")

    def normalize(self, x: Tensor) -> Tensor:
        """Fields (B, 2, H, W) from physical units to those of the chain."""
        return self.normalizer.normalize(x)

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of ``normalize``."""
        return self.normalizer.denormalize(x)

    def steps(
        self, num_steps: int, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
    ) -> list[SigmaStep]:
        """The steps through ``num_steps`` noise levels (Karras et al., eq. 5) and to 0; levels the prior can take.

        Raises:
            ValueError: if ``num_steps`` is below 2, or the levels are not ordered.
        """
        if num_steps < 2:
            raise ValueError(f"num_steps={num_steps} must be at least 2")
        first, last = min(sigma_max, self.sigma_max), max(sigma_min, self.sigma_min)
        if not 0 < last < first < math.inf:
            raise ValueError(f"noise levels must fall from sigma_max={first} to sigma_min={last}, both positive")
        return sigma_steps([*power_sigmas(first, last, num_steps, rho), 0.0])

    def draw_noise(self, noise: Noise, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """g (B, *shape) of unit variance, drawn in float32, in ``like``'s dtype."""
        with torch.autocast(like.device.type, enabled=False):
            return self.noise.draw(noise, shape, like.float()).to(like)

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """D(x, sigma), the estimate of x_0 from normalised fields x = x_0 + sigma g.

        Args:
            x: (B, 2, H, W), of any floating dtype; the result has the same.
            sigma: noise level, or one per field (B,).
        """
        parameter = next(self.network.parameters(), None)
        dtype = torch.float32 if parameter is None or parameter.is_complex() else parameter.dtype
        noisy = x.to(dtype)
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).expand(len(x))
        variance = (self.sigma_data**2 + sigma**2).view(-1, 1, 1, 1)
        known, inputs = self.sigma_data**2 / variance * noisy, noisy / variance.sqrt()  # c_skip x, c_in x
        if self.linear is not None:
            known = self.linear(noisy, sigma)
            inputs = torch.cat([inputs, known / self.sigma_data], 1)
        output = self._run_network(inputs, sigma.log() / 4)
        return (known + self.c_out(sigma).view(-1, 1, 1, 1) * output).to(x.dtype)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Size (B,) of what the network has to add at noise levels sigma (B,)."""
        if self.linear is not None:
            return self.linear.error(sigma)
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    @property
    def linear(self) -> SpectralDenoiser | None:
        """The linear denoiser that the network corrects, where it has one."""
        return getattr(self.network, "linear", None)

    def covariance_between(self, positions: Tensor, sigma: float) -> Tensor:
        """Cov[x_0 | x_0 + sigma g] (B, m, m) at ``positions`` (B, m), as far as it is known without the network.

        That of the linear denoiser where there is one, else that of independent normals of variance sigma_data^2.
        float64, of normalised fields.
        """
        if self.linear is not None:
            return self.linear.covariance_between(positions, sigma)
        count = positions.shape[1]
        identity = torch.eye(count, dtype=torch.float64, device=positions.device)
        variance = (sigma * self.sigma_data) ** 2 / (sigma**2 + self.sigma_data**2)
        return (variance * identity).expand(len(positions), count, count)

    def heun_step(
        self, x: Tensor, step: SigmaStep, denoise: Callable[[Tensor, float], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state at sigma_next and the last denoised field on the way to it (Karras et al., Alg. 1).

        Both depend on x through two network calls; a step to 0 is Euler's and has one.

        Args:
            x: the state at sigma.
            step: where it goes.
            denoise: called as denoise(x, sigma) in the place of ``self.denoise``.
        """
        denoise = denoise or self.denoise
        sigma, sigma_next = step.sigma, step.sigma_next
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            return x_next, denoised
        denoised = denoise(x_next, sigma_next)
        slope_next = (x_next - denoised) / sigma_next
        return x + (sigma_next - sigma) * (slope + slope_next) / 2, denoised

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """What makes the squared errors of all noise levels comparable (B,)."""
        return 1 / self.c_out(sigma) ** 2

    def save(self, path: str | Path, half: bool = True) -> None:
        """Writes a file that ``EDMPrior(weights=path)`` reads."""
        save_weights(path, self.network.state_dict(), self.description, half)

    def _run_network(self, x: Tensor, c_noise: Tensor) -> Tensor:
        if self.autocast_dtype is None:
            return self.network(x, c_noise)
        with torch.autocast(x.device.type, self.autocast_dtype):
            return self.network(x, c_noise).to(x.dtype)
