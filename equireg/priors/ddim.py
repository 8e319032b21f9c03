"""DDIM chains as latent diffusion runs them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.priors.schedule import Step


@dataclass(frozen=True)
class DDIMStep(Step):
    """Constants of one step x_j -> x_{j-1} (Song et al., ICLR 2021, eq. 12).

    Attributes:
        t: what the network is told.
        alpha_bar_prev: signal fraction after the step.
        sigma: standard deviation of the noise that the step adds.
    """

    t: int
    alpha_bar_prev: float
    sigma: float

    @property
    def j(self) -> int:
        """Number of the step counted from the end of the chain, 0 last."""
        return self.num_steps - 1 - self.k

    def x0_hat(self, x_t: Tensor, eps: Tensor) -> Tensor:
        """Tweedie's formula in latent diffusion's form: the one of guided diffusion rounds differently, by 1e-5."""
        return (x_t - math.sqrt(1 - self.alpha_bar) * eps) / math.sqrt(self.alpha_bar)


def ddim_steps(
    alpha_bar: np.ndarray,
    num_steps: int,
    eta: float = 0.0,
    shift_full: bool = True,
    set_alpha_to_one: bool = False,
) -> list[DDIMStep]:
    """The steps of latent diffusion's DDIM sampler, from the highest noise down (Rombach et al., CVPR 2022).

    Timesteps are 1, 1 + c, 1 + 2c, ... with the integer stride c = T // num_steps, so there are ceil(T / c) of them,
    more than ``num_steps`` unless that divides T.

    Args:
        alpha_bar: cumulative products of the schedule, length T.
        num_steps: steps asked for.
        eta: 0 for the deterministic chain, 1 for the ancestral one.
        shift_full: in the chain of all T timesteps, 1 to T, look alpha_bar up one timestep below the one that the
            network is told (PSLD's code); otherwise the network is told that lower one too.
        set_alpha_to_one: end at alpha_bar = 1; latent diffusion ends at alpha_bar_0, with the noise that leaves.

    Raises:
        ValueError: if ``num_steps`` or ``eta`` is out of range.
    """
    alpha_bar = alpha_bar.astype(np.float32).astype(np.float64)  # as published; 1 - alpha_bar_0 differs by up to 1e-4
    total = len(alpha_bar)
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps={num_steps} must be between 1 and {total}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be between 0 and 1")
    stride = total // num_steps
    told = np.arange(0, total, stride) + 1
    looked_up = told - 1 if told[-1] == total else told
    if not shift_full:
        told = looked_up
    current = alpha_bar[looked_up]
    previous = np.append(1.0 if set_alpha_to_one else alpha_bar[0], current[:-1])
    sigmas = eta * np.sqrt((1 - previous) / (1 - current) * (1 - current / previous))
    return [
        DDIMStep(
            k=len(told) - 1 - j,
            num_steps=len(told),
            alpha_bar=float(current[j]),
            beta=float(1 - current[j] / previous[j]),
            t=int(told[j]),
            alpha_bar_prev=float(previous[j]),
            sigma=float(sigmas[j]),
        )
        for j in reversed(range(len(told)))
    ]


@torch.no_grad()
def ddim_step(x0_hat: Tensor, eps: Tensor, step: DDIMStep, noise: Noise) -> Tensor:
    """x_{j-1} from what the prior says about x_j; draws noise where sigma > 0 alone. No gradient flows through it."""
    direction = math.sqrt(1 - step.alpha_bar_prev - step.sigma**2)
    x_prev = math.sqrt(step.alpha_bar_prev) * x0_hat + direction * eps
    if step.sigma == 0:
        return x_prev
    return x_prev + step.sigma * noise.randn(tuple(x_prev.shape[1:]), like=x_prev)
