"""Manifold preserving guided diffusion."""

import math

import torch
from torch import Tensor

from equireg.autoencoder import Autoencoder
from equireg.noise import Noise
from equireg.operators import GaussianDeblur, Operator, SuperResolution
from equireg.priors import VPPrior, VPStep
from lightning_modules.base import PosteriorSampler, norm


class MPGD(PosteriorSampler):
    """Manifold preserving guided diffusion without projection (He et al., ICLR 2024, Alg. 1; arXiv 2311.16424).

    A DDIM chain whose x0_hat makes a gradient step on the data misfit, with respect to x0_hat itself: the network is
    never differentiated. The noise estimate is that of the clipped x0_hat before the step, and the moved x0_hat is not
    clipped again, as in the published code. That treats Gaussian blur and super-resolution; other operators are ours.

    Args:
        prior: a pixel-space VP prior.
        operator: any differentiable operator.
        num_steps: diffusion steps N or a respacing string; the published ones are "ddim20", "ddim50", "ddim100".
        scale: step size, in the norm of an image; the published ones fall with N (20: 17.5, 50: 7.5, 100: 4).
        eta: share of fresh noise of the DDIM chain, in [0, 1].
        seed: see ``PosteriorSampler``.

    Cost per step: one forward of the prior, one forward and backward of the operator.

    Raises:
        ValueError: if ``scale`` is not positive or ``eta`` is out of range.
    """

    differentiates_prior = False

    def __init__(
        self,
        prior: VPPrior,
        operator: Operator,
        num_steps: int | str = "ddim100",
        scale: float = 4.0,
        eta: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, seed)
        if not scale > 0:
            raise ValueError(f"scale={scale} must be positive")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be in [0, 1]")
        self.steps = list(prior.schedule(num_steps))
        self.scale = scale
        self.eta = eta

    @classmethod
    def is_extension(cls, operator: Operator) -> bool:
        return not isinstance(operator, GaussianDeblur | SuperResolution)

    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        x_t = noise.randn(operator.image_shape, like=y)
        for step in self.steps:  # i = N-1 ... 0
            x0_hat = self.prior(x_t, step).x0_hat
            eps = (math.sqrt(1 / step.alpha_bar) * x_t - x0_hat) / math.sqrt(1 / step.alpha_bar - 1)
            x0_hat.requires_grad_()
            x, scale = self.project(x0_hat, step)
            step_size = scale / math.sqrt(step.alpha_bar_prev)
            loss = norm(y - operator(x)) + self.penalty_at(x0_hat, step, step_size)
            x0_hat = (x0_hat - step_size * self.guidance(loss, x0_hat)).detach()  # Alg. 1, line 6
            x_t = self._ddim_step(x0_hat, eps, step, noise)
            self.emit(step, x0_hat)
        return x_t

    def project(self, x0_hat: Tensor, step: VPStep) -> tuple[Tensor, float]:
        """What is measured in place of x0_hat, and the step size for it."""
        return x0_hat, self.scale

    @torch.no_grad()
    def _ddim_step(self, x0_hat: Tensor, eps: Tensor, step: VPStep, noise: Noise) -> Tensor:
        """x_{t-1} of Song et al., ICLR 2021, eq. 12."""
        variance = 1 - step.alpha_bar_prev
        std = self.eta * math.sqrt(variance / (1 - step.alpha_bar) * (1 - step.alpha_bar / step.alpha_bar_prev))
        x_prev = math.sqrt(step.alpha_bar_prev) * x0_hat + math.sqrt(variance - std**2) * eps
        return x_prev if step.is_last else x_prev + std * noise.randn(tuple(eps.shape[1:]), like=eps)


class MPGDAE(MPGD):
    """MPGD with an autoencoder (He et al., ICLR 2024, Alg. 2): D(E(x0_hat)) is measured in the middle of the chain.

    Args:
        prior: a pixel-space VP prior.
        operator: any differentiable operator.
        autoencoder: its round trip keeps the guidance on the manifold; frozen.
        num_steps: diffusion steps N or a respacing string.
        scale: step size; the published ones are 20, 10, 5 for 20, 50, 100 steps.
        eta: share of fresh noise of the DDIM chain, in [0, 1].
        window: the autoencoder is used while window[0] < i / N < window[1], i = N-1 ... 0.
        window_factor: factor of ``scale`` within the window.
        seed: see ``PosteriorSampler``.

    Cost per step: that of MPGD; within the window one forward and backward of the autoencoder more.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        prior: VPPrior,
        operator: Operator,
        autoencoder: Autoencoder,
        num_steps: int | str = "ddim100",
        scale: float = 5.0,
        eta: float = 0.5,
        window: tuple[float, float] = (0.3, 0.5),
        window_factor: float = 0.0075,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, num_steps, scale, eta, seed)
        if not 0 <= window[0] <= window[1] <= 1:
            raise ValueError(f"window={window} must be two numbers with 0 <= low <= high <= 1")
        if not window_factor > 0:
            raise ValueError(f"window_factor={window_factor} must be positive")
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.window = tuple(window)
        self.window_factor = window_factor

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.autoencoder.check_shape(self.trainer.datamodule.image_shape)

    def project(self, x0_hat: Tensor, step: VPStep) -> tuple[Tensor, float]:
        i = step.num_steps - 1 - step.k
        if self.window[0] < i / step.num_steps < self.window[1]:
            return self.autoencoder(x0_hat), self.window_factor * self.scale
        return x0_hat, self.scale
