"""An analytic prior: images that are Gaussian, with their exact denoiser."""

import numpy as np
import torch
from torch import Tensor, nn

from equireg.priors.schedule import BetaSchedule, make_betas
from equireg.priors.vp import Variance, VPPrior


class GaussianPrior(VPPrior):
    """x_0 ~ N(mean, covariance): a VP prior that knows its score, to learn and to debug with.

    Every sampler runs on it as on a trained prior, and with a linear operator the posterior that it should draw from is
    known (``equireg.gaussian.posterior``). Samples are not bounded, so nothing is clipped. Mean and covariance of a
    training set are those of ``equireg.gaussian.ImageStatistics``.

    Args:
        mean: (C, H, W).
        covariance: (n, n) of the flattened images, n = C H W; positive semidefinite.
        variance: variance of the ancestral step.
        num_train_timesteps, beta_schedule, beta_start, beta_end: the noise schedule, see ``VPPrior``.

    Cost per call: two products of the batch with an n x n matrix; n^3 at construction.

    Raises:
        ValueError: if the shapes do not fit or the covariance is not symmetric positive semidefinite.
    """

    kind = "gaussian_prior"

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        variance: Variance = "fixed_small",
        num_train_timesteps: int = 1000,
        beta_schedule: BetaSchedule = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        nn.Module.__init__(self)
        process = {
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        alpha_bar = np.cumprod(1 - make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end))
        network = GaussianNoisePredictor(mean, covariance, alpha_bar)
        self._complete(network, {"prediction": "epsilon", "variance": variance} | process, clip=False)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError unless images have exactly the shape of the mean."""
        if tuple(shape) != self.image_shape:
            raise ValueError(f"images are {tuple(shape)}, the Gaussian prior is on {self.image_shape}")


class GaussianNoisePredictor(nn.Module):
    """E[eps | x_t] for Gaussian x_0, in the place of a network: called with x_t (B, C, H, W) and times t (B,).

    With the eigenvectors V and eigenvalues l of the covariance it is
    sqrt(1 - a) V diag(1 / (a l + 1 - a)) V^T (x_t - sqrt(a) mean), a = alpha_bar_t. Times need not be whole: between
    them log sigma is linear, as ``time_of_sigma`` has it.

    Args:
        mean: (C, H, W).
        covariance: (n, n).
        alpha_bar: cumulative products of the process, length T.
    """

    side_divisor = 1

    def __init__(self, mean: Tensor, covariance: Tensor, alpha_bar: np.ndarray) -> None:
        super().__init__()
        if tuple(covariance.shape) != (mean.numel(),) * 2:
            raise ValueError(f"covariance is {tuple(covariance.shape)}, a mean of {tuple(mean.shape)} needs n x n")
        double = covariance.double()
        if not torch.allclose(double, double.T, rtol=1e-5, atol=1e-8):
            raise ValueError("covariance must be symmetric")
        eigenvalues, eigenvectors = torch.linalg.eigh(double)
        if eigenvalues[0] < -1e-5 * eigenvalues[-1]:
            raise ValueError(f"covariance must be positive semidefinite; its least eigenvalue is {eigenvalues[0]:g}")
        self.in_channels = self.out_channels = len(mean)
        self.image_size = (mean.shape[1], mean.shape[2])
        self.register_buffer("mean", mean.flatten().to(covariance))
        self.register_buffer("eigenvalues", eigenvalues.clamp_min(0).to(covariance))
        self.register_buffer("eigenvectors", eigenvectors.to(covariance))
        self.register_buffer("log_sigma", torch.from_numpy(0.5 * np.log((1 - alpha_bar) / alpha_bar)))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        below = t.floor().clamp(0, len(self.log_sigma) - 2).long()
        log_sigma = self.log_sigma[below].lerp(self.log_sigma[below + 1], (t - below).to(self.log_sigma)).unsqueeze(1)
        alpha_bar, variance = (-2 * log_sigma).sigmoid(), (2 * log_sigma).sigmoid()  # variance = 1 - alpha_bar, exactly
        weights = (variance.sqrt() / (alpha_bar * self.eigenvalues + variance)).to(x_t)
        centred = x_t.flatten(1) - (alpha_bar.sqrt() * self.mean).to(x_t)
        return (weights * (centred @ self.eigenvectors) @ self.eigenvectors.T).view_as(x_t)
