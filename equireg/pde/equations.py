"""The two equations: names, physical constants, statistics of their fields, and the normalisation of fields."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

PDE = Literal["helmholtz", "navier_stokes"]

INPUT, SOLUTION = 0, 1
"""Channels of a field x = (a, u)."""

SIGMA_DATA = 0.5
"""Standard deviation of normalised fields."""


@dataclass(frozen=True)
class Equation:
    """What is known about an equation and its published data set (Huang et al., DiffusionPDE, NeurIPS 2024).

    Attributes:
        name: in configurations and files.
        prefix: of the names of data files.
        title: for people.
        grid: "endpoint": N points from 0 to 1 including both; "periodic": i / N.
        mean, std: of the channels (a, u) of the published data at 128 x 128, the constants of FunDPS.
        symmetry: name of the group of the true symmetry that trainings measure, and the regulariser's default.
    """

    name: PDE
    prefix: str
    title: str
    grid: Literal["endpoint", "periodic"]
    mean: tuple[float, float]
    std: tuple[float, float]
    symmetry: str


EQUATIONS: dict[PDE, Equation] = {
    "helmholtz": Equation(
        name="helmholtz",
        prefix="helmholtz",
        title="Helmholtz equation",
        grid="endpoint",
        mean=(0.0, 1.05050595e-05),
        std=(0.2844538, 0.00428004),
        symmetry="flip",
    ),
    "navier_stokes": Equation(
        name="navier_stokes",
        prefix="ns",
        title="Navier-Stokes equation",
        grid="periodic",
        mean=(0.0, 0.0),
        std=(0.26211293, 0.2561266),
        symmetry="navier_stokes_exact",
    ),
}


def get_equation(name: str) -> Equation:
    """The equation of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in EQUATIONS:
        raise ValueError(f"pde={name!r} is unknown; available: {', '.join(get_args(PDE))}")
    return EQUATIONS[name]


class Normalizer(nn.Module):
    """Fields (B, 2, H, W) between physical units and those of networks: x_norm = (x - mean) 0.5 / std, per channel.

    Mean and standard deviation are float32, as in FunDPS; fields keep their dtype.

    Args:
        mean, std: of the channels (a, u), in physical units.

    Raises:
        ValueError: if they are not two finite numbers each, or a standard deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 2 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name}={list(values)} must be two finite numbers, for a and u")
        if not all(s > 0 for s in std):
            raise ValueError(f"std={list(std)} must be positive")
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]).view(2, 1, 1))
        self.register_buffer("std", torch.tensor([float(s) for s in std]).view(2, 1, 1))

    @classmethod
    def of(cls, pde: str) -> "Normalizer":
        """With the published constants of an equation."""
        equation = get_equation(pde)
        return cls(equation.mean, equation.std)

    def normalize(self, x: Tensor, channel: int | slice = slice(None)) -> Tensor:
        """Physical fields to network units; with ``channel`` a field (..., H, W) of that one channel."""
        mean, std = self._constants(x, channel)
        return (x - mean) * SIGMA_DATA / std

    def denormalize(self, x: Tensor, channel: int | slice = slice(None)) -> Tensor:
        """The inverse of ``normalize``."""
        mean, std = self._constants(x, channel)
        return x * std / SIGMA_DATA + mean

    def _constants(self, x: Tensor, channel: int | slice) -> tuple[Tensor, Tensor]:
        return self.mean[channel].to(x.dtype), self.std[channel].to(x.dtype)

    def settings(self) -> dict[str, list[float]]:
        """``mean`` and ``std`` for the description of a weight file."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
