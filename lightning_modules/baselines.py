"""What a posterior sampler has to beat: the plain picture, and the best linear estimate."""

import torch
from torch import Tensor, nn

from equireg.gaussian import ImageStatistics
from equireg.noise import Noise
from equireg.operators import LinearOperator, Operator
from equireg.operators.conjugate_gradients import conjugate_gradients
from lightning_modules.base import PosteriorSampler


class NoPrior(nn.Module):
    """Stands where a sampler without a diffusion prior has none; takes images of any shape."""

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Accepts every shape."""


class MeasurementBaseline(PosteriorSampler):
    """The operator's plain picture of y: bicubic enlargement, filled holes, regularised pseudo-inverse.

    Args:
        operator: any operator with a baseline picture.
        seed: see ``PosteriorSampler``.
    """

    def __init__(self, operator: Operator, seed: int = 0) -> None:
        super().__init__(NoPrior(), operator, seed)

    @classmethod
    def supports(cls, operator: Operator) -> str | None:
        if not operator.has_baseline:
            return f"{cls.__name__} needs a plain picture of the measurement, {type(operator).__name__} has none"
        return super().supports(operator)

    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        return operator.baseline(y, operator.image_shape)


class LinearMMSE(PosteriorSampler):
    """The posterior mean under a Gaussian with the training set's mean and covariance: the honest bar for PSNR.

    x_hat = mu + C A^T (A C A^T + sigma_y^2 I)^-1 (y - A mu), solved by conjugate gradients.

    Args:
        operator: a linear operator with Gaussian noise.
        iterations: at most this many conjugate gradient steps.
        tolerance: relative residual at which an image is done.
        seed: see ``PosteriorSampler``.

    The training set is the data module's ``train`` split.
    """

    linear_only = True
    uses_sigma_y = True

    def __init__(
        self, operator: LinearOperator, iterations: int = 2000, tolerance: float = 1e-4, seed: int = 0
    ) -> None:
        super().__init__(NoPrior(), operator, seed)
        self.iterations = iterations
        self.tolerance = tolerance
        self.statistics: ImageStatistics | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.statistics = ImageStatistics.of(self.trainer.datamodule.dataset("train"))

    @torch.no_grad()
    def sample(self, y: Tensor, operator: LinearOperator, noise: Noise) -> Tensor:
        covariance = self.statistics.covariance.to(y)
        mean = self.statistics.mean.to(y).view(1, *operator.image_shape)
        variance = operator.noise_std(y).square().clamp_min(1e-6).view(-1, *[1] * (y.ndim - 1))

        def smooth(x: Tensor) -> Tensor:
            return (x.flatten(1) @ covariance).view_as(x)

        def system(v: Tensor) -> Tensor:
            return operator(smooth(operator.adjoint(v))) + variance * v

        residual = y - operator(mean.expand(len(y), -1, -1, -1))
        solution, converged = conjugate_gradients(system, residual, self.tolerance, self.iterations)
        if not converged.all():
            raise RuntimeError(f"LinearMMSE did not converge in iterations={self.iterations}")
        return mean + smooth(operator.adjoint(solution))
