"""Diffusion posterior sampling."""

from torch import Tensor

from equireg.noise import Noise
from equireg.operators import Operator
from equireg.priors import VPPrior
from lightning_modules.base import PosteriorSampler, norm


class DPS(PosteriorSampler):
    """Diffusion posterior sampling (Chung et al., ICLR 2023, Alg. 1; arXiv 2209.14687).

    x_t follows the ancestral VP sampler; each step is pushed down the gradient of the distance to y. The norm is not
    squared, so the gradient is normalised by the residual and zeta is a plain step size, as in the published code.
    Equi-DPS is this sampler with the callback EquiReg: its penalty joins the norm and both share one gradient.

    Args:
        prior: a pixel-space VP prior.
        operator: any differentiable operator.
        num_steps: diffusion steps N spread over the prior's schedule, or a respacing string ("ddim50", "10,20,70").
        zeta: step size of the likelihood gradient (dimensionless).
        seed: see ``PosteriorSampler``.

    Cost per step: one forward and one backward of the prior, one of the operator.

    Raises:
        ValueError: if ``zeta`` is not positive.
    """

    takes_state_grad = True

    def __init__(
        self, prior: VPPrior, operator: Operator, num_steps: int | str = 1000, zeta: float = 0.3, seed: int = 0
    ) -> None:
        super().__init__(prior, operator, seed)
        if not zeta > 0:
            raise ValueError(f"zeta={zeta} must be positive")
        self.steps = list(prior.schedule(num_steps))
        self.zeta = zeta

    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        x_t = noise.randn(operator.image_shape, like=y)
        for step in self.steps:  # i = N-1 ... 0
            x_t.requires_grad_()
            denoised = self.prior(x_t, step)
            x0_hat = denoised.x0_hat  # Alg. 1, line 4
            loss = norm(y - operator(x0_hat)) + self.penalty_at(x0_hat, step, self.zeta)
            gradient = self.guidance(loss, x_t, step.k)
            x_t = self.prior.ancestral_step(x_t, denoised, step, noise)  # line 6
            x_t = (x_t - self.zeta * gradient).detach()  # line 7
            self.emit(step, x0_hat)
        return x_t
