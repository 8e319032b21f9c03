"""DiffusionPDE: guided diffusion of fields at one resolution."""

from collections.abc import Iterator

from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Sensors
from equireg.pde.residuals import ResidualName
from equireg.priors import EDMPrior, SigmaStep
from lightning_modules.base import norm
from lightning_modules.field_sampler import FieldSampler


class DiffusionPDE(FieldSampler):
    """Generative PDE solving under partial observation (Huang et al., NeurIPS 2024, Alg. 1; arXiv 2406.17763).

    Heun's steps through the noise levels; after each, the last one included, the state is pushed down the gradients of
    the distances ||(D - y) at the sensors|| in physical units, and after four fifths of the steps down these times 0.1
    and that of the equation's residual. The norms are neither squared nor averaged; that of the residual is divided by
    the number of cells. A regulariser joins the distances.

    Args:
        prior: a prior on fields; the published ones have white noise.
        operator: the sensors; the published code has the same ones for all samples (``shared: true``).
        num_steps: N.
        zeta_a, zeta_u: step sizes of the distances at the sensors of a and of u.
        zeta_pde: step size of the residual.
        late_fraction: the share of the steps without the residual.
        late_factor: of the distances' step sizes afterwards.
        sigma_max, sigma_min, rho, residual, temperature, merge_losses, seed: see ``FieldSampler``.

    Cost per step: two forward and two backward passes of the network.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        prior: EDMPrior,
        operator: Sensors,
        num_steps: int = 2000,
        zeta_a: float = 1.0,
        zeta_u: float = 1.0,
        zeta_pde: float = 1.0,
        late_fraction: float = 0.8,
        late_factor: float = 0.1,
        sigma_max: float = 80.0,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        residual: ResidualName | None = None,
        temperature: float = 1.0,
        merge_losses: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            prior, operator, num_steps, sigma_max, sigma_min, rho, residual, temperature, merge_losses, seed
        )
        for name, value in (("zeta_a", zeta_a), ("zeta_u", zeta_u), ("zeta_pde", zeta_pde)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        if not 0 <= late_fraction <= 1:
            raise ValueError(f"late_fraction={late_fraction} must be between 0 and 1")
        if not late_factor > 0:
            raise ValueError(f"late_factor={late_factor} must be positive")
        if zeta_pde:
            self.need_residual()
        self.zetas = (zeta_a, zeta_u)
        self.zeta_pde = zeta_pde
        self.late_fraction = late_fraction
        self.late_factor = late_factor

    def sample(self, y: Tensor, operator: Sensors, noise: Noise) -> Tensor:
        sensors, mask = operator.adjoint(y.double()), operator.mask

        def terms(denoised: Tensor, step: SigmaStep) -> Iterator[Tensor]:
            fields = self.prior.denormalize(denoised)
            misfit = (fields - sensors) * mask
            is_late = step.k > self.late_fraction * step.num_steps
            scale = self.late_factor if is_late else 1.0
            for c in operator.observed:
                if self.zetas[c]:
                    yield scale * self.zetas[c] * norm(misfit[:, c])  # L_obs
            if is_late and self.zeta_pde:
                yield self.zeta_pde * norm(self.residual(fields)) / self.residual.cells(fields.shape[-1])  # L_pde
            yield scale * self.penalty_at(denoised, step, scale)  # EquiReg enters here

        x = self.initial_state(noise, operator, like=sensors)
        for step in self.steps:  # i = 0 ... N-1
            x_c = x.detach().requires_grad_()
            x, denoised = self.prior.heun_step(x_c, step)
            x = x - self.gradient(terms(denoised, step), x_c, step)
            self.emit(step, self.prior.denormalize(denoised))
        return self.prior.denormalize(x).detach().to(y.dtype)
