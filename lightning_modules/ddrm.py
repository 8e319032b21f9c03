"""Denoising diffusion restoration models."""

import math

import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.operators import LinearOperator
from equireg.priors import VPPrior, VPSchedule
from lightning_modules.base import PosteriorSampler


class DDRM(PosteriorSampler):
    """Denoising diffusion restoration (Kawar et al., NeurIPS 2022, eqs. 7 and 8; arXiv 2201.11793).

    A variational chain in the singular basis of A: every coefficient of V^T x is updated by how well the measurement
    knows it at this noise level. Bars denote coefficients, ``x0_bar`` = V^T x0_hat. No gradient is taken; with the
    callback EquiReg x0_hat makes one gradient step on the penalty before it is split, and the noise estimate stays the
    network's.

    Args:
        prior: a pixel-space VP prior; its x0_hat is used unclipped.
        operator: a linear operator with a singular value decomposition.
        num_steps: T steps; the timesteps are 0, k, 2k, ... with k = 1000 // T, as in the published code.
        eta: share of fresh noise in coefficients that the measurement does not know, in [0, 1].
        eta_b: weight of the measurement in coefficients that it knows better than the chain, in [0, 1].
        svd_threshold: singular values (of the one-dimensional factors where A is separable) below it count as not
            measured; without noise nothing else keeps y / s bounded.
        seed: see ``PosteriorSampler``.

    Cost per step: one forward of the prior and four products with V.

    Raises:
        ValueError: if an argument is out of range.
    """

    linear_only = True
    needs_svd = True
    uses_sigma_y = True
    differentiates_prior = False

    def __init__(
        self,
        prior: VPPrior,
        operator: LinearOperator,
        num_steps: int = 20,
        eta: float = 0.85,
        eta_b: float = 1.0,
        svd_threshold: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, seed)
        if not 1 <= num_steps <= prior.num_train_timesteps:
            raise ValueError(f"num_steps={num_steps} must be between 1 and {prior.num_train_timesteps}")
        for name, value in (("eta", eta), ("eta_b", eta_b)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be in [0, 1]")
        if not svd_threshold >= 0:
            raise ValueError(f"svd_threshold={svd_threshold} must not be negative")
        stride = prior.num_train_timesteps // num_steps
        self.steps = list(VPSchedule(prior.alpha_bar, list(range(0, prior.num_train_timesteps, stride))))
        self.eta = eta
        self.eta_b = eta_b
        self.svd_threshold = svd_threshold

    @torch.no_grad()
    def sample(self, y: Tensor, operator: LinearOperator, noise: Noise) -> Tensor:
        svd = operator.svd(operator.image_shape, self.svd_threshold)
        s, present = svd.singular_values.to(y), svd.present.to(y.device)
        sigma_0 = operator.noise_std(y)[:, None]
        y_bar = svd.Ut(y)
        y_over_s = y_bar / torch.where(s > 0, s, 1)
        noise_over_s = sigma_0 / torch.where(s > 0, s, 1)

        sigma = noise_level(self.steps[0].alpha_bar)
        n = noise.randn(operator.image_shape, like=y).flatten(1)
        known = present & (s * sigma > sigma_0)
        spread = (sigma**2 - noise_over_s.square()).clamp(min=0).sqrt()
        x_t = svd.V(torch.where(known, y_over_s + spread * n, sigma * n)) / sigma
        for step in self.steps:
            eps = self.prior(x_t, step).eps
            x0_hat = (x_t - math.sqrt(1 - step.alpha_bar) * eps) / math.sqrt(step.alpha_bar)
            x0_hat = self.penalty_step(x0_hat, step)
            x0_bar, eps_bar = svd.Vt(x0_hat), svd.Vt(eps)
            n = noise.randn(operator.image_shape, like=y).flatten(1)
            sigma = noise_level(step.alpha_bar_prev)

            known = present & (s * sigma > sigma_0)
            blurred = present & (s * sigma < sigma_0)  # measured, but less well than the chain knows it already
            direction = torch.where(blurred, (y_bar - s * x0_bar) / torch.where(sigma_0 > 0, sigma_0, 1), eps_bar)
            unknown = x0_bar + sigma * (math.sqrt(1 - self.eta**2) * direction + self.eta * n)
            spread = (sigma**2 - (self.eta_b * noise_over_s).square()).clamp(min=0).sqrt()
            x_bar = torch.where(known, self.eta_b * y_over_s + (1 - self.eta_b) * x0_bar + spread * n, unknown)
            x_t = math.sqrt(step.alpha_bar_prev) * svd.V(x_bar)
            self.emit(step, x0_hat)
        return x_t


def noise_level(alpha_bar: float) -> float:
    """sigma = sqrt((1 - alpha_bar) / alpha_bar) of x_t / sqrt(alpha_bar)."""
    return math.sqrt((1 - alpha_bar) / alpha_bar)
