"""The best linear estimate of fields x = (a, u) from sensors under their Gaussian model: what samplers must beat."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from equireg.pde.helmholtz import Helmholtz
from equireg.pde.random_fields import NeumannField, cosine_basis, interior


class GaussianFields(ABC):
    """Mean and covariance of flattened fields x = (a, u), in physical units and float64.

    Attributes:
        mean: (2, N, N).
    """

    mean: Tensor

    @abstractmethod
    def covariance(self, v: Tensor) -> Tensor:
        """C v for v (..., 2, N, N)."""

    @abstractmethod
    def between(self, positions: Tensor) -> Tensor:
        """Covariance (m, m) of the field's values at positions (m,) in the flattened field."""

    def spread(self, positions: Tensor, weights: Tensor) -> Tensor:
        """C A^T w (2, N, N): the weights (m,) of sensors at ``positions``, spread over the field."""
        flat = torch.zeros_like(self.mean).flatten().scatter(0, positions, weights)
        return self.covariance(flat.view_as(self.mean))

    def estimate(self, y: Tensor, positions: Tensor, sigma: float = 0.0, ridge: float = 1e-10) -> Tensor:
        """mu + C A^T (A C A^T + (sigma^2 + ridge s^2) I)^-1 (y - A mu), (B, 2, N, N), float64.

        Args:
            y: sensor values (B, m).
            positions: of the sensors in the flattened field (B, m).
            sigma: standard deviation of the measurement noise.
            ridge: variance added for numerical and statistical stability, in units of the mean variance s^2 at the
                sensors.
        """
        estimates = []
        for values, places in zip(y.to(self.mean), positions.to(self.mean.device), strict=True):
            system = self.between(places)
            diagonal = system.diagonal()
            diagonal.add_(sigma**2 + ridge * diagonal.mean())
            factor = torch.linalg.cholesky(system)
            weights = torch.cholesky_solve((values - self.mean.flatten()[places])[:, None], factor)[:, 0]
            estimates.append(self.mean + self.spread(places, weights))
        return torch.stack(estimates)


class HelmholtzFields(GaussianFields):
    """The exact law of source and solution: both are linear images of the source's cosine coefficients.

    a = E B diag(s) xi and u = G a, with the orthonormal cosine basis B, the mask E of the interior and the symmetric
    solution operator G. Products with the covariance are fast transforms; no matrix of the fields' size is formed.

    Args:
        size: points per side.
        wavenumber: k.
        alpha, tau: of the source's law.
        device: where to compute.
    """

    def __init__(
        self,
        size: int,
        wavenumber: float = 1.0,
        alpha: float = 2.0,
        tau: float = 3.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.mean = torch.zeros(2, size, size, dtype=torch.float64, device=device)
        self.solver = Helmholtz(size, wavenumber)
        self.basis = cosine_basis(size, self.mean)
        self.variances = NeumannField(alpha, tau).amplitudes(size, self.mean) ** 2
        self.interior = interior(size, self.mean)

    def covariance(self, v: Tensor) -> Tensor:
        v_a, v_u = v.unbind(-3)
        coefficients = self.variances * (self.basis.T @ (self.interior * (v_a + self.solver(v_u))) @ self.basis)
        a = self.interior * (self.basis @ coefficients @ self.basis.T)
        return torch.stack([a, self.solver(a)], dim=-3)

    def between(self, positions: Tensor) -> Tensor:
        sensors = torch.zeros(len(positions), self.mean.numel(), dtype=self.mean.dtype, device=self.mean.device)
        sensors.scatter_(1, positions[:, None], 1.0)
        return self.covariance(sensors.unflatten(1, self.mean.shape)).flatten(1)[:, positions]


class EmpiricalFields(GaussianFields):
    """The mean and covariance of given fields, kept as the fields themselves.

    Args:
        x: training fields (M, 2, N, N), at least two.
        device: where to compute.
    """

    def __init__(self, x: Tensor, device: str | torch.device = "cpu") -> None:
        if len(x) < 2:
            raise ValueError(f"a covariance needs at least two fields, got {len(x)}")
        x = x.to(device, torch.float64)
        self.mean = x.mean(0)
        self.centred = (x - self.mean).flatten(1) / (len(x) - 1) ** 0.5

    def covariance(self, v: Tensor) -> Tensor:
        return (v.flatten(-3) @ self.centred.T @ self.centred).unflatten(-1, self.mean.shape)

    def between(self, positions: Tensor) -> Tensor:
        sensors = self.centred[:, positions]
        return sensors.T @ sensors

    def spread(self, positions: Tensor, weights: Tensor) -> Tensor:
        return ((self.centred[:, positions] @ weights) @ self.centred).view_as(self.mean)
