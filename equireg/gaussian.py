"""The Gaussian model of images: mean and covariance of a training set, and the best linear denoiser under it."""

import torch
from torch import Tensor


class ImageStatistics:
    """Mean and covariance of flattened images.

    Args:
        images: (N, C, H, W); uint8, or float in [-1, 1].
    """

    def __init__(self, images: Tensor) -> None:
        flat = images.flatten(1)
        flat = flat.float() / 127.5 - 1 if images.dtype == torch.uint8 else flat.float()
        self.shape = tuple(images.shape[1:])
        self.mean = flat.mean(0)
        centred = flat - self.mean
        self.covariance = centred.T @ centred / (len(flat) - 1)

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """Linear minimum mean square error estimate of x_0 from x = x_0 + sigma n; x is (B, C, H, W)."""
        noisy = self.covariance.clone()
        noisy.diagonal().add_(sigma**2)
        weights = torch.linalg.solve(noisy, (x.flatten(1) - self.mean).T)
        return (self.mean + (self.covariance @ weights).T).view_as(x)
