"""ReSample: hard data consistency and stochastic resampling in latent diffusion."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Operator
from equireg.priors import DDIMStep, LatentPrior, Step, ddim_step, ddim_steps
from lightning_modules.base import PosteriorSampler, norm

Loss = Callable[[Tensor], tuple[Tensor, Tensor]]

RISE_WINDOW = 200
"""The latent optimisation stops when its loss is above that of so many iterations before."""


class ReSample(PosteriorSampler):
    """Hard data consistency in latent diffusion (Song et al., ICLR 2024, Alg. 1; arXiv 2307.08123).

    The latent follows the DDIM chain with a small DPS step on each. After the first third of the chain, in every
    ``every``-th step, an estimate of the clean image is made to agree with y by an optimisation, in pixels first
    (pixel stage), in the latent in the last third (latent stage), and the state is drawn anew around it (stochastic
    resampling). Equi-ReSample and EquiCon-ReSample are this sampler with the callback EquiReg and PriorDecoder or
    PriorRoundTrip, reduction ``mse``: the penalty joins the loss of the latent stage. DiffStateGrad projects the
    gradients of both optimisations, not that of the DPS step (callback StateGrad).

    Args:
        prior: a latent prior, as published of the VQ family; a KL encoder gives its mean.
        operator: any differentiable operator.
        num_steps: DDIM steps N, see ``ddim_steps``.
        guidance_scale: the DPS step is guidance_scale alpha_bar times the gradient of ||y - A(D(z0_hat))||.
        every: steps between two optimisations.
        splits: the warm-up without optimisations, and the latent stage, are the first and the last N // splits steps.
        lookahead: DDIM steps that estimate the clean latent for an optimisation.
        pixel_iterations, pixel_lr: AdamW in the pixel stage, at most so many iterations.
        latent_iterations, latent_lr: the same in the latent stage, and for the last latent.
        tolerance: an optimisation of an image stops where the mean of its squared residuals falls below tolerance^2.
        resample_scale: variance of the resampling, 40 (1 - alpha_bar') / (1 - alpha_bar) (1 - alpha_bar / alpha_bar')
            as published, where the paper calls the number gamma.
        eta: noise of the chain, 0 for none.
        tweedie: coefficient of eps in the clean latent that is compared with y: ``resample`` 1 - alpha_bar, as
            published, or ``exact``, its root.
        unet_grad: lets the gradient of the DPS step through the network, as in DPS; published without.
        fix_lookahead_index: looks ahead with the alpha_bar of the timestep that the network is told; as published they
            lag one step behind it.
        stop_on: whether the stopping rules see the ``total`` loss or that of the ``data`` alone.
        seed: see ``PosteriorSampler``.

    Cost: one forward of the network per step and ``lookahead`` per optimisation; one forward and backward of decoder
    and operator per step and per iteration of the latent stage; one of the operator per iteration of the pixel stage,
    and one decode and encode around it. Finished images of a batch wait for the others.

    Warns:
        UserWarning: if ``tolerance`` is below the noise level, so that the optimisations fit the noise.

    Raises:
        ValueError: if a number is out of range.
    """

    space = "latent"
    differentiates_prior = False
    takes_state_grad = True

    def __init__(
        self,
        prior: LatentPrior,
        operator: Operator,
        num_steps: int = 500,
        guidance_scale: float = 0.5,
        every: int = 10,
        splits: int = 3,
        lookahead: int = 5,
        pixel_iterations: int = 2000,
        pixel_lr: float = 1e-2,
        latent_iterations: int = 500,
        latent_lr: float = 5e-3,
        tolerance: float = 1e-3,
        resample_scale: float = 40.0,
        eta: float = 0.0,
        tweedie: Literal["resample", "exact"] = "resample",
        unet_grad: bool = False,
        fix_lookahead_index: bool = False,
        stop_on: Literal["total", "data"] = "total",
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, seed)
        positive = {
            "every": every,
            "splits": splits,
            "lookahead": lookahead,
            "pixel_lr": pixel_lr,
            "latent_lr": latent_lr,
            "resample_scale": resample_scale,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        limits = {
            "guidance_scale": guidance_scale,
            "pixel_iterations": pixel_iterations,
            "latent_iterations": latent_iterations,
            "tolerance": tolerance,
        }
        for name, value in limits.items():
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        if 2 * num_steps > len(prior.alpha_bar):
            raise ValueError(
                f"num_steps={num_steps} must be at most {len(prior.alpha_bar) // 2}: the published chain has no table "
                "for every timestep"
            )
        if operator.poisson_rate is None and tolerance < operator.sigma_y:
            warnings.warn(
                f"tolerance={tolerance:g} is below the noise level sigma_y={operator.sigma_y:g}: the optimisations fit "
                "the noise or run to their last iteration",
                stacklevel=2,
            )
        self.steps = ddim_steps(prior.alpha_bar, num_steps, eta)
        self.guidance_scale = guidance_scale
        self.every = every
        self.splits = splits
        self.lookahead = lookahead
        self.pixel_iterations = pixel_iterations
        self.pixel_lr = pixel_lr
        self.latent_iterations = latent_iterations
        self.latent_lr = latent_lr
        self.tolerance = tolerance
        self.resample_scale = resample_scale
        self.tweedie: Literal["resample", "exact"] = tweedie
        self.unet_grad = unet_grad
        self.fix_lookahead_index = fix_lookahead_index
        self.stop_on: Literal["total", "data"] = stop_on

    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        third = len(self.steps) // self.splits
        z_t = noise.randn(self.prior.latent_shape(operator.image_shape), like=y)
        for step in self.steps:  # j = N-1 ... 0
            z_prev, gradient, z0_hat = self.guided_step(z_t, y, operator, step, noise)
            z_t = z_prev - self.guidance_scale * step.alpha_bar * gradient
            if 0 < step.j <= len(self.steps) - third and step.j % self.every == 0:
                z_ahead, z0_hat = self.look_ahead(z_t, step, noise)
                if step.j >= third:
                    z0_y = self.pixel_stage(z0_hat, y, operator, z_ahead)
                else:
                    z0_y = self.latent_stage(z0_hat, y, operator, step, z_ahead)
                z_t = self.resample(z0_y, z_t, step, noise)
            self.emit(step, z0_hat)
        after = replace(self.steps[-1], k=len(self.steps))
        z = self.latent_stage(z_t, y, operator, after, z_t)
        with torch.no_grad():
            return self.prior.decode(z).clamp(-1, 1)

    def guided_step(
        self, z_t: Tensor, y: Tensor, operator: Operator, step: DDIMStep, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The DDIM step from z_t, the gradient of ||y - A(D(z0_hat))|| with respect to z_t, and z0_hat."""
        z_t = z_t.detach().requires_grad_()
        with torch.set_grad_enabled(self.unet_grad):
            eps = self.prior(z_t, step).eps
        z0_hat = self.clean_latent(z_t, eps, step)
        misfit = norm(y - operator(self.prior.decode(z0_hat)))
        (gradient,) = torch.autograd.grad(misfit.sum(), z_t)
        return ddim_step(step.x0_hat(z_t, eps), eps, step, noise), gradient, z0_hat.detach()

    @torch.no_grad()
    def look_ahead(self, z_t: Tensor, step: DDIMStep, noise: Noise) -> tuple[Tensor, Tensor]:
        """The state and the clean latent after up to ``lookahead`` plain DDIM steps from z_t, where ``step`` ended."""
        for k in range(step.k, min(step.k + self.lookahead, step.num_steps - 1)):
            ahead = self.steps[k + 1]
            if not self.fix_lookahead_index:  # the transition just made, or the one after, under a later timestep
                ahead = replace(self.steps[k], t=ahead.t)
            eps = self.prior(z_t, ahead).eps
            z0_hat = self.clean_latent(z_t, eps, ahead)
            z_t = ddim_step(ahead.x0_hat(z_t, eps), eps, ahead, noise)
        return z_t, z0_hat

    def clean_latent(self, z_t: Tensor, eps: Tensor, step: DDIMStep) -> Tensor:
        """The estimate of the clean latent that is compared with y; the chain itself always takes the exact one."""
        if self.tweedie == "exact":
            return step.x0_hat(z_t, eps)
        return (z_t - (1 - step.alpha_bar) * eps) / math.sqrt(step.alpha_bar)

    def pixel_stage(self, z0_hat: Tensor, y: Tensor, operator: Operator, state: Tensor) -> Tensor:
        """The latent of the image near D(z0_hat) that agrees with y."""

        def loss(x: Tensor) -> tuple[Tensor, Tensor]:
            return mean_square(y - operator(x)), x.new_zeros(len(x))

        with torch.no_grad():
            x = self.prior.decode(z0_hat)
            state = self.prior.decode(state) if self.gradient_transforms else None
        x = self.optimize(x, loss, self.pixel_lr, self.pixel_iterations, state)
        with torch.no_grad():
            return self.prior.encode(x)

    def latent_stage(self, z0_hat: Tensor, y: Tensor, operator: Operator, step: Step, state: Tensor) -> Tensor:
        """The latent near z0_hat whose image agrees with y; EquiReg's penalty takes part."""

        def loss(z: Tensor) -> tuple[Tensor, Tensor]:
            x = self.prior.decode(z)
            return mean_square(y - operator(x)), self.penalty_at(z, step, decoded=x)

        return self.optimize(z0_hat, loss, self.latent_lr, self.latent_iterations, state, RISE_WINDOW)

    def optimize(
        self, x: Tensor, loss: Loss, lr: float, iterations: int, state: Tensor | None, window: int | None = None
    ) -> Tensor:
        """Minimises every image's loss by AdamW with torch's defaults, weight decay included.

        Args:
            x: where to start (B, ...).
            loss: data loss (B,) and penalty (B,) at x.
            lr: learning rate.
            iterations: at most so many.
            state: what the transforms of the gradient refer to.
            window: an image stops when its loss is above that of so many iterations before; never when None.
        """
        x = x.detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([x], lr=lr)
        running = torch.ones(len(x), dtype=torch.bool, device=x.device)
        history: list[Tensor] = []
        for iteration in range(iterations):
            data, penalty = loss(x)
            x.grad = self.guidance(data + penalty, x, iteration, state)
            before = x.detach().clone()
            optimizer.step()
            with torch.no_grad():  # a finished image takes no part: neither momentum nor weight decay may move it
                x.copy_(torch.where(running.view(-1, *[1] * (x.ndim - 1)), x, before))
            history.append((data if self.stop_on == "data" else data + penalty).detach())
            running &= history[-1] >= self.tolerance**2  # of the loss before the update; false for NaN
            if window is not None and iteration >= window:
                running &= history[-1] <= history[iteration - window]
            if not running.any():
                break
        return x.detach()

    def resample(self, z0_y: Tensor, z_t: Tensor, step: DDIMStep, noise: Noise) -> Tensor:
        """Draws the state from the product of N(sqrt(a') z0_y, 1 - a') and N(z_t, v), with a' = alpha_bar_prev."""
        v, a_prev = self.resample_variance(step), step.alpha_bar_prev
        mean = (v * math.sqrt(a_prev) * z0_y + (1 - a_prev) * z_t) / (v + 1 - a_prev)
        variance = 1 / (1 / v + 1 / (1 - a_prev))
        return mean + math.sqrt(variance) * noise.randn(tuple(z_t.shape[1:]), like=z_t)

    def resample_variance(self, step: DDIMStep) -> float:
        """v, the variance that the state is trusted with."""
        a, a_prev = step.alpha_bar, step.alpha_bar_prev
        return self.resample_scale * (1 - a_prev) / (1 - a) * (1 - a / a_prev)


def mean_square(residual: Tensor) -> Tensor:
    """Mean of r^2 per image (B,)."""
    return residual.flatten(1).square().mean(1)
