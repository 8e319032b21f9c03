"""What the samplers of two-channel fields share: normalised float64 states, the residual, one gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Operator, Sensors
from equireg.pde.residuals import PUBLISHED, RESIDUALS, Residual, ResidualName
from equireg.priors import EDMPrior, SigmaStep
from lightning_modules.base import PosteriorSampler


class FieldSampler(PosteriorSampler):
    """Samples fields x = (a, u) given sensors on them, along the chain of an EDM prior.

    Measurements and results are in physical units, the state is normalised and in float64; the network computes in
    float32. A regulariser is given the normalised denoised field.

    Args:
        prior: a prior on fields.
        operator: the sensors.
        num_steps: noise levels above 0.
        sigma_max, sigma_min, rho: the levels, see ``EDMPrior.steps``. Far above the fields' standard deviation, 0.5
            normalised, nothing is decided: of few steps more count when the first is at 3 and not at the published 80.
        residual: the equation's residual; the published one of the prior's equation when left out.
        temperature: factor of the initial noise. 1 draws from the posterior; towards 0 the draws gather around its
            middle, which halves the squared error of a mean: where all is Gaussian, exact guidance ends at the
            posterior mean from 0.
        merge_losses: differentiate the sum of all guidance terms once. The published codes differentiate each by
            itself, which gives the same up to rounding and costs a backward pass more per term.
        seed: see ``PosteriorSampler``.

    Raises:
        ValueError: if an argument is out of range, or ``residual`` is needed and unknown.
    """

    space = "field"

    def __init__(
        self,
        prior: EDMPrior,
        operator: Sensors,
        num_steps: int,
        sigma_max: float,
        sigma_min: float,
        rho: float,
        residual: ResidualName | None,
        temperature: float,
        merge_losses: bool,
        seed: int,
    ) -> None:
        super().__init__(prior, operator, seed)
        self.steps = prior.steps(num_steps, sigma_max, sigma_min, rho)
        name = residual or PUBLISHED.get(prior.pde)
        if name is not None and name not in RESIDUALS:
            raise ValueError(f"residual={name!r} is unknown; available: {', '.join(RESIDUALS)}")
        self.residual: Residual | None = RESIDUALS.get(name)
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature} must not be negative")
        self.temperature = temperature
        self.merge_losses = merge_losses

    @classmethod
    def supports(cls, operator: Operator) -> str | None:
        if not isinstance(operator, Sensors):
            return f"{cls.__name__} restores fields from Sensors, not from {type(operator).__name__}"
        return super().supports(operator)

    def need_residual(self) -> None:
        """Raises ValueError where there is no residual to weigh."""
        if self.residual is None:
            raise ValueError(f"{type(self).__name__}: name the residual, the prior does not tell its equation")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError(f"{type(self).__name__} computes in float64, which mps lacks; set trainer.accelerator=cpu")
        self.prior.check_equation(getattr(self.trainer.datamodule, "pde", None))

    def initial_state(self, noise: Noise, operator: Sensors, like: Tensor) -> Tensor:
        """x at the highest noise level (B, 2, H, W)."""
        return self.steps[0].sigma * self.temperature * self.prior.draw_noise(noise, operator.image_shape, like)

    def gradient(self, terms: Iterable[Tensor], x: Tensor, step: SigmaStep) -> Tensor:
        """Gradient of the sum of the terms (B,) with respect to x, in one backward pass where they are merged."""
        active = [term for term in terms if term.requires_grad]  # a penalty of weight zero has no graph
        if not active:
            return torch.zeros_like(x)
        if self.merge_losses:
            return self.guidance(torch.stack(active).sum(0), x, step.k)
        ones = torch.ones_like(active[0])
        return sum(torch.autograd.grad(term, x, ones, retain_graph=term is not active[-1])[0] for term in active)

    def _equivariance_error(self, x: Tensor) -> list[float]:
        return self.penalty.error(self.prior.normalize(x.double())).tolist()
