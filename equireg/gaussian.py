"""The Gaussian model of images: mean and covariance of a training set, and the best linear denoiser under it."""

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
        noisy = self.covariance.clone()
        noisy.diagonal().add_(sigma**2)
        weights = torch.linalg.solve(noisy, (x.flatten(1) - self.mean).T)
        return (self.mean + (self.covariance @ weights).T).view_as(x)
