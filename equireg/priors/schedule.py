"""Discrete diffusion schedules and their respacing (guided-diffusion family); chains in sigma and their times."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
TimeMap = Literal["vp_linear", "vp_scaled_linear", "native"]


@dataclass(frozen=True)
class Step:
    """One step of a sampler, as regularisers, listeners and weight schedules see it.

    Attributes:
        k: number of the step, 0 first (at the highest noise).
        num_steps: how many steps the run has.
        alpha_bar: signal fraction of the state that the step starts from; 1 / (1 + sigma^2) for chains in sigma.
        beta: noise variance of the step; 0 where the chain has none.
    """

    k: int
    num_steps: int
    alpha_bar: float
    beta: float


@dataclass(frozen=True)
class VPStep(Step):
    """Constants of one ancestral step x_i -> x_{i-1}, from the respaced process.

    Attributes:
        t: original timestep in 0..T-1, what the network is told.
        alpha_bar_prev: signal fraction after the step; 1 for the last one.
        c_x0, c_xt: the ancestral mean is c_x0 x0_hat + c_xt x_t.
        log_beta: log of beta_i.
        log_beta_small: log of the posterior variance, its first entry replaced by its second (-inf otherwise).
        log_beta_large: log of beta_i, its first entry replaced by the second posterior variance.
    """

    t: int
    alpha_bar_prev: float
    c_x0: float
    c_xt: float
    log_beta: float
    log_beta_small: float
    log_beta_large: float

    @property
    def is_last(self) -> bool:
        return self.k == self.num_steps - 1


@dataclass(frozen=True)
class SigmaStep(Step):
    """One step of a chain whose state is x_0 + sigma n.

    Attributes:
        sigma: noise level that the step starts from.
        sigma_next: noise level that it leaves; 0 after the last one.
    """

    sigma: float
    sigma_next: float


class VPSchedule:
    """A respaced variance-preserving process; iterating yields its steps from the highest noise down.

    beta is re-derived from the kept alpha_bar, so posterior constants are those of the shorter chain (Nichol &
    Dhariwal, ICML 2021). float64 throughout.

    Args:
        alpha_bar: cumulative products of the original process, length T.
        timesteps: original timesteps to keep, ascending.
    """

    def __init__(self, alpha_bar: np.ndarray, timesteps: list[int]) -> None:
        self.timesteps = timesteps
        self.alpha_bar = alpha_bar[timesteps]
        self.alpha_bar_prev = np.append(1.0, self.alpha_bar[:-1])
        self.beta = 1 - self.alpha_bar / self.alpha_bar_prev

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[VPStep]:
        n = len(self)
        small = self.beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        small_filled = np.append(small[1] if n > 1 else self.beta[0], small[1:])
        large = np.append(small_filled[0], self.beta[1:])
        for k in range(n):
            i = n - 1 - k
            yield VPStep(
                k=k,
                num_steps=n,
                alpha_bar=float(self.alpha_bar[i]),
                beta=float(self.beta[i]),
                t=self.timesteps[i],
                alpha_bar_prev=float(self.alpha_bar_prev[i]),
                c_x0=float(self.beta[i] * np.sqrt(self.alpha_bar_prev[i]) / (1 - self.alpha_bar[i])),
                c_xt=float((1 - self.alpha_bar_prev[i]) * np.sqrt(1 - self.beta[i]) / (1 - self.alpha_bar[i])),
                log_beta=float(np.log(self.beta[i])),
                log_beta_small=float(np.log(small_filled[i])),
                log_beta_large=float(np.log(large[i])),
            )


def make_betas(kind: BetaSchedule, num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """beta_0 ... beta_{T-1} in float64 of the named schedule.

    ``linear`` and ``scaled_linear`` (linear in the square root, latent diffusion) run from ``beta_start`` to
    ``beta_end``; ``squaredcos_cap_v2`` is the cosine schedule of Nichol & Dhariwal (ICML 2021) and ignores both.
    """
    if kind == "linear":
        return np.linspace(beta_start, beta_end, num_train_timesteps)
    if kind == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    u = np.arange(num_train_timesteps + 1) / num_train_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def power_sigmas(first: float, last: float, count: int, rho: float = 7.0) -> list[float]:
    """``count`` noise levels from ``first`` to ``last``, evenly spaced in their rho-th roots (Karras et al., eq. 5)."""
    return (np.linspace(first ** (1 / rho), last ** (1 / rho), count) ** rho).tolist()


def sigma_steps(sigmas: list[float]) -> list[SigmaStep]:
    """The steps of a chain through these noise levels, the one that it ends at included."""
    return [
        SigmaStep(
            k=k,
            num_steps=len(sigmas) - 1,
            alpha_bar=1 / (1 + sigma**2),
            beta=0.0,
            sigma=sigma,
            sigma_next=sigma_next,
        )
        for k, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas))
    ]


def time_of_sigma(sigma: float, alpha_bar: np.ndarray, time_map: TimeMap) -> float:
    """The timestep, not rounded, that a network is told at noise level sigma = sqrt((1 - alpha_bar) / alpha_bar).

    Args:
        sigma: the noise level.
        alpha_bar: cumulative products of the schedule that the network was trained with, length T.
        time_map: ``native``: the place of sigma in that schedule, linear in log sigma between its timesteps, not beyond
            its ends. ``vp_linear``: what the published DAPS tells networks, the place in the continuous limit of the
            linear schedule from 1e-4 to 0.02; 60 steps wrong for latent diffusion at sigma = 10.
            ``vp_scaled_linear``: what it tells Stable Diffusion, the same for beta_start 8.5e-4 and beta_end 0.012.
    """
    if time_map == "vp_linear":
        beta_d, beta_0 = 19.9, 0.1
        return 999 * (math.sqrt(beta_0**2 + 2 * beta_d * math.log1p(sigma**2)) - beta_0) / beta_d
    if time_map == "vp_scaled_linear":
        b = math.sqrt(0.85)
        a = math.sqrt(12.0) - b
        return 1000 * ((3 * a * math.log1p(sigma**2) + b**3) ** (1 / 3) - b) / a  # 1000: as published
    log_sigmas = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
    return float(np.interp(math.log(sigma), log_sigmas, np.arange(len(alpha_bar))))


def space_timesteps(num_train_timesteps: int, respacing: str | int) -> list[int]:
    """Original timesteps that a respaced process keeps, ascending (guided-diffusion's rules).

    Args:
        respacing: ``N`` or "N": N steps spread over 0..T-1 including both ends; "ddimN": the integer stride that gives
            exactly N steps from 0; "a,b,c": equal sections with these counts.

    Raises:
        ValueError: if the string is not of these forms or asks for more steps than there are.
    """
    text = str(respacing)
    if text.startswith("ddim"):
        count = _positive(text.removeprefix("ddim"), respacing)
        for stride in range(1, num_train_timesteps + 1):
            if len(range(0, num_train_timesteps, stride)) == count:
                return list(range(0, num_train_timesteps, stride))
        raise ValueError(f"respacing={respacing!r}: no integer stride over {num_train_timesteps} gives {count} steps")
    counts = [_positive(part, respacing) for part in text.split(",")]
    size, extra = divmod(num_train_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(f"respacing={respacing!r} asks for {count} of {length} steps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # a running float sum and Python's rounding, as in the original
            kept.append(start + round(position))
            position += stride
        start += length
    return sorted(set(kept))


def _positive(text: str, respacing: str | int) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"respacing={respacing!r} must be a number of steps, 'ddimN' or counts like '10,20,70'")
    return int(text)
