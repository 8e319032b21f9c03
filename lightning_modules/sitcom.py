"""Step-wise triple-consistent sampling."""

import dataclasses
import math

import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Inpainting, Operator
from equireg.priors import VPPrior, VPSchedule, VPStep
from lightning_modules.base import PosteriorSampler


class SITCOM(PosteriorSampler):
    """Step-wise triple-consistent sampling (Alkhouri et al., ICML 2025, Alg. 1; arXiv 2410.04479).

    At every step the network's input v, started at x_t, is optimised by Adam until the denoised estimate of v explains
    the measurement up to its noise; the estimate is then noised to the next level. An image that has reached the noise
    level is left alone while others continue. The published code keeps the iterate closest to the truth; ours
    returns the last one.

    With the callback EquiReg the estimate is optimised against the penalty by ``equi_steps`` steps of a fresh Adam
    before it is noised (the authors' ``equi_phase``). Adam does not see the scale of what it minimises, so the weight
    has almost no influence: ``equi_steps`` and ``equi_learning_rate`` set the strength.

    Args:
        prior: a pixel-space VP prior.
        operator: any differentiable operator.
        num_steps: N; the timesteps are (N-1) k, ..., k, 0 with k = 1000 // N.
        inner_steps: K, evaluations of the network per step at most.
        learning_rate: of Adam on v.
        stop_slack: an image is done when ||y - A x0_hat||^2 < (sigma_y + stop_slack)^2 m, m its number of measurements.
        inpaint_scale: for inpainting, size of a last gradient step on ||y - A x0_hat||^2 per x0_hat, clipped to
            [-1, 1]; the published 0.5 replaces the kept pixels by y, 0 leaves it out.
        equi_steps: Adam steps against the penalty.
        equi_learning_rate: of these; ``learning_rate`` when left out.
        seed: see ``PosteriorSampler``.

    Cost per step: up to K forward and K - 1 backward passes of the prior.

    Raises:
        ValueError: if an argument is out of range.
    """

    uses_sigma_y = True

    def __init__(
        self,
        prior: VPPrior,
        operator: Operator,
        num_steps: int = 20,
        inner_steps: int = 30,
        learning_rate: float = 0.02,
        stop_slack: float = 0.001,
        inpaint_scale: float = 0.5,
        equi_steps: int = 30,
        equi_learning_rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, seed)
        equi_learning_rate = learning_rate if equi_learning_rate is None else equi_learning_rate
        if not 1 <= num_steps <= prior.num_train_timesteps:
            raise ValueError(f"num_steps={num_steps} must be between 1 and {prior.num_train_timesteps}")
        for name, count in (("inner_steps", inner_steps), ("equi_steps", equi_steps)):
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        for name, rate in (("learning_rate", learning_rate), ("equi_learning_rate", equi_learning_rate)):
            if not rate > 0:
                raise ValueError(f"{name}={rate} must be positive")
        for name, value in (("stop_slack", stop_slack), ("inpaint_scale", inpaint_scale)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        stride = prior.num_train_timesteps // num_steps
        self.steps = list(VPSchedule(prior.alpha_bar, [stride * i for i in range(num_steps)]))
        self.inner_steps = inner_steps
        self.learning_rate = learning_rate
        self.stop_slack = stop_slack
        self.inpaint_scale = inpaint_scale
        self.equi_steps = equi_steps
        self.equi_learning_rate = equi_learning_rate

    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        x_t = noise.randn(operator.image_shape, like=y)
        for step in self.steps:
            x0_hat = self.consistent_estimate(x_t, step, y, operator)
            if self.inpaint_scale > 0 and isinstance(operator, Inpainting):
                gradient = 2 * operator.adjoint(operator(x0_hat) - y)
                x0_hat = (x0_hat - self.inpaint_scale * gradient).clamp(-1, 1)
            x0_hat = self.equi_phase(x0_hat, step)
            if not step.is_last:  # the state after the last step is not looked at
                n = noise.randn(operator.image_shape, like=y)
                x_t = math.sqrt(step.alpha_bar_prev) * x0_hat + math.sqrt(1 - step.alpha_bar_prev) * n
            self.emit(step, x0_hat)
        return x0_hat

    def consistent_estimate(self, x_t: Tensor, step: VPStep, y: Tensor, operator: Operator) -> Tensor:
        """x0_hat(v) with v near x_t such that the measurement is explained; the last evaluated one, detached."""
        v, adam = x_t, Adam(x_t, self.learning_rate)
        goal = (operator.noise_std(y) + self.stop_slack).square() * _number_of_measurements(y, operator)
        for iteration in range(self.inner_steps):
            v = v.detach().requires_grad_()
            x0_hat = self.prior(v, step).x0_hat
            loss = (y - operator(x0_hat)).flatten(1).square().sum(1)
            active = ~(loss < goal)  # a loss that is NaN must show in the image
            if not active.any() or iteration == self.inner_steps - 1:  # a further step of v would never be evaluated
                break
            v = adam.step(v, self.guidance(loss, v), active)
        return x0_hat.detach()

    def equi_phase(self, x0_hat: Tensor, step: VPStep) -> Tensor:
        """x0_hat moved against the penalty by a fresh Adam; the weight schedule counts the iterations from zero."""
        if self.penalty is None:
            return x0_hat
        adam = Adam(x0_hat, self.equi_learning_rate)
        for k in range(self.equi_steps):
            x0_hat = x0_hat.detach().requires_grad_()
            penalty = self.penalty_at(x0_hat, dataclasses.replace(step, k=k, num_steps=self.equi_steps))
            if penalty.requires_grad:  # not when the weight is zero
                x0_hat = adam.step(x0_hat, self.guidance(penalty, x0_hat), penalty != 0)
        return x0_hat.detach()


class Adam:
    """Adam (Kingma and Ba, ICLR 2015) on a batch of images that each have their own state and may pause.

    Args:
        x: images (B, C, H, W).
        learning_rate: step size.
    """

    BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8

    def __init__(self, x: Tensor, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.count = x.new_zeros(len(x), 1, 1, 1)
        self.first = torch.zeros_like(x)
        self.second = torch.zeros_like(x)

    @torch.no_grad()
    def step(self, x: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
        """x after one step; images that are not ``active`` (B,) stay as they are, state included."""
        active = active.view(-1, 1, 1, 1)
        self.count = self.count + active
        self.first = torch.where(active, torch.lerp(self.first, gradient, 1 - self.BETA_1), self.first)
        second = self.BETA_2 * self.second + (1 - self.BETA_2) * gradient.square()
        self.second = torch.where(active, second, self.second)
        corrections = (-torch.expm1(self.count * math.log(beta)) for beta in (self.BETA_1, self.BETA_2))
        size, scale = (torch.where(active, c, 1) for c in corrections)  # 1 - beta^count without cancellation
        change = self.first / (self.second.sqrt() / scale.sqrt() + self.EPSILON)
        return torch.where(active, x - self.learning_rate / size * change, x)


def _number_of_measurements(y: Tensor, operator: Operator) -> Tensor | int:
    """How many entries of every y carry noise."""
    if isinstance(operator, Inpainting) and not operator.noise_on_masked:
        return operator.mask.flatten(1).sum(1) * y.shape[1]
    return y[0].numel()
