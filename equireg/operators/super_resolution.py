"""Super-resolution: the measurement is a reduced image."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equireg.operators.separable import SeparableOperator


class SuperResolution(SeparableOperator):
    """Reduces (H, W) to (ceil(H / factor), ceil(W / factor)) pixels like MATLAB's ``imresize``: bicubic, antialiased.

    The operator learns H and W from ``realize``; before that, ``adjoint`` and ``pinv`` take them to be multiples of
    ``factor``.

    Args:
        factor: how many times smaller the measurement is.
        sigma_y: standard deviation of the Gaussian noise.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if ``factor`` is below 2.
    """

    def __init__(self, factor: int = 4, sigma_y: float = 0.05, poisson_rate: float | None = None) -> None:
        super().__init__(sigma_y, poisson_rate)
        if factor < 2:
            raise ValueError(f"factor={factor} must be at least 2")
        self.factor = factor

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        if min(shape[1:]) < self.factor:
            raise ValueError(f"images of {shape[1]}x{shape[2]} pixels cannot be reduced by factor={self.factor}")

    def y_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return (shape[0], *(-(-n // self.factor) for n in shape[1:]))

    def image_size(self, y: Tensor) -> tuple[int, int]:
        if self.image_shape is None:
            return y.shape[-2] * self.factor, y.shape[-1] * self.factor
        return self.image_shape[1:]

    def matrix(self, n: int) -> Tensor:
        return bicubic_matrix(n, self.factor)

    def back_projection(self, y: Tensor) -> Tensor:
        """Enlargement by repeating the nearest pixel, without division by factor squared."""
        return F.interpolate(y, size=self.image_size(y), mode="nearest")

    def baseline(self, y: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Bicubic enlargement."""
        return F.interpolate(y, size=shape[1:], mode="bicubic", align_corners=False)


@lru_cache(maxsize=32)
def bicubic_matrix(n: int, factor: int) -> Tensor:
    """The reduction of n pixels as a matrix (ceil(n / factor), n), float64.

    Keys' cubic stretched by ``factor``, rows normalised to sum one, then borders reflected, border pixel included.
    """
    m = -(-n // factor)
    output = np.arange(1, m + 1)  # MATLAB counts from one
    centre = factor * (output - (m - n / factor) / 2) + (1 - factor) / 2
    taps = np.floor(centre - 2 * factor)[:, None] + np.arange(4 * factor + 2)
    weights = _keys_cubic((centre[:, None] - taps) / factor)
    weights /= weights.sum(axis=1, keepdims=True)
    columns = (taps.astype(int) - 1) % (2 * n)
    columns = np.minimum(columns, 2 * n - 1 - columns)
    matrix = np.zeros((m, n))
    np.add.at(matrix, (output[:, None] - 1, columns), weights)
    with torch.inference_mode(False):
        return torch.from_numpy(matrix)


def _keys_cubic(t: np.ndarray) -> np.ndarray:
    """Cubic convolution with a = -1/2 (Keys, 1981)."""
    t = np.abs(t)
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t <= 1, near, np.where(t <= 2, far, 0))
