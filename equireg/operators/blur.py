"""Blurs with reflected borders: A(x)[i, j] = sum over u, v of kernel[u, v] x[i + u, j + v], in every channel."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equireg.operators.base import LinearOperator
from equireg.operators.motion_kernel import motion_kernel
from equireg.operators.separable import SeparableOperator

BASELINE_RIDGE = 20.0
"""Ridge of the baseline picture over sigma_y squared."""


class Blur(LinearOperator):
    """What the blurs share: borders reflected without repeating the border pixel, and a restored picture to beat.

    Args:
        kernel_size: odd side of the kernel in pixels.
        sigma_y: standard deviation of the Gaussian noise.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if ``kernel_size`` is even or not positive.
    """

    def __init__(self, kernel_size: int, sigma_y: float = 0.05, poisson_rate: float | None = None) -> None:
        super().__init__(sigma_y, poisson_rate)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and positive")
        self.kernel_size = kernel_size

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        _check_radius(self.kernel_size, shape)

    def back_projection(self, y: Tensor) -> Tensor:
        """y itself."""
        return y

    def baseline(self, y: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The Tikhonov solution around the mean grey: the x that minimises |A x - y|^2 + ridge |x - mean(y)|^2.

        The ridge is 20 times the noise variance, chosen by PSNR on faces of 64 x 64 pixels with sigma_y = 0.05.
        """
        noise = self.sigma_y if self.poisson_rate is None else (2 / (255 * self.poisson_rate)) ** 0.5  # at mid-grey
        grey = y.mean((2, 3), keepdim=True)  # A leaves it as it is, for the kernel's sum is one
        return grey + self.pinv(y - grey, ridge=BASELINE_RIDGE * max(noise, 1e-3) ** 2)


class GaussianDeblur(SeparableOperator, Blur):
    """Blur with a Gaussian kernel, cut off at four standard deviations like scipy's ``gaussian_filter``.

    Args:
        kernel_size: odd side of the kernel in pixels.
        sigma_kernel: standard deviation of the kernel in pixels.
        sigma_y: standard deviation of the Gaussian noise.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if ``kernel_size`` is even or not positive, or ``sigma_kernel`` is not positive.
    """

    def __init__(
        self,
        kernel_size: int = 61,
        sigma_kernel: float = 3.0,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(kernel_size, sigma_y, poisson_rate)
        if not sigma_kernel > 0:
            raise ValueError(f"sigma_kernel={sigma_kernel} must be positive")
        self.sigma_kernel = sigma_kernel

    def matrix(self, n: int) -> Tensor:
        return gaussian_blur_matrix(n, self.kernel_size, self.sigma_kernel)


class MotionDeblur(Blur):
    """Blur along a random camera path (LeviBorodenko/motionblur); the kernel (k, k) differs from image to image.

    The kernel is not flipped: a cross-correlation, as in the published code. It is evaluated with FFTs of the padded
    image, which equals sliding a window up to rounding and takes a thirtieth of the time for 61 x 61 pixels on a CPU.

    Args:
        kernel_size: odd side of the drawn kernels in pixels.
        intensity: 0 for straight motion to 1 for erratic motion.
        shared: one kernel for all images of the run instead of one each.
        shared_seed: seed of that kernel, below 2**32.
        sigma_y: standard deviation of the Gaussian noise.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if ``kernel_size`` is even or not positive, or ``intensity`` or ``shared_seed`` out of range.
    """

    parameter_names = ("kernel",)

    def __init__(
        self,
        kernel_size: int = 61,
        intensity: float = 0.5,
        shared: bool = False,
        shared_seed: int = 0,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(kernel_size, sigma_y, poisson_rate)
        if not 0 <= intensity <= 1:
            raise ValueError(f"intensity={intensity} must be in [0, 1]")
        if not 0 <= shared_seed < 2**32:
            raise ValueError(f"shared_seed={shared_seed} must be between 0 and 2**32 - 1")
        self.intensity = intensity
        self.shared = shared
        self.shared_seed = shared_seed

    def draw(self, shape: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
        rng = np.random.RandomState(self.shared_seed if self.shared else seed)
        return {"kernel": torch.from_numpy(motion_kernel(self.kernel_size, self.intensity, rng))}

    def with_parameters(self, parameters: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Self:
        """This operator with given kernels (B, k, k), of any odd k that fits the images.

        Raises:
            ValueError: if the kernels are missing, not square with an odd side, not finite, or their sums are not one.
        """
        definite = super().with_parameters(parameters, shape)
        kernel = definite.kernel
        if kernel.ndim != 3 or kernel.shape[1] != kernel.shape[2] or kernel.shape[1] % 2 == 0:
            raise ValueError(f"kernel of shape {tuple(kernel.shape)} must be (batch, k, k) with an odd k")
        if not kernel.isfinite().all():
            raise ValueError("kernel must hold only finite numbers")
        worst = max(kernel.sum((1, 2)).tolist(), key=lambda total: abs(total - 1))
        if abs(worst - 1) > 1e-3:
            raise ValueError(f"every kernel must have the sum 1 (within 0.001), got {worst:g}")
        _check_radius(kernel.shape[1], shape)
        return definite

    def forward(self, x: Tensor) -> Tensor:
        radius = self.kernel.shape[-1] // 2
        transfer, size = self._transfer(x)
        padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
        blurred = torch.fft.irfft2(torch.fft.rfft2(padded, s=size) * transfer.conj(), s=size)
        return blurred[..., : x.shape[-2], : x.shape[-1]]

    def adjoint(self, y: Tensor) -> Tensor:
        radius = self.kernel.shape[-1] // 2
        transfer, size = self._transfer(y)
        spread = torch.fft.irfft2(torch.fft.rfft2(y, s=size) * transfer, s=size)
        spread = spread[..., : y.shape[-2] + 2 * radius, : y.shape[-1] + 2 * radius]
        return _fold_reflection(_fold_reflection(spread, radius, dim=-2), radius, dim=-1)

    def _transfer(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Fourier transforms of the kernels, and their size (h, w): that of the padded images or a little more."""
        height, width = (_fft_length(n + self.kernel.shape[-1] - 1) for n in x.shape[-2:])
        return torch.fft.rfft2(self.kernel.to(x.dtype)[:, None], s=(height, width)), (height, width)


@lru_cache(maxsize=32)
def gaussian_blur_matrix(n: int, kernel_size: int, sigma_kernel: float) -> Tensor:
    """The one-dimensional blur of n reflected pixels as a matrix (n, n), float64."""
    columns = np.pad(np.arange(n), kernel_size // 2, mode="reflect")
    matrix = np.zeros((n, n))
    for i, tap in enumerate(gaussian_taps(kernel_size, sigma_kernel)):
        np.add.at(matrix, (np.arange(n), columns[i : i + n]), tap)
    with torch.inference_mode(False):
        return torch.from_numpy(matrix)


def gaussian_taps(kernel_size: int, sigma_kernel: float) -> np.ndarray:
    """The one-dimensional kernel (kernel_size,), float64; the two-dimensional one is its outer product with itself.

    This is scipy's ``gaussian_filter1d`` of a unit impulse: tails beyond ``kernel_size`` are reflected back into it.
    """
    radius = int(4 * sigma_kernel + 0.5)
    gaussian = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_kernel) ** 2)
    impulse = np.zeros(kernel_size)
    impulse[kernel_size // 2] = 1
    return np.convolve(np.pad(impulse, radius, mode="symmetric"), gaussian / gaussian.sum(), mode="valid")


def _check_radius(kernel_size: int, shape: tuple[int, int, int]) -> None:
    if min(shape[1:]) <= kernel_size // 2:
        raise ValueError(
            f"a kernel of {kernel_size}x{kernel_size} pixels needs images of at least {kernel_size // 2 + 1} pixels on "
            f"each side to reflect their borders, got {shape[1]}x{shape[2]}"
        )


@lru_cache(maxsize=256)
def _fft_length(n: int) -> int:
    """The smallest number from n on without a prime factor above 5, for which FFTs are fast."""
    rest = n
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return n if rest == 1 else _fft_length(n + 1)


def _fold_reflection(padded: Tensor, radius: int, dim: int) -> Tensor:
    """The adjoint of reflect padding by ``radius`` along ``dim``."""
    n = padded.shape[dim] - 2 * radius
    folded = padded.narrow(dim, radius, n).clone()
    folded.narrow(dim, 1, radius).add_(padded.narrow(dim, 0, radius).flip(dim))
    folded.narrow(dim, n - 1 - radius, radius).add_(padded.narrow(dim, radius + n, radius).flip(dim))
    return folded
