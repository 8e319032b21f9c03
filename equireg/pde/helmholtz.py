"""Direct solver of the Helmholtz equation on the unit square by the fast sine transform."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

WAVENUMBER = 1.0

LARGEST_MATRIX = 256
"""Side up to which a product with the sine matrix is faster than the FFT: 3 to 7 times at 32, 64 and 128."""


class Helmholtz:
    """Laplace u + k^2 u = a on [0, 1]^2, u = 0 on the boundary, with the five-point Laplacian.

    The points include both ends, h = 1 / (S - 1). The sine transform of type I diagonalises the Laplacian:
    u_hat_pq = a_hat_pq / (kappa_p + kappa_q + k^2), kappa_p = -(4 / h^2) sin^2(p pi h / 2), p = 1 ... S - 2. The result
    is that of the published sparse solver to rounding errors, at the cost of two sine transforms.

    Args:
        size: S.
        wavenumber: k.

    Raises:
        ValueError: if an argument is out of range, or k^2 is an eigenvalue, where there is no unique solution.
    """

    def __init__(self, size: int, wavenumber: float = WAVENUMBER) -> None:
        if size < 3:
            raise ValueError(f"size={size} must be at least 3: the solution is 0 on the edge")
        if not math.isfinite(wavenumber):
            raise ValueError(f"wavenumber={wavenumber} must be finite")
        self.size = size
        self.wavenumber = wavenumber
        h = 1 / (size - 1)
        p = torch.arange(1, size - 1, dtype=torch.float64)
        kappa = -4 / h**2 * torch.sin(p * math.pi * h / 2) ** 2
        self.eigenvalues = kappa[:, None] + kappa + wavenumber**2
        """Of the discrete operator (S - 2, S - 2), float64."""
        if self.eigenvalues.abs().min() < 1e-9 * kappa.abs().max():
            raise ValueError(
                f"wavenumber={wavenumber}: its square is an eigenvalue on {size} points, no unique solution"
            )

    @torch.no_grad()
    def __call__(self, a: Tensor) -> Tensor:
        """u (..., S, S) for sources a (..., S, S), on their device and in their dtype; a on the edge is ignored.

        Raises:
            ValueError: if the fields have another size.
        """
        if a.ndim < 2 or tuple(a.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"fields of shape {tuple(a.shape)} must end in ({self.size}, {self.size})")
        spectrum = sine_transform(a[..., 1:-1, 1:-1]) / self.eigenvalues.to(a)
        return F.pad(sine_transform(spectrum), (1, 1, 1, 1))


def sine_transform(x: Tensor) -> Tensor:
    """Orthonormal two-dimensional DST-I over the last axes (n, n); it is its own inverse.

    By FFT, or by products with the sine matrix on sides up to ``LARGEST_MATRIX``, where these are faster.
    """
    n = x.shape[-1]
    if n > LARGEST_MATRIX:
        return _fast_transform(_fast_transform(x).mT).mT
    matrix = _sine_matrix(n, x.dtype, x.device)
    return matrix @ x @ matrix


@lru_cache(maxsize=8)
def _sine_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    p = torch.arange(1, n + 1, dtype=torch.float64)
    return (math.sqrt(2 / (n + 1)) * torch.sin(math.pi * p[:, None] * p / (n + 1))).to(device, dtype)


def _fast_transform(x: Tensor) -> Tensor:
    """Along the last axis, as the imaginary part of the FFT of the odd extension (0, x, 0, -x reversed)."""
    n = x.shape[-1]
    zero = x.new_zeros(*x.shape[:-1], 1)
    odd = torch.cat([zero, x, zero, -x.flip(-1)], dim=-1)
    return -torch.fft.rfft(odd).imag[..., 1 : n + 1] / math.sqrt(2 * (n + 1))
