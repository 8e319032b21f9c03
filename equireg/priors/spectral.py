"""The linear denoiser of fields that are nearly stationary: what a network in its company need not learn."""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from equireg.pde.helmholtz import sine_transform

Basis = Literal["fourier", "sine"]

CHUNK = 256
"""Fields that are transformed at a time."""


class SpectralDenoiser(nn.Module):
    """E[x_0 | x_0 + sigma n] for Gaussian fields whose coefficients are correlated within a mode only.

    Each mode has the covariance (2, 2) of its coefficients of a and u. Before ``fit`` every coefficient has variance
    ``variance`` and the estimate is EDM's c_skip x.

    Args:
        side: of the square fields.
        basis: ``fourier`` for periodic fields, ``sine`` for fields that are zero on the edge.
        variance: of every coefficient before ``fit``.

    Raises:
        ValueError: if the basis is unknown.
    """

    def __init__(self, side: int, basis: Basis, variance: float = 0.25) -> None:
        super().__init__()
        if basis not in ("fourier", "sine"):
            raise ValueError(f"basis={basis!r} must be 'fourier' or 'sine'")
        self.side = side
        self.basis: Basis = basis
        fourier = basis == "fourier"
        modes = (side, side // 2 + 1) if fourier else (side - 2, side - 2)
        identity = torch.eye(2, dtype=torch.complex64 if fourier else torch.float32)
        self.register_buffer("mean", torch.zeros(2, side, side))
        self.register_buffer("log_variances", torch.full((*modes, 2), math.log(variance)))
        self.register_buffer("directions", identity.expand(*modes, 2, 2).clone())
        self.register_buffer("fitted", torch.zeros(()))  # 1 when the others are those of data
        weights = torch.full(modes, 2.0 if fourier else 1.0)
        if fourier:  # the real transform leaves out the conjugate half
            weights[:, 0] = 1
            weights[:, -1] = 1 if side % 2 == 0 else 2
        self.register_buffer("weights", weights / (2 * side**2), persistent=False)

    @torch.no_grad()
    def fit(self, fields: Tensor) -> None:
        """Takes mean and covariances of fields (N, 2, side, side)."""
        self.mean.copy_(fields.mean(0))
        covariance = 0
        for chunk in fields.split(CHUNK):
            coefficients = self.transform(chunk.to(self.mean) - self.mean)
            covariance = covariance + torch.einsum("nahw,nbhw->hwab", coefficients, coefficients.conj())
        variances, directions = torch.linalg.eigh((covariance / len(fields)).cpu())
        self.log_variances.copy_(variances.clamp_min(1e-12).log())
        self.directions.copy_(directions)
        self.fitted.fill_(1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x_0 from fields x (B, 2, side, side) with noise levels sigma (B,)."""
        with torch.autocast(x.device.type, enabled=False):
            variances = self.log_variances.exp().to(x.dtype)
            gain = variances / (variances + sigma.view(-1, 1, 1, 1) ** 2)
            coefficients = self.transform(x - self.mean)
            directions = self.directions.to(coefficients.dtype)
            principal = torch.einsum("hwab,nahw->nhwb", directions.conj(), coefficients) * gain
            return self.mean + self.inverse(torch.einsum("hwab,nhwb->nahw", directions, principal))

    def covariance_between(self, positions: Tensor, sigma: float) -> Tensor:
        """Cov[x_0 | x_0 + sigma n] (B, m, m) between the values at ``positions`` (B, m) of the flattened fields.

        float64.
        """
        variances = self.log_variances.double().exp()
        left = variances * sigma**2 / (variances + sigma**2)
        directions = self.directions.to(torch.complex128 if self.basis == "fourier" else torch.float64)
        modes = torch.einsum("hwac,hwc,hwbc->abhw", directions, left.to(directions.dtype), directions.conj())
        channel = torch.div(positions, self.side**2, rounding_mode="floor")
        row, column = (torch.div(positions, self.side, rounding_mode="floor") % self.side, positions % self.side)
        if self.basis == "fourier":  # a function of the difference of two points
            kernel = torch.fft.irfft2(modes, s=(self.side, self.side))
            by_row, by_column = ((p[:, :, None] - p[:, None]) % self.side for p in (row, column))
            return kernel[channel[:, :, None], channel[:, None], by_row, by_column]
        cells = self.side - 1
        points = torch.arange(self.side, dtype=torch.float64, device=positions.device)
        sines = torch.sin(torch.outer(points, points[1:-1]) * (math.pi / cells)) * math.sqrt(2 / cells)
        waves = (sines[row][..., None] * sines[column][:, :, None]).flatten(2)  # (B, m, modes)
        covariance = waves.new_zeros(*positions.shape, positions.shape[1])
        for a, b in itertools.product(channel.unique().tolist(), repeat=2):
            chosen = (channel == a)[:, :, None] & (channel == b)[:, None]
            covariance = torch.where(chosen, (waves * modes[a, b].flatten()) @ waves.mT, covariance)
        return covariance

    def error(self, sigma: Tensor) -> Tensor:
        """Its root mean square error (B,), per point, at noise levels sigma (B,)."""
        variances, noise = self.log_variances.exp(), sigma.view(-1, 1, 1, 1) ** 2
        left = (variances * noise / (variances + noise)).sum(-1)
        return (left * self.weights).sum((1, 2)).sqrt()

    def transform(self, x: Tensor) -> Tensor:
        """Orthonormal coefficients (B, 2, modes) of fields."""
        if self.basis == "fourier":
            return torch.fft.rfft2(x, norm="ortho")
        return sine_transform(x[..., 1:-1, 1:-1])

    def inverse(self, coefficients: Tensor) -> Tensor:
        """The inverse of ``transform``."""
        if self.basis == "fourier":
            return torch.fft.irfft2(coefficients, s=(self.side, self.side), norm="ortho")
        return nn.functional.pad(sine_transform(coefficients), (1, 1, 1, 1))
