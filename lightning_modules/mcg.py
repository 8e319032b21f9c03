"""Manifold constrained gradients."""

import math

from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Blur, Inpainting, LinearOperator, Operator, SuperResolution
from equireg.priors import VPPrior
from lightning_modules.base import PosteriorSampler, norm


class MCG(PosteriorSampler):
    """Manifold constrained gradients (Chung et al., NeurIPS 2022, Alg. 1 and 2; arXiv 2206.00941).

    The gradient step of DPS, then a projection onto the measurement noised to the level of the step. The method takes y
    to be free of noise: with noise the projection writes it into the picture, hence the weak results of the
    literature. The published code re-noises y at the level before the step, so that the last state still carries noise
    of standard deviation sqrt(1 - alpha_bar_0) = 0.01 on what was measured.

    The projections: inpainting replaces the kept pixels (published); super-resolution adds the nearest enlargement of
    the residual, which is not exact (published); every other linear operator adds A^T (A A^T + ridge I)^-1 of the
    residual, our extension where the published code computes y - A y - A x.

    Args:
        prior: a pixel-space VP prior.
        operator: a linear operator.
        num_steps: diffusion steps N or a respacing string.
        zeta: step size of the gradient (dimensionless); 1 in the published inpainting code.
        ridge: regularisation of the projection for operators other than inpainting and super-resolution; the
            directions with a squared singular value below it are kept from the prior.
        final_replace: project the result onto y itself once more, which removes the noise of the last level.
        legacy_projection: the published projection of the blurs, (I - A) y_t - A x, to remake the tables that used it.
        seed: see ``PosteriorSampler``.

    Cost per step: one forward and one backward of the prior.

    Raises:
        ValueError: if ``zeta`` or ``ridge`` is not positive, or ``legacy_projection`` is asked of another operator.
    """

    linear_only = True

    def __init__(
        self,
        prior: VPPrior,
        operator: LinearOperator,
        num_steps: int | str = 1000,
        zeta: float = 1.0,
        ridge: float = 1e-3,
        final_replace: bool = False,
        legacy_projection: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, operator, seed)
        for name, value in (("zeta", zeta), ("ridge", ridge)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if legacy_projection and not isinstance(operator, Blur):
            raise ValueError(f"legacy_projection is the published code's for blurs, not for {type(operator).__name__}")
        self.steps = list(prior.schedule(num_steps))
        self.zeta = zeta
        self.ridge = ridge
        self.final_replace = final_replace
        self.legacy_projection = legacy_projection

    @classmethod
    def is_extension(cls, operator: Operator) -> bool:
        return not isinstance(operator, Inpainting | SuperResolution)

    def sample(self, y: Tensor, operator: LinearOperator, noise: Noise) -> Tensor:
        if isinstance(operator, Inpainting):
            y = operator(y)  # without the noise on masked pixels
        x_t = noise.randn(operator.image_shape, like=y)
        for step in self.steps:  # i = N-1 ... 0
            x_t.requires_grad_()
            denoised = self.prior(x_t, step)
            x0_hat = denoised.x0_hat
            loss = norm(y - operator(x0_hat)) + self.penalty_at(x0_hat, step, self.zeta)
            gradient = self.guidance(loss, x_t)
            x_t = self.prior.ancestral_step(x_t, denoised, step, noise)
            x_t = (x_t - self.zeta * gradient).detach()  # Alg. 1, line 6
            n = noise.randn(tuple(y.shape[1:]), like=y)
            y_t = math.sqrt(step.alpha_bar) * y + math.sqrt(1 - step.alpha_bar) * n
            x_t = self.project(x_t, y_t, operator)  # line 7
            self.emit(step, x0_hat)
        return self.project(x_t, y, operator) if self.final_replace else x_t

    def project(self, x: Tensor, y: Tensor, operator: LinearOperator) -> Tensor:
        """x moved to where it measures y, exactly for inpainting only."""
        if self.legacy_projection:
            return y - operator(y) - operator(x)
        if isinstance(operator, Inpainting):
            return x - operator(x) + operator(y)
        if isinstance(operator, SuperResolution):
            return x + operator.back_projection(y - operator(x))
        return x + operator.pinv(y - operator(x), ridge=self.ridge)
