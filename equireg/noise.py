"""Reproducible randomness: a sample's draws depend on (seed, sample, draw, stream) and on nothing else."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor


class Stream(IntEnum):
    """What a random number is used for; streams of one sample are independent of each other."""

    MEASUREMENT = 0
    SAMPLER = 1
    GROUP = 2
    OPERATOR = 3
    MCMC = 4
    DATA = 5


class Noise(Protocol):
    """What samplers, operators and regularisers draw from; tests replay recorded draws through it."""

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor: ...

    def randint(self, high: int, device: torch.device) -> Tensor: ...


class SampleNoise:
    """One CPU generator per sample, so results do not depend on batch, order, process or device.

    Args:
        indices: data set index of every sample in the batch, length B.
        seed: seed of the run.
        stream: what the numbers are used for.
        draws: number of the posterior draw of every sample; zeros when left out.
    """

    def __init__(self, indices: Sequence[int], seed: int, stream: Stream, draws: Sequence[int] | None = None) -> None:
        draws = [0] * len(indices) if draws is None else draws
        self.generators = [
            torch.Generator().manual_seed(hash_seed(seed, stream, index, draw))
            for index, draw in zip(indices, draws, strict=True)
        ]

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normal numbers (B, *shape), drawn on the CPU in float32, moved to ``like``'s device and dtype."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(like)

    def randint(self, high: int, device: torch.device) -> Tensor:
        """Uniform integers (B,) in [0, high)."""
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self.generators]).to(device)

    def poisson(self, rate: Tensor) -> Tensor:
        """Poisson counts (B, ...) with the expectation ``rate`` (B, ...)."""
        counts = [torch.poisson(r, generator=g) for r, g in zip(rate.cpu(), self.generators, strict=True)]
        return torch.stack(counts).to(rate)


def hash_seed(*parts: int) -> int:
    """Mixes non-negative integers into a 63-bit seed (a splitmix-style avalanche)."""
    h = 0x9E3779B97F4A7C15
    for part in parts:
        h = ((h ^ (part + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        h ^= h >> 31
    return h >> 1
