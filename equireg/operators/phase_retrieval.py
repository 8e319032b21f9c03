"""Phase retrieval: the moduli of an image's Fourier transform."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg.operators.base import Operator


class PhaseRetrieval(Operator):
    """A(x) = |FFT(pad((x + 1) / 2))|, orthonormal, the zero frequency in the middle, every channel on its own.

    The image is padded with black on all four sides by int(oversampling / 8 * resolution) pixels: ``oversampling`` 2
    makes the side one and a half times as long. A does not tell an image from itself turned by 180 degrees or shifted
    on the canvas; run it with the callback BestOf. sigma_y is in units of the moduli, most of which are near 0.01.

    Args:
        oversampling: as the published codes count it (DPS, DAPS).
        resolution: the side that the padding is computed from; the images' shorter side when left out.
        signed: transforms images in [-1, 1] as they are (DPS, ReSample) instead of in [0, 1] (DAPS, SITCOM,
            DiffStateGrad): twice the moduli at the same noise, padding of mid-grey, and x and -x look the same.
        sigma_y: standard deviation of the Gaussian noise.

    Raises:
        ValueError: if ``oversampling`` or ``resolution`` is not positive, or the padding has no pixel.
    """

    has_baseline = False

    def __init__(
        self,
        oversampling: float = 2.0,
        resolution: int | None = None,
        signed: bool = False,
        sigma_y: float = 0.05,
    ) -> None:
        super().__init__(sigma_y)
        if not (oversampling > 0 and math.isfinite(oversampling)):
            raise ValueError(f"oversampling={oversampling} must be a positive number")
        if resolution is not None and resolution < 1:
            raise ValueError(f"resolution={resolution} must be at least 1")
        self.oversampling = oversampling
        self.resolution = resolution
        self.signed = signed

    def padding(self, shape: tuple[int, int, int]) -> int:
        """Pixels added on every side of images of ``shape`` (C, H, W)."""
        return int(self.oversampling / 8 * (self.resolution or min(shape[1:])))

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        if self.padding(shape) < 1:
            raise ValueError(
                f"oversampling={self.oversampling:g} pads images of {shape[1]}x{shape[2]} by less than one pixel; it "
                f"must be at least {8 / (self.resolution or min(shape[1:])):g}"
            )

    def y_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        pad = self.padding(shape)
        return (shape[0], shape[1] + 2 * pad, shape[2] + 2 * pad)

    def forward(self, x: Tensor) -> Tensor:
        canvas = F.pad(x if self.signed else (x + 1) / 2, (self.padding(tuple(x.shape[1:])),) * 4)
        spectrum = torch.fft.fft2(torch.fft.ifftshift(canvas, dim=(-2, -1)), norm="ortho")
        return torch.fft.fftshift(spectrum, dim=(-2, -1)).abs()
