"""An analytic prior on fields: Gaussian pairs (a, u), with their exact denoiser."""

import math

import torch
from torch import Tensor, nn

from equireg.pde.equations import PDE
from equireg.pde.linear_mmse import GaussianFields
from equireg.pde.noise_basis import NoiseBasis
from equireg.priors.edm import EDMPrior, NoiseKind


class GaussianFieldPrior(EDMPrior):
    """Fields x = (a, u) of a Gaussian law: a prior in sigma that knows its denoiser, to test guidance by itself.

    With linear measurements the posterior is Gaussian, and its mean is ``fields.estimate``: what no sampler can beat on
    average. The law of the Helmholtz equation is ``HelmholtzFields``, exactly.

    Args:
        fields: the law, in physical units.
        pde: the equation.
        noise, noise_scale: of the diffusion, see ``EDMPrior``.

    Cost per call: two products of the batch with an n x n matrix, n = 2 N^2; n^3 at construction.
    """

    kind = "gaussian_field_prior"

    def __init__(
        self, fields: GaussianFields, pde: PDE, noise: NoiseKind = "exponential", noise_scale: float = 0.05
    ) -> None:
        nn.Module.__init__(self)
        network = GaussianFieldDenoiser(tuple(fields.mean.shape))
        self._complete(network, {"pde": pde, "noise": noise, "noise_scale": noise_scale})
        unit = torch.eye(fields.mean.numel(), dtype=torch.float64).view(-1, *fields.mean.shape)
        units = (0.5 / self.normalizer.std.double()).expand(fields.mean.shape).flatten()
        covariance = units[:, None] * fields.covariance(unit.to(fields.mean)).flatten(1).cpu() * units
        basis = NoiseBasis(self.noise, fields.mean.shape[-1], torch.float64)
        whiten, colour = (change(unit).flatten(1).T for change in (basis.whiten, basis.colour))
        network.diagonalise(self.normalize(fields.mean.cpu()), covariance, whiten, colour)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError unless fields have exactly the shape of the law."""
        if tuple(shape) != self.image_shape:
            raise ValueError(f"fields are {tuple(shape)}, the Gaussian prior is on {self.image_shape}")

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        return self.network(x.double(), sigma).to(x.dtype)

    def covariance_between(self, positions: Tensor, sigma: float) -> Tensor:
        """The exact one."""
        variances = self.network.variances
        left = variances * sigma**2 / (variances + sigma**2)
        rows = self.network.synthesis[positions]  # (B, m, n)
        return (left * rows) @ rows.mT


class GaussianFieldDenoiser(nn.Module):
    """mu + C (C + sigma^2 K)^-1 (x - mu) in the place of a network, called with x (B, 2, N, N) and sigma (B,)."""

    side_divisor = 1

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.in_channels, self.image_size = shape[0], shape[1:]
        count = math.prod(shape)
        for name, size in (("mean", shape), ("variances", count), ("analysis", (count, count))):
            self.register_buffer(name, torch.empty(size, dtype=torch.float64))
        self.register_buffer("synthesis", torch.empty(count, count, dtype=torch.float64))

    def diagonalise(self, mean: Tensor, covariance: Tensor, whiten: Tensor, colour: Tensor) -> None:
        """Takes mu (2, N, N), C (n, n) and the maps (n, n) to coordinates in which K is the identity, and back."""
        variances, directions = torch.linalg.eigh(whiten @ covariance @ whiten.T)
        self.mean.copy_(mean)
        self.variances.copy_(variances.clamp_min(0))
        self.analysis.copy_(directions.T @ whiten)
        self.synthesis.copy_(colour @ directions)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        gain = self.variances / (self.variances + sigma[:, None] ** 2)
        coefficients = gain * ((x - self.mean).flatten(1) @ self.analysis.T)
        return self.mean + (coefficients @ self.synthesis.T).view_as(x)
