"""Diffusion posterior sampling in function space."""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from equireg.noise import Noise
from equireg.operators import Sensors
from equireg.pde.residuals import ResidualName
from equireg.priors import EDMPrior, SigmaStep
from lightning_modules.field_sampler import FieldSampler

FieldLoss = Literal["mse", "l2", "l1", "huber"]


class FunDPS(FieldSampler):
    """Guided diffusion on function spaces (Yao et al., NeurIPS 2025; arXiv 2505.17004).

    Heun's steps through the noise levels; after each the state is pushed down the gradient of the sensor misfit of the
    denoised field D and of the residual of the equation at D, through both network calls of the step. D is that of the
    corrector, the step to 0 is unguided, weights fall with sigma below 1 and the residual is left out above: all as in
    the published code. Equi-FunDPS is this sampler with the callback EquiReg, whose penalty is one more term beside the
    sensors'.

    Args:
        prior: a prior on fields.
        operator: the sensors.
        num_steps: N.
        sensor_loss: misfit of one channel's n sensors in normalised units: ``mse`` sum r^2 / n, ``l2`` its root, ``l1``
            sum |r| / n, ``huber`` the mean Huber loss.
        weight: of the sensor misfit; one for all observed channels or one each for a and u.
        residual_weight: of the residual, in physical units.
        residual_loss: like ``sensor_loss``, over the inner points.
        huber_delta: where Huber losses turn linear.
        sigma_max, sigma_min, rho, residual, temperature, merge_losses, seed: see ``FieldSampler``.

    Cost per step: two forward and two backward passes of the network.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        prior: EDMPrior,
        operator: Sensors,
        num_steps: int = 500,
        sensor_loss: FieldLoss = "l2",
        weight: float | tuple[float, float] = 5000.0,
        residual_weight: float = 1.0,
        residual_loss: FieldLoss = "huber",
        huber_delta: float = 1.0,
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
        weights = (weight, weight) if isinstance(weight, int | float) else tuple(weight)
        if len(weights) != 2 or not all(w >= 0 for w in weights):
            raise ValueError(f"weight={weight} must be one number or two, for a and u, none negative")
        for name, value in (("residual_weight", residual_weight), ("huber_delta", huber_delta)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        for name, value in (("sensor_loss", sensor_loss), ("residual_loss", residual_loss)):
            if value not in get_args(FieldLoss):
                raise ValueError(f"{name}={value!r} is unknown; available: {', '.join(get_args(FieldLoss))}")
        if residual_weight:
            self.need_residual()
        self.weights = weights
        self.residual_weight = residual_weight
        self.sensor_loss: FieldLoss = sensor_loss
        self.residual_loss: FieldLoss = residual_loss
        self.huber_delta = huber_delta

    def sample(self, y: Tensor, operator: Sensors, noise: Noise) -> Tensor:
        sensors = self.prior.normalize(operator.adjoint(y.double()))
        mask, counts = operator.mask, operator.count

        def terms(denoised: Tensor, step: SigmaStep) -> Iterator[Tensor]:
            scale = min(step.sigma, 1.0)
            misfit = (denoised - sensors) * mask
            for c in operator.observed:
                if self.weights[c]:
                    yield scale * self.weights[c] * self.mean(misfit[:, c], self.sensor_loss, counts[:, c])
            if step.sigma <= 1 and self.residual_weight:
                residual = self.residual(self.prior.denormalize(denoised))
                yield scale * self.residual_weight * self.mean(residual, self.residual_loss, residual[0].numel())
            yield scale * self.penalty_at(denoised, step, scale)  # EquiReg enters here

        x = self.initial_state(noise, operator, like=sensors)
        for step in self.steps:  # sigma_0 ... sigma_{N-1}, then 0
            is_last = step.sigma_next == 0
            x_c = x.detach().requires_grad_(not is_last)
            x, denoised = self.prior.heun_step(x_c, step)
            if not is_last:
                x = x - self.gradient(terms(denoised, step), x_c, step)
            self.emit(step, self.prior.denormalize(denoised))
        return self.prior.denormalize(x).to(y.dtype)

    def mean(self, r: Tensor, kind: FieldLoss, count: Tensor | int) -> Tensor:
        """The loss (B,) of r (B, H, W), per point of ``count``."""
        if kind == "l1":
            return r.abs().sum((1, 2)) / count
        if kind == "huber":
            return huber_loss(r, torch.zeros_like(r), reduction="none", delta=self.huber_delta).sum((1, 2)) / count
        mse = r.square().sum((1, 2)) / count
        if kind == "mse":
            return mse
        return mse.clamp_min(torch.finfo(mse.dtype).tiny).sqrt()  # the root of an exact 0 has no gradient
