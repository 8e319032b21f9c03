"""Residuals of the equations on fields x = (a, u), as the guidance of FunDPS and DiffusionPDE takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from equireg.pde.helmholtz import WAVENUMBER

ResidualName = Literal["helmholtz", "ns_gradient_sum"]


@dataclass(frozen=True)
class Residual:
    """A residual (B, H - 2, W - 2) of fields (B, 2, H, W) in physical units, without the outer ring of points.

    Attributes:
        function: the residual.
        grid: "endpoint" where the points include both ends, "periodic" where they do not.
    """

    function: Callable[[Tensor], Tensor]
    grid: Literal["endpoint", "periodic"]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def cells(self, side: int) -> int:
        """Cells of a grid of ``side`` points a side."""
        return (side - 1) ** 2 if self.grid == "endpoint" else side**2


def helmholtz(x: Tensor) -> Tensor:
    """Laplace u + k^2 u - a on the inner points (B, H - 2, W - 2), in physical units, h = 1 / (H - 1)."""
    a, u = x.unbind(1)
    h = 1 / (x.shape[-2] - 1)
    around = u[:, 2:, 1:-1] + u[:, :-2, 1:-1] + u[:, 1:-1, 2:] + u[:, 1:-1, :-2]
    inner = u[:, 1:-1, 1:-1]
    return (around - 4 * inner) / h**2 + WAVENUMBER**2 * inner - a[:, 1:-1, 1:-1]


def ns_gradient_sum(x: Tensor) -> Tensor:
    """d_1 u + d_2 u by central differences of spacing 1, on the inner points (B, H - 2, W - 2).

    What the published codes take for Navier-Stokes. It is neither that equation nor a divergence of the velocity, but
    a mild smoothness term.
    """
    u = x[:, 1]
    return (u[:, 2:, 1:-1] - u[:, :-2, 1:-1] + u[:, 1:-1, 2:] - u[:, 1:-1, :-2]) / 2


RESIDUALS: dict[ResidualName, Residual] = {
    "helmholtz": Residual(helmholtz, "endpoint"),
    "ns_gradient_sum": Residual(ns_gradient_sum, "periodic"),
}

PUBLISHED: dict[str, ResidualName] = {"helmholtz": "helmholtz", "navier_stokes": "ns_gradient_sum"}
"""The residual that the published samplers take for an equation."""
