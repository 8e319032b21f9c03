"""Pseudo-inverse guidance of fields, with the covariance that the prior knows."""

from functools import partial

import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Sensors
from equireg.pde.equations import SIGMA_DATA
from equireg.priors import EDMPrior, SigmaStep
from lightning_modules.field_sampler import FieldSampler


class FieldPiGDM(FieldSampler):
    """Pseudo-inverse guidance (Song et al., ICLR 2023) with a covariance in place of r_t^2 I, on fields.

    Given x at noise level sigma, the field is taken to be normal around its denoised estimate D with the covariance C
    that the prior knows (``EDMPrior.covariance_between``; with Tweedie's second moment, Boys et al., 2024, it would be
    the network's own). Then log p(y | x) = -r^T (A C A^T + sigma_y^2)^-1 r / 2 with r = y - A D, and the denoised field
    given y is D + sigma^2 K grad log p(y | x), K the covariance of the noise; it takes the place of D in Heun's steps.
    There is no weight to tune, and for a Gaussian prior that knows its covariance the posterior is exact. A regulariser
    is one more log-likelihood, whose weight then has no unit.

    Args:
        prior: a prior on fields; one with a linear denoiser (``FieldUNet(linear=...)``) knows its covariance well.
        operator: the sensors.
        num_steps: N.
        ridge: variance added at the sensors, in units of their mean variance: what keeps the system solvable where
            sensors are close to each other, and steps small where the covariance is only nearly right.
        sigma_max, sigma_min, rho, temperature, seed: see ``FieldSampler``.

    Cost per step: two forward and two backward passes of the network.

    Raises:
        ValueError: if an argument is out of range.
    """

    uses_sigma_y = True

    def __init__(
        self,
        prior: EDMPrior,
        operator: Sensors,
        num_steps: int = 50,
        ridge: float = 1e-4,
        sigma_max: float = 80.0,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, num_steps, sigma_max, sigma_min, rho, None, temperature, True, seed)
        if not ridge >= 0:
            raise ValueError(f"ridge={ridge} must not be negative")
        self.ridge = ridge

    def sample(self, y: Tensor, operator: Sensors, noise: Noise) -> Tensor:
        sensors = self.prior.normalize(operator.adjoint(y.double()))
        values = operator(sensors)

        def guided(x: Tensor, sigma: float, step: SigmaStep) -> Tensor:
            x = x.detach().requires_grad_()
            denoised = self.prior.denoise(x, sigma)
            r = values - operator(denoised)
            factor = torch.linalg.cholesky(self.system(operator, sigma))
            weights = torch.cholesky_solve(r.detach()[..., None], factor)[..., 0]
            loss = (r * weights).sum(1)  # its gradient is that of r^T S^-1 r / 2
            gradient = self.guidance(loss + self.penalty_at(denoised, step), x, step.k)
            return denoised.detach() - sigma**2 * self.prior.noise.covariance(gradient)

        x = self.initial_state(noise, operator, like=sensors)
        for step in self.steps:  # sigma_0 ... sigma_{N-1}, then 0
            x, denoised = self.prior.heun_step(x, step, partial(guided, step=step))
            self.emit(step, self.prior.denormalize(denoised))
        return self.prior.denormalize(x).to(y.dtype)

    def system(self, operator: Sensors, sigma: float) -> Tensor:
        """S = A C A^T + sigma_y^2 I (B, m, m), in normalised units, with the ridge."""
        system = self.prior.covariance_between(operator.positions, sigma)
        units = SIGMA_DATA / self.prior.normalizer.std.double()  # normalised per physical
        noise = (operator.sigma_y * operator(units.expand(len(system), *operator.image_shape))).square()
        ridge = self.ridge * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        return system + torch.diag_embed(noise + ridge)
