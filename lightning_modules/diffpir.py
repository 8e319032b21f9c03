"""Plug-and-play image restoration with a diffusion denoiser."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.operators import CircularBlur, Inpainting, LinearOperator, Operator, OperatorSVD, conjugate_gradients
from equireg.priors import VPPrior, VPSchedule
from lightning_modules.base import PosteriorSampler, has_svd

SMALLEST_SIGMA = 1e-3
"""Floor of the noise level, in units of [0, 1] images."""

CG_ITERATIONS = 20
"""Where rho is so small that more would be needed, they would fit the noise, and magnify rounding."""

CG_TOLERANCE = 1e-5

Correction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(y, x0_hat, rho (B, 1, 1, 1)) -> what the data sub-problem adds to x0_hat."""


class DiffPIR(PosteriorSampler):
    """Plug-and-play restoration with a diffusion denoiser (Zhu et al., CVPRW 2023, Alg. 1; arXiv 2305.08995).

    Each step denoises, solves the data sub-problem argmin_z ||y - A z||^2 + rho_t ||z - x0_hat||^2, and noises the
    solution to the next level. With rho_t = lam sigma_n^2 / sigma_t^2, sigma_n is the noise in units of [0, 1] images,
    half of the operator's sigma_y, and sigma_t the noise level of the step in units of [-1, 1]; the factor between the
    two belongs to lam, as in the published code. No gradient is taken, except for nonlinear operators; with the
    callback EquiReg x0_hat makes one gradient step on the penalty after the data sub-problem.

    The sub-problem is solved exactly: in Fourier space for ``CircularBlur`` (the published operators), in the singular
    basis where the operator has one, by up to 20 conjugate gradient steps from x0_hat for other linear operators. For
    nonlinear ones it is one gradient step of size 1 / (rho_t + lipschitz).

    Args:
        prior: a pixel-space VP prior.
        operator: any differentiable operator.
        num_steps: N, of which the last one makes no update.
        lam: weight of the prior in the sub-problem.
        zeta: share of fresh noise in [0, 1]; the rest is the noise estimate.
        eta: share of ancestral noise within the noise estimate, in [0, 1].
        skip_type: spacing of the timesteps, ``quad`` (dense at low noise) or ``uniform`` (which has N + 1).
        guidance_scale: how far to go towards the solution of the sub-problem.
        lipschitz: bound on the squared norm of the derivative of a nonlinear operator. The published step is that of 0
            and diverges for the small rho_t of high noise levels. ``HighDynamicRange``: its scale squared;
            ``PhaseRetrieval``: 1/4, since it measures (x + 1) / 2.
        return_x0: return the last x0_hat, for one more network evaluation; the published code returns x_0, which still
            carries noise of standard deviation sqrt(1 - alpha_bar_0) = 0.01.
        paste_known: put the measured pixels into the result (inpainting).
        seed: see ``PosteriorSampler``.

    Cost per step: one forward of the prior, and the data sub-problem.

    Raises:
        ValueError: if an argument is out of range.
    """

    uses_sigma_y = True
    differentiates_prior = False

    def __init__(
        self,
        prior: VPPrior,
        operator: Operator,
        num_steps: int = 100,
        lam: float = 7.0,
        zeta: float = 0.3,
        eta: float = 0.0,
        skip_type: Literal["quad", "uniform"] = "quad",
        guidance_scale: float = 1.0,
        lipschitz: float = 1.0,
        return_x0: bool = False,
        paste_known: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, seed)
        if not lam > 0:
            raise ValueError(f"lam={lam} must be positive")
        for name, value in (("zeta", zeta), ("eta", eta)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be in [0, 1]")
        if not lipschitz >= 0:
            raise ValueError(f"lipschitz={lipschitz} must not be negative")
        if paste_known and not isinstance(operator, Inpainting):
            raise ValueError(f"paste_known needs an inpainting operator, got {type(operator).__name__}")
        timesteps = skipped_timesteps(prior.num_train_timesteps, num_steps, skip_type)
        self.steps = list(VPSchedule(prior.alpha_bar, timesteps))
        self.lam = lam
        self.zeta = zeta
        self.eta = eta
        self.guidance_scale = guidance_scale
        self.lipschitz = lipschitz
        self.return_x0 = return_x0
        self.paste_known = paste_known

    @classmethod
    def is_extension(cls, operator: Operator) -> bool:
        return not (isinstance(operator, CircularBlur) or has_svd(operator))

    @torch.no_grad()
    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        correction = self.correction(operator)
        sigma_n = (operator.noise_std(y) / 2).clamp(min=SMALLEST_SIGMA).view(-1, 1, 1, 1)
        x_t = self.initial_state(y, operator, noise)
        for step in self.steps[:-1]:
            x0_hat = self.prior(x_t, step).x0_hat  # Alg. 1, line 3
            rho = self.lam * sigma_n.square() * step.alpha_bar / (1 - step.alpha_bar)
            x0_hat = x0_hat + self.guidance_scale * correction(y, x0_hat, rho)  # line 4
            x0_hat = self.penalty_step(x0_hat, step)
            eps = (x_t - math.sqrt(step.alpha_bar) * x0_hat) / math.sqrt(1 - step.alpha_bar)  # line 5

            variance = 1 - step.alpha_bar_prev
            beta = 1 - self.prior.alpha_bar[step.t] / self.prior.alpha_bar[step.t - 1]
            eta = self.eta * math.sqrt(variance / (1 - step.alpha_bar) * beta)
            shape = tuple(x_t.shape[1:])
            eps = math.sqrt(variance - eta**2) * eps + eta * noise.randn(shape, like=y)
            fresh = math.sqrt(variance) * noise.randn(shape, like=y)
            x_t = math.sqrt(step.alpha_bar_prev) * x0_hat  # line 6
            x_t = x_t + math.sqrt(1 - self.zeta) * eps + math.sqrt(self.zeta) * fresh
            self.emit(step, x0_hat)
        x_0 = self.prior(x_t, self.steps[-1]).x0_hat if self.return_x0 else x_t
        self.emit(self.steps[-1], x_0)
        return x_0 + operator.adjoint(y - x_0) if self.paste_known else x_0

    def initial_state(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        """x_T: the plain picture, noised to the first level for what noise it already has (B, C, H, W)."""
        alpha_bar = self.steps[0].alpha_bar
        alpha_bar_y = y.new_ones(len(y), 1, 1, 1)
        if tuple(y.shape[1:]) == operator.image_shape:
            levels = torch.from_numpy(np.sqrt(1 / self.prior.alpha_bar - 1))
            nearest = (levels - operator.noise_std(y).cpu().double()[:, None]).abs().argmin(1)
            alpha_bar_y = torch.from_numpy(self.prior.alpha_bar)[nearest].to(y).view(-1, 1, 1, 1)
            picture = operator(y + 1) - 1 if isinstance(operator, Inpainting) else y  # the masked pixels are black
        elif operator.has_baseline:
            picture = operator.baseline(y, operator.image_shape)
        else:
            picture = 0  # at the highest level there is next to nothing but noise anyway
        scale = (alpha_bar / alpha_bar_y).sqrt()
        std = (1 - alpha_bar - scale.square() * (1 - alpha_bar_y)).clamp(min=0).sqrt()
        return scale * picture + std * noise.randn(operator.image_shape, like=y)

    def correction(self, operator: Operator) -> Correction:
        """The solution of the data sub-problem minus x0_hat; A^T (A A^T + rho I)^-1 (y - A x0_hat) for linear A."""
        if isinstance(operator, CircularBlur):
            return lambda y, x, rho: operator.pinv(y - operator(x), ridge=rho)
        if has_svd(operator):
            svd = operator.svd(operator.image_shape)
            return lambda y, x, rho: _spectral(svd, y - operator(x), rho)
        if isinstance(operator, LinearOperator):
            return lambda y, x, rho: _iterative(operator, y - operator(x), rho)
        return lambda y, x, rho: -_misfit_gradient(operator, y, x) / (rho + self.lipschitz)


def skipped_timesteps(num_train_timesteps: int, num_steps: int, skip_type: Literal["quad", "uniform"]) -> list[int]:
    """DiffPIR's timesteps, ascending, both ends included.

    Raises:
        ValueError: if ``num_steps`` is below 2 or repeats timesteps.
    """
    if skip_type == "quad":
        spaced = np.sqrt(np.linspace(0, num_train_timesteps**2, num_steps)).astype(int).tolist()
        skipped = [*spaced[:-1], num_train_timesteps - 1]
    else:
        stride = num_train_timesteps // num_steps if num_steps > 0 else 0
        skipped = [*range(0, stride * num_steps, max(stride, 1)), num_train_timesteps - 1]
    if num_steps < 2 or len(set(skipped)) < len(skipped):
        raise ValueError(
            f"num_steps={num_steps} must be at least 2 and not repeat one of {num_train_timesteps} timesteps with "
            f"skip_type={skip_type!r}"
        )
    return sorted(num_train_timesteps - 1 - q for q in skipped)


def _spectral(svd: OperatorSVD, residual: Tensor, rho: Tensor) -> Tensor:
    s = svd.singular_values.to(residual)
    return svd.V(s / (s.square() + rho.flatten(1)) * svd.Ut(residual))


def _iterative(operator: LinearOperator, residual: Tensor, rho: Tensor) -> Tensor:
    """(A^T A + rho I)^-1 A^T of the residual, or what a few steps reach of it."""
    solution, _ = conjugate_gradients(
        lambda z: operator.adjoint(operator(z)) + rho * z, operator.adjoint(residual), CG_TOLERANCE, CG_ITERATIONS
    )
    return solution


def _misfit_gradient(operator: Operator, y: Tensor, x: Tensor) -> Tensor:
    """Gradient of ||y - A(x)||^2 / 2."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad((y - operator(x)).square().sum() / 2, x)[0]
