"""Blur with periodic borders, the operator whose regularised inverse is a closed form in Fourier space."""

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg.operators.base import LinearOperator
from equireg.operators.blur import BASELINE_RIDGE, gaussian_taps
from equireg.operators.separable import SMALLEST_INVERTIBLE


class CircularBlur(LinearOperator):
    """Periodic convolution with a kernel, then every factor-th pixel: the operator of DiffPIR and USRNet.

    A true convolution (the kernel is flipped, unlike in the reflecting blurs), centred at index k // 2. Its border
    differs from that of ``GaussianDeblur``, so results of the two are not comparable.

    Args:
        kernel_size: side of the Gaussian kernel in pixels.
        sigma_kernel: standard deviation of the kernel in pixels; other kernels (B, k, k) enter by ``with_parameters``.
        factor: the measurement keeps the pixels 0, factor, 2 factor, ...; 1 for deblurring.
        sigma_y: standard deviation of the Gaussian noise.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if an argument is not positive.
    """

    parameter_names = ("kernel",)

    def __init__(
        self,
        kernel_size: int = 61,
        sigma_kernel: float = 3.0,
        factor: int = 1,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(sigma_y, poisson_rate)
        for name, value in (("kernel_size", kernel_size), ("sigma_kernel", sigma_kernel), ("factor", factor)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        self.kernel_size = kernel_size
        self.sigma_kernel = sigma_kernel
        self.factor = factor

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        self._check_shape(shape, self.kernel_size)

    def _check_shape(self, shape: tuple[int, int, int], kernel_size: int) -> None:
        if min(shape[1:]) < kernel_size or shape[1] % self.factor or shape[2] % self.factor:
            raise ValueError(
                f"a kernel of {kernel_size}x{kernel_size} pixels and factor={self.factor} need image sides of at least "
                f"{kernel_size} that are multiples of {self.factor}, got {shape[1]}x{shape[2]}"
            )

    def y_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return (shape[0], shape[1] // self.factor, shape[2] // self.factor)

    def draw(self, shape: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
        taps = torch.from_numpy(gaussian_taps(self.kernel_size, self.sigma_kernel)).float()
        return {"kernel": torch.outer(taps, taps)}

    def with_parameters(self, parameters: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Self:
        """This operator with given kernels (B, k, k).

        Raises:
            ValueError: if the kernels are missing, not square, not finite, or do not fit the images.
        """
        definite = super().with_parameters(parameters, shape)
        kernel = definite.kernel
        if kernel.ndim != 3 or kernel.shape[1] != kernel.shape[2]:
            raise ValueError(f"kernel of shape {tuple(kernel.shape)} must be (batch, k, k)")
        if not kernel.isfinite().all():
            raise ValueError("kernel must hold only finite numbers")
        self._check_shape(shape, kernel.shape[-1])
        return definite

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        blurred = torch.fft.irfft2(torch.fft.rfft2(x) * self._transfer(x, size), s=size)
        return blurred[..., :: self.factor, :: self.factor]

    def adjoint(self, y: Tensor) -> Tensor:
        size = (y.shape[-2] * self.factor, y.shape[-1] * self.factor)
        spread = y.new_zeros(*y.shape[:2], *size)
        spread[..., :: self.factor, :: self.factor] = y
        return torch.fft.irfft2(torch.fft.rfft2(spread) * self._transfer(y, size).conj(), s=size)

    def pinv(self, y: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
        """A^T (A A^T + ridge I)^-1 y; A A^T is the periodic convolution whose spectrum averages |K|^2 over aliases.

        Args:
            y: measurements (B, C, h, w).
            ridge: one number, or one per image (B, 1, 1, 1).

        Raises:
            ValueError: if ``ridge`` is negative, or zero while singular values below 1e-3 of the largest exist.
        """
        height, width = y.shape[-2:]
        kernel = self.kernel.to(y.dtype)
        transfer = torch.fft.fft2(_centred(kernel, (height * self.factor, width * self.factor)))
        blocks = transfer.abs().square().unflatten(-1, (self.factor, width)).unflatten(-3, (self.factor, height))
        power = blocks.mean((1, 3))[:, None]
        ridge = torch.as_tensor(ridge).to(y)
        if (ridge < 0).any() or ((ridge == 0).any() and power.min() < SMALLEST_INVERTIBLE**2 * power.max()):
            raise ValueError(
                f"ridge={ridge.min():g} must be positive: the singular values of CircularBlur go from "
                f"{power.max().sqrt():.2g} down to {power.min().sqrt():.2g}"
            )
        return self.adjoint(torch.fft.ifft2(torch.fft.fft2(y) / (power + ridge)).real)

    def back_projection(self, y: Tensor) -> Tensor:
        """Enlargement by repeating the nearest pixel; y itself when nothing is reduced."""
        return F.interpolate(y, scale_factor=self.factor, mode="nearest")

    def baseline(self, y: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Bicubic enlargement, or the Tikhonov solution around the mean grey that the reflecting blurs offer."""
        if self.factor > 1:
            return F.interpolate(y, size=shape[1:], mode="bicubic", align_corners=False)
        noise = self.sigma_y if self.poisson_rate is None else (2 / (255 * self.poisson_rate)) ** 0.5  # at mid-grey
        grey = y.mean((2, 3), keepdim=True)
        return grey + self.pinv(y - grey, ridge=BASELINE_RIDGE * max(noise, 1e-3) ** 2)

    def _transfer(self, like: Tensor, size: tuple[int, int]) -> Tensor:
        """Fourier transforms (B, 1, H, W // 2 + 1) of the kernels."""
        return torch.fft.rfft2(_centred(self.kernel.to(like.dtype), size))[:, None]


def _centred(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Kernels (B, k, k) zero-padded to ``size``, their index k // 2 moved to the origin."""
    missing = [n - k for n, k in zip(size, kernel.shape[-2:], strict=True)]
    shift = -(kernel.shape[-1] // 2)
    return F.pad(kernel, (0, missing[1], 0, missing[0])).roll((shift, shift), dims=(-2, -1))
