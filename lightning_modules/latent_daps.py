"""Decoupled annealing posterior sampling in the latent space of an autoencoder."""

from torch import Tensor

from equireg.operators import Operator
from equireg.priors import LatentPrior, TimeMap
from lightning_modules.daps import DAPS, PriorSolver


class LatentDAPS(DAPS):
    """DAPS on latents (Zhang et al., CVPR 2025, LatentDAPS): states are latents z, the operator becomes A(D(z)).

    Every element of the gradient of ||A(D(z)) - y||^2 is clipped before it is divided by tau^2; at high noise nearly
    all are, which keeps the chain stable. Equi-LatentDAPS takes a gradient step on lambda_i R(z) after the chain, with
    lambda_i = lambda sqrt(1 - alpha_bar) of the noise level by the callback's default ``scale``.

    Args:
        prior: a latent prior.
        operator: any differentiable operator, on images.
        num_steps, sigma_max, sigma_min, ode_steps, ode_sigma_min: noise levels and probability flow, see ``DAPS``.
        mcmc_steps, eta, eta_min_ratio, momentum, tau, likelihood_scale, prior_solver: inner chain, see ``DAPS``.
        gradient_clip: bound on every element of the gradient of the sum of squares.
        time_map: timestep that the network is told; ``vp_linear`` is published and wrong for latent diffusion's
            schedule, ``native`` is right.
        seed: see ``PosteriorSampler``.

    Cost per step: as ``DAPS``, and K forward and backward passes of the decoder; one more decoding at the end.

    Raises:
        ValueError: as ``DAPS``, or if ``gradient_clip`` is not positive.
    """

    space = "latent"

    def __init__(
        self,
        prior: LatentPrior,
        operator: Operator,
        num_steps: int = 50,
        sigma_max: float = 10.0,
        sigma_min: float = 0.1,
        ode_steps: int = 2,
        ode_sigma_min: float = 0.001,
        mcmc_steps: int = 24,
        eta: float = 1.35e-4,
        eta_min_ratio: float = 0.023,
        momentum: float = 0.86,
        tau: float = 0.01,
        likelihood_scale: float = 1.0,
        gradient_clip: float = 1.0,
        prior_solver: PriorSolver = "gaussian",
        time_map: TimeMap = "vp_linear",
        seed: int = 0,
    ) -> None:
        super().__init__(
            prior,
            operator,
            num_steps=num_steps,
            sigma_max=sigma_max,
            sigma_min=sigma_min,
            ode_steps=ode_steps,
            ode_sigma_min=ode_sigma_min,
            mcmc_steps=mcmc_steps,
            eta=eta,
            eta_min_ratio=eta_min_ratio,
            momentum=momentum,
            tau=tau,
            likelihood_scale=likelihood_scale,
            prior_solver=prior_solver,
            time_map=time_map,
            seed=seed,
        )
        if not gradient_clip > 0:
            raise ValueError(f"gradient_clip={gradient_clip} must be positive")
        self.gradient_clip = gradient_clip

    def misfit_gradient(self, z: Tensor, y: Tensor, operator: Operator, k: int, z0_hat: Tensor) -> Tensor:
        gradient = super().misfit_gradient(z, y, operator, k, z0_hat)
        return gradient.clamp(-self.gradient_clip, self.gradient_clip)

    def state_shape(self, operator: Operator) -> tuple[int, int, int]:
        return self.prior.latent_shape(operator.image_shape)

    def to_image(self, z: Tensor) -> Tensor:
        return self.prior.decode(z)
