"""Coordinates in which the noise of a function-space diffusion is white."""

import torch
from torch import Tensor

from equireg.pde.random_fields import RandomField, WhiteNoise, exponential_covariance


class NoiseBasis:
    """Maps fields to coordinates in which a noise has independent components of variance 1, and back.

    Args:
        noise: the law of the noise.
        size: side of the fields; the covariance of exponential noise has size^4 entries.
        dtype: of the fields.
    """

    def __init__(self, noise: RandomField, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.factor: Tensor | None = None
        if not isinstance(noise, WhiteNoise):
            self.factor = torch.linalg.cholesky(exponential_covariance(size, noise.scale, noise.eps)).to(dtype)

    def whiten(self, fields: Tensor) -> Tensor:
        """Fields (B, C, N, N) in these coordinates, of the same shape."""
        if self.factor is None:
            return fields
        columns = fields.flatten(2).flatten(0, 1).T
        return torch.linalg.solve_triangular(self.factor, columns, upper=False).T.reshape(fields.shape)

    def colour(self, fields: Tensor) -> Tensor:
        """The inverse of ``whiten``."""
        return fields if self.factor is None else (fields.flatten(2) @ self.factor.T).view_as(fields)
