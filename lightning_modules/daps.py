"""Decoupled annealing posterior sampling."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Operator
from equireg.priors import SigmaStep, TimeMap, VPPrior, power_sigmas, sigma_steps
from lightning_modules.base import PosteriorSampler

PriorSolver = Literal["gaussian", "score_t", "score_min", "exact"]

SCORE_SIGMA = 0.01
"""Noise level at which ``score_min`` and ``exact`` take the score of a clean image."""


class DAPS(PosteriorSampler):
    """Decoupled annealing posterior sampling (Zhang et al., CVPR 2025, Alg. 1; arXiv 2407.01521).

    States are x_t = x0 + sigma n. A step leaves the noise level sigma_i for clean images, first x0_hat by the
    probability flow of the prior, then x0 ~ p(x0 | x_t, y) by Markov chain Monte Carlo, and returns to sigma_{i+1} with
    fresh noise. The penalty of Equi-DAPS is a gradient step of its own on x0, after the chain (callback
    EquiReg).

    An image whose chain diverges starts again from zero at the next noise level, as in the published code, but alone
    and with a warning; in the last step it stays NaN.

    Args:
        prior: a pixel-space VP prior.
        operator: any differentiable operator.
        num_steps: noise levels S.
        sigma_max, sigma_min: the levels are the first S of S + 1 from one to the other (rho = 7), then 0.
        ode_steps: Euler steps N of the probability flow, from sigma_i to ``ode_sigma_min``.
        ode_sigma_min: where the flow ends; its end is not denoised further.
        mcmc_steps: steps K of the inner chain.
        eta: step size of the inner chain at the first noise level.
        eta_min_ratio: the step size falls linearly and would be ``eta * eta_min_ratio`` one level after the last.
        momentum: 0 for Langevin dynamics; the share of the velocity that Hamiltonian Monte Carlo keeps otherwise.
        tau: standard deviation of the measurement noise that the chain assumes; not sigma_y.
        likelihood_scale: the chain climbs -likelihood_scale ||A(x) - y||^2 / tau^2: 1 as published, 0.5 for the
            logarithm of the Gaussian likelihood of standard deviation tau.
        prior_solver: score of p(x0 | x_t) at x in the chain: ``gaussian`` (x0_hat - x) / sigma^2, or
            (x_t - x) / sigma^2 plus the prior's score at x_t (``score_t``), at x0_hat (``score_min``) or at x itself
            (``exact``, nothing is approximated; docs/closed_form.md compares it with ``gaussian``).
        time_map: timestep that the network is told, see ``time_of_sigma``.
        seed: see ``PosteriorSampler``.

    Cost per step: N forward passes of the prior, one more with ``score_t`` and ``score_min``, K more with ``exact``;
    K forward and backward passes of the operator.

    Raises:
        ValueError: if a step count, a noise level or a step size is out of range.
    """

    differentiates_prior = False
    takes_state_grad = True

    def __init__(
        self,
        prior: VPPrior,
        operator: Operator,
        num_steps: int = 200,
        sigma_max: float = 100.0,
        sigma_min: float = 0.1,
        ode_steps: int = 5,
        ode_sigma_min: float = 0.01,
        mcmc_steps: int = 100,
        eta: float = 1e-4,
        eta_min_ratio: float = 0.01,
        momentum: float = 0.0,
        tau: float = 0.01,
        likelihood_scale: float = 1.0,
        prior_solver: PriorSolver = "gaussian",
        time_map: TimeMap = "vp_linear",
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, seed)
        for name, count in {"num_steps": num_steps, "ode_steps": ode_steps, "mcmc_steps": mcmc_steps}.items():
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        for name, value in {"eta": eta, "tau": tau, "likelihood_scale": likelihood_scale}.items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if not 0 < ode_sigma_min < sigma_min < sigma_max:
            raise ValueError(
                f"0 < ode_sigma_min={ode_sigma_min} < sigma_min={sigma_min} < sigma_max={sigma_max} does not hold"
            )
        if not 0 < eta_min_ratio <= 1:
            raise ValueError(f"eta_min_ratio={eta_min_ratio} must be above 0 and at most 1")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be at least 0 and below 1")
        levels = power_sigmas(sigma_max, sigma_min, num_steps + 1)[:-1]
        self.steps = sigma_steps([*(float(np.float32(level)) for level in levels), 0.0])
        self.ode_steps = ode_steps
        self.ode_sigma_min = ode_sigma_min
        self.mcmc_steps = mcmc_steps
        self.eta = eta
        self.eta_min_ratio = eta_min_ratio
        self.momentum = momentum
        self.tau = tau
        self.likelihood_scale = likelihood_scale
        self.prior_solver: PriorSolver = prior_solver
        self.time_map: TimeMap = time_map

    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        shape = self.state_shape(operator)
        x_t = self.steps[0].sigma * noise.randn(shape, like=y)
        for step in self.steps:
            x0_hat = self.probability_flow(x_t, step.sigma)  # Alg. 1, line 4
            x0 = self.inner_chain(x0_hat, x_t, y, operator, step, noise)  # lines 5 to 7
            x0 = self.restart_diverged(self.penalty_step(x0, step), step)
            x_t = x0 + step.sigma_next * noise.randn(shape, like=y)  # line 8
            self.emit(step, x0)
        return self.to_image(x_t)

    def probability_flow(self, x: Tensor, sigma: float) -> Tensor:
        """Where the ODE dx/dsigma = (x - E[x_0 | x]) / sigma takes x (B, C, H, W), by Euler's method."""
        levels = power_sigmas(sigma, self.ode_sigma_min, self.ode_steps + 1)
        for level, next_level in itertools.pairwise(levels):
            x = x + (next_level - level) * (x - self.denoise(x, level)) / level
        return x

    def inner_chain(
        self, x0_hat: Tensor, x_t: Tensor, y: Tensor, operator: Operator, step: SigmaStep, noise: Noise
    ) -> Tensor:
        """x0 ~ p(x0 | x_t, y) after K steps from x0_hat."""
        shape = tuple(x_t.shape[1:])
        root = math.sqrt(self.step_size(step))
        prior_score = self.prior_score(x0_hat, x_t, step.sigma)
        x = x0_hat
        velocity = noise.randn(shape, like=y) if self.momentum else torch.zeros_like(x)
        for k in range(self.mcmc_steps):
            misfit_gradient = self.misfit_gradient(x, y, operator, k, x0_hat)
            score = prior_score(x) - self.likelihood_scale / self.tau**2 * misfit_gradient
            fresh = math.sqrt(2 * (1 - self.momentum)) * noise.randn(shape, like=y)
            velocity = self.momentum * velocity + root * score + fresh
            x = x + root * velocity
        return x

    def step_size(self, step: SigmaStep) -> float:
        """eta_i; the published decay reaches its end one step after the last."""
        return self.eta * (1 + step.k / (step.num_steps + 1) * (self.eta_min_ratio - 1))

    def misfit_gradient(self, x: Tensor, y: Tensor, operator: Operator, k: int, x0_hat: Tensor) -> Tensor:
        """Gradient of ||A(x) - y||^2 of every image, in step k of the chain from x0_hat."""
        x = x.detach().requires_grad_()
        misfit = (operator(self.to_image(x)) - y).flatten(1).square().sum(1)
        return self.guidance(misfit, x, iteration=k, state=x0_hat)

    def prior_score(self, x0_hat: Tensor, x_t: Tensor, sigma: float) -> Callable[[Tensor], Tensor]:
        """The score of p(x0 | x_t) as a function of x0."""
        if self.prior_solver == "gaussian":
            return lambda x: (x0_hat - x) / sigma**2
        if self.prior_solver == "exact":
            return lambda x: (x_t - x) / sigma**2 + self.score(x, SCORE_SIGMA)
        constant = self.score(x_t, sigma) if self.prior_solver == "score_t" else self.score(x0_hat, SCORE_SIGMA)
        return lambda x: (x_t - x) / sigma**2 + constant

    def score(self, x: Tensor, sigma: float) -> Tensor:
        """Score of the prior smoothed by noise of level sigma."""
        return (self.denoise(x, sigma) - x) / sigma**2

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """E[x_0 | x = x_0 + sigma n] of the prior."""
        return self.prior.denoise(x, sigma, self.time_map)

    def restart_diverged(self, x0: Tensor, step: SigmaStep) -> Tensor:
        """Zeros in place of images that are not finite, unless nothing comes after to make an image of them."""
        diverged = ~x0.flatten(1).isfinite().all(1)
        if step.sigma_next == 0 or not diverged.any():
            return x0
        rows = diverged.nonzero().flatten().tolist()
        images = rows if self.problem is None else [self.problem.indices[row] for row in rows]
        warnings.warn(
            f"the inner chain of images {images} diverged at step {step.k} (eta={self.eta:g}); they start again from "
            "zero at the next noise level",
            stacklevel=2,
        )
        return torch.where(diverged.view(-1, 1, 1, 1), 0.0, x0)

    def state_shape(self, operator: Operator) -> tuple[int, int, int]:
        """(C, H, W) of the chain's states."""
        return operator.image_shape

    def to_image(self, x: Tensor) -> Tensor:
        """The image that a state stands for."""
        return x
