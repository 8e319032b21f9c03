"""The Gaussian model of images: mean and covariance of a training set, and the best linear denoiser under it."""

from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset


class ImageStatistics:
    """Mean and covariance of flattened images.

    Args:
        images: (N, C, H, W) in [-1, 1].
    """

    def __init__(self, images: Tensor) -> None:
        flat = images.flatten(1)
        self.mean = flat.mean(0)
        centred = flat - self.mean
        self.covariance = centred.T @ centred / (len(flat) - 1)

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """Those of the images ``x`` of a data set."""
        return cls(torch.stack([dataset[i]["x"] for i in range(len(dataset))]))

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """Linear minimum mean square error estimate of x_0 from x = x_0 + sigma n; x is (B, C, H, W)."""
        variances, directions = self._principal
        with torch.autocast(x.device.type, enabled=False):  # products in half precision would lose the fine structure
            coefficients = (x.flatten(1) - self.mean) @ directions * (variances / (variances + sigma**2))
            return (self.mean + coefficients @ directions.T).view_as(x)

    @cached_property
    def _principal(self) -> tuple[Tensor, Tensor]:
        """Variances and directions (in columns) of the principal components."""
        variances, directions = torch.linalg.eigh(self.covariance)
        return variances.clamp_min(0), directions


def posterior(mean: Tensor, covariance: Tensor, matrix: Tensor, y: Tensor, sigma_y: float) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of x ~ N(mean, covariance) given y = matrix x + sigma_y n.

    Args:
        mean: (n,).
        covariance: (n, n).
        matrix: (m, n).
        y: (m,).
        sigma_y: standard deviation of the noise; positive unless matrix covariance matrix^T is invertible.
    """
    innovation = matrix @ covariance @ matrix.T
    innovation.diagonal().add_(sigma_y**2)
    gain = torch.linalg.solve(innovation, matrix @ covariance).T
    return mean + gain @ (y - matrix @ mean), covariance - gain @ matrix @ covariance
