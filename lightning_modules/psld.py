"""Posterior sampling with latent diffusion."""

import math
from typing import Literal

import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Inpainting, LinearOperator
from equireg.priors import LatentPrior, ddim_step, ddim_steps
from lightning_modules.base import PosteriorSampler, norm

Adjoint = Literal["psld", "exact", "pinv"]


class PSLD(PosteriorSampler):
    """Posterior sampling with latent diffusion (Rout et al., NeurIPS 2023, Alg. 2; arXiv 2307.00619).

    The latent follows the DDIM chain; each step is pushed down the gradient of the distance to y and of the gluing
    term, which asks the latent to be that of an image that already agrees with y. Both norms are not squared, so the
    state never comes to rest: near the solution it wanders in steps of the size of the weights. Equi-PSLD and
    EquiCon-PSLD are this sampler with the callback EquiReg and PriorDecoder or PriorRoundTrip: the penalty of the
    denoised latent joins the two norms. DiffStateGrad projects the gradient of the first norm (callback StateGrad).

    Args:
        prior: a latent prior, of either family.
        operator: a linear operator.
        num_steps: DDIM steps N, see ``ddim_steps``: the published default runs all T = 1000 of them.
        omega: weight of the measurement's norm.
        gamma: weight of the gluing norm.
        eta: noise of the chain, 0 for none.
        step_limit: largest root mean square that the gradient's step may have, the direction kept; None as published.
            Short chains need it: where alpha_bar is small, z0_hat = z_t / sqrt(alpha_bar) - ... multiplies every
            gradient, the few long steps throw the latent off the data, and the decoder does not bring it back.
        adjoint: what takes y back to images in the gluing term: ``psld``, the published stand-ins (the identity,
            nearest-neighbour enlargement), ``exact``, or ``pinv``, the pseudo-inverse with the ridge sigma_y^2.
        renoise_prediction: adds fresh measurement noise to A(x0_hat) at every step, as published, which keeps its
            distance to y above sigma_y sqrt(2 m). Poisson noise is never added, no gradient passes through it.
        sample_encoder: draws the gluing term's latent from a KL encoder's Gaussian, as published for Stable Diffusion,
            instead of taking its mean.
        fix_timestep_offset: tells the network the timestep of alpha_bar in the chain of all T timesteps; as published
            it is told the next higher one.
        set_alpha_to_one: ends at alpha_bar = 1; the published chain ends at alpha_bar_0, with the noise that leaves.
        paste_known: replaces the known pixels of inpainted images by those of y at the end.
        seed: see ``PosteriorSampler``.

    Cost per step: one forward and one backward of the network, the decoder, the encoder (without it if gamma is 0) and
    the operator.

    Raises:
        ValueError: if a weight is negative, ``num_steps`` or ``eta`` is out of range, ``paste_known`` is asked of an
            operator without known pixels, or the operator has no pseudo-inverse for ``adjoint='pinv'``.
    """

    space = "latent"
    linear_only = True
    takes_state_grad = True

    def __init__(
        self,
        prior: LatentPrior,
        operator: LinearOperator,
        num_steps: int = 1000,
        omega: float = 0.1,
        gamma: float = 0.1,
        eta: float = 0.0,
        step_limit: float | None = None,
        adjoint: Adjoint = "psld",
        renoise_prediction: bool = True,
        sample_encoder: bool = True,
        fix_timestep_offset: bool = False,
        set_alpha_to_one: bool = False,
        paste_known: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, seed)
        for name, weight in {"omega": omega, "gamma": gamma}.items():
            if not weight >= 0:
                raise ValueError(f"{name}={weight} must not be negative")
        if step_limit is not None and not step_limit > 0:
            raise ValueError(f"step_limit={step_limit} must be positive, or null for none")
        if paste_known and not isinstance(operator, Inpainting):
            raise ValueError(f"paste_known=true needs known pixels; {type(operator).__name__} measures none")
        self.steps = ddim_steps(prior.alpha_bar, num_steps, eta, not fix_timestep_offset, set_alpha_to_one)
        self.omega = omega
        self.gamma = gamma
        self.step_limit = step_limit
        self.adjoint: Adjoint = adjoint
        self.renoise_prediction = renoise_prediction
        self.sample_encoder = sample_encoder
        self.paste_known = paste_known

    def sample(self, y: Tensor, operator: LinearOperator, noise: Noise) -> Tensor:
        z_t = noise.randn(self.prior.latent_shape(operator.image_shape), like=y)
        for step in self.steps:  # j = N-1 ... 0
            z_t.requires_grad_()
            eps = self.prior(z_t, step).eps
            z0_hat = step.x0_hat(z_t, eps)
            z_prev = ddim_step(z0_hat, eps, step, noise)
            x0_hat = self.prior.decode(z0_hat)
            y_hat = operator(x0_hat)
            misfit = self.omega * norm(self.renoised(y_hat, operator, noise) - y)
            penalty = self.penalty_at(z0_hat, step, decoded=x0_hat)
            glue = None
            if self.gamma:
                glued = x0_hat + self.back(y - y_hat, operator)  # A^T y + (I - A^T A) x0_hat
                glue = self.gamma * norm(self.prior.encode(glued, noise if self.sample_encoder else None) - z0_hat)
            gradient = self.guidance(misfit + penalty, z_t, step.k, aside=glue)
            z_t = (z_prev - self.limited(gradient)).detach()
            self.emit(step, z0_hat)
        x = self.prior.decode(z_t.detach()).detach().clamp(-1, 1)
        return x + operator.adjoint(y - operator(x)) if self.paste_known else x

    def limited(self, gradient: Tensor) -> Tensor:
        """The gradient of every image, shortened to ``step_limit`` where it is longer."""
        if self.step_limit is None:
            return gradient
        rms = norm(gradient) / math.sqrt(gradient[0].numel())
        return gradient * (self.step_limit / rms).clamp(max=1).view(-1, 1, 1, 1)

    def renoised(self, y_hat: Tensor, operator: LinearOperator, noise: Noise) -> Tensor:
        """A(x0_hat) with fresh measurement noise, where the published algorithm has it."""
        if self.renoise_prediction and operator.poisson_rate is None:
            return operator.add_noise(y_hat, noise)
        return y_hat

    def back(self, y: Tensor, operator: LinearOperator) -> Tensor:
        """What stands for A^T y."""
        if self.adjoint == "psld":
            return operator.back_projection(y)
        if self.adjoint == "exact":
            return operator.adjoint(y)
        return operator.pinv(y, ridge=operator.sigma_y**2)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.adjoint == "pinv":  # an operator without one says so here, not after the first network call
            shape = self.trainer.datamodule.image_shape
            self.back(torch.zeros(1, *self.operator.y_shape(shape)), self.operator.realize(shape, [0]))
