"""Inpainting: some pixels are measured, the others are not."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equireg.noise import SampleNoise
from equireg.operators.base import LinearOperator
from equireg.operators.conjugate_gradients import conjugate_gradients
from equireg.operators.svd import MaskSVD


class Inpainting(LinearOperator):
    """Keeps the pixels where ``mask`` is one: y = mask * x + sigma_y n; the others are zero but for the noise.

    The mask (1, H, W) differs from image to image and is the same for all channels.

    Args:
        noise_on_masked: whether noise is added to the masked pixels as well, as in all published code. It changes no
            gradient, but the norm of y - A x.
        shared: one mask for all images of the run instead of one each.
        shared_seed: seed of that mask, below 2**32.
        sigma_y: standard deviation of the Gaussian noise, of the kept pixels.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if ``shared_seed`` is out of range.
    """

    parameter_names = ("mask",)

    def __init__(
        self,
        noise_on_masked: bool = True,
        shared: bool = False,
        shared_seed: int = 0,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(sigma_y, poisson_rate)
        if not 0 <= shared_seed < 2**32:
            raise ValueError(f"shared_seed={shared_seed} must be between 0 and 2**32 - 1")
        self.noise_on_masked = noise_on_masked
        self.shared = shared
        self.shared_seed = shared_seed

    @abstractmethod
    def draw_mask(self, height: int, width: int, rng: np.random.RandomState) -> np.ndarray:
        """A mask (H, W) of zeros and ones; the order of the calls to ``rng`` is that of the published code."""

    def draw(self, shape: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
        rng = np.random.RandomState(self.shared_seed if self.shared else seed)
        mask = self.draw_mask(*shape[1:], rng)
        return {"mask": torch.from_numpy(mask.astype(np.float32))[None]}

    def with_parameters(self, parameters: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Self:
        """This operator with given masks (B, 1, H, W).

        Raises:
            ValueError: if the masks are missing, do not fit the images, or hold anything but zeros and ones.
        """
        definite = super().with_parameters(parameters, shape)
        mask = definite.mask
        if tuple(mask.shape[1:]) != (1, *shape[1:]):
            raise ValueError(f"mask of shape {tuple(mask.shape)} must be (batch, 1, {shape[1]}, {shape[2]})")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"mask must hold only zeros and ones, got values in [{mask.min():g}, {mask.max():g}]")
        definite.mask = mask.float()
        return definite

    def forward(self, x: Tensor) -> Tensor:
        return self.mask * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.mask * y

    def pinv(self, y: Tensor, ridge: float = 0.0) -> Tensor:
        """mask * y / (1 + ridge).

        Raises:
            ValueError: if ``ridge`` is negative.
        """
        if ridge < 0:
            raise ValueError(f"ridge={ridge} must not be negative")
        return self.mask * y / (1 + ridge)

    def back_projection(self, y: Tensor) -> Tensor:
        """y itself, with the noise on its masked pixels."""
        return y

    def svd(self, shape: tuple[int, int, int], threshold: float = 0.0) -> MaskSVD:
        """The SVD for images of ``shape``; all singular values are one, so ``threshold`` drops none."""
        return MaskSVD(shape, self.mask)

    def add_noise(self, y: Tensor, noise: SampleNoise) -> Tensor:
        y = super().add_noise(y, noise)
        return y if self.noise_on_masked else self.mask * y

    def baseline(self, y: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The masked pixels filled by the solution of Laplace's equation, the kept ones as measured.

        The image border is free (its normal derivative is zero). Conjugate gradients stop at a relative residual of
        1e-4 or after 4 max(H, W) iterations.
        """
        known = self.mask * y
        hole = 1 - self.mask
        filling, _ = conjugate_gradients(
            lambda u: hole * _minus_laplacian(hole * u),
            -hole * _minus_laplacian(known),
            tolerance=1e-4,
            max_iterations=4 * max(shape[1:]),
        )
        return known + filling


class BoxInpainting(Inpainting):
    """Hides a box at a random place, y = 0 inside (the generator of Chung et al., DPS, ICLR 2023; arXiv 2209.14687).

    Args:
        box_size: side of the box in pixels, the smallest one when sides are random.
        box_size_max: largest side, both sides drawn independently; equal to ``box_size`` when left out.
        margin: least number of pixels between box and border, for both axes or (rows, columns).
        outpainting: measures only the box and hides everything else.
        noise_on_masked: whether noise is added to the masked pixels as well, as in all published code.
        shared: one box for all images of the run instead of one each.
        shared_seed: seed of that box, below 2**32.
        sigma_y: standard deviation of the Gaussian noise.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if sizes or margins are out of range.
    """

    def __init__(
        self,
        box_size: int = 128,
        box_size_max: int | None = None,
        margin: int | tuple[int, int] = 16,
        outpainting: bool = False,
        noise_on_masked: bool = True,
        shared: bool = False,
        shared_seed: int = 0,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(noise_on_masked, shared, shared_seed, sigma_y, poisson_rate)
        self.box_size = box_size
        self.box_size_max = box_size if box_size_max is None else box_size_max
        self.margin = (margin, margin) if isinstance(margin, int) else tuple(margin)
        self.outpainting = outpainting
        if box_size < 1:
            raise ValueError(f"box_size={box_size} must be at least 1")
        if self.box_size_max < box_size:
            raise ValueError(f"box_size_max={box_size_max} must not be below box_size={box_size}")
        if len(self.margin) != 2 or min(self.margin) < 0:
            raise ValueError(f"margin={margin} must be one or two numbers that are not negative")

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        for name, n, margin in zip(("height", "width"), shape[1:], self.margin, strict=True):
            if n - 2 * margin - self.box_size_max < 1:  # randint excludes its upper bound
                raise ValueError(
                    f"a box of up to {self.box_size_max} pixels with margin={margin} on both sides needs a {name} of "
                    f"at least {self.box_size_max + 2 * margin + 1}, got {n}"
                )

    def draw_mask(self, height: int, width: int, rng: np.random.RandomState) -> np.ndarray:
        box_height = rng.randint(self.box_size, self.box_size_max + 1)
        box_width = rng.randint(self.box_size, self.box_size_max + 1)
        top = rng.randint(self.margin[0], height - self.margin[0] - box_height)
        left = rng.randint(self.margin[1], width - self.margin[1] - box_width)
        mask = np.ones((height, width))
        mask[top : top + box_height, left : left + box_width] = 0
        return 1 - mask if self.outpainting else mask


class RandomInpainting(Inpainting):
    """Hides pixels chosen at random, in all channels together (the generator of Chung et al., DPS, ICLR 2023).

    Args:
        fraction: smallest and largest fraction of hidden pixels; the fraction is drawn, the number of pixels is exact.
        noise_on_masked: whether noise is added to the masked pixels as well, as in all published code.
        shared: one mask for all images of the run instead of one each.
        shared_seed: seed of that mask, below 2**32.
        sigma_y: standard deviation of the Gaussian noise.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if ``fraction`` is not an interval within [0, 1].
    """

    def __init__(
        self,
        fraction: tuple[float, float] = (0.70, 0.71),
        noise_on_masked: bool = True,
        shared: bool = False,
        shared_seed: int = 0,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(noise_on_masked, shared, shared_seed, sigma_y, poisson_rate)
        self.fraction = tuple(fraction)
        if len(self.fraction) != 2 or not 0 <= self.fraction[0] <= self.fraction[1] <= 1:
            raise ValueError(f"fraction={fraction} must be two numbers with 0 <= low <= high <= 1")

    def draw_mask(self, height: int, width: int, rng: np.random.RandomState) -> np.ndarray:
        fraction = rng.uniform(*self.fraction)
        pixels = height * width
        mask = np.ones(pixels)
        mask[rng.choice(pixels, int(pixels * fraction), replace=False)] = 0
        return mask.reshape(height, width)


def _minus_laplacian(u: Tensor) -> Tensor:
    """Sum of the differences to the two, three or four neighbours."""
    down, right = u.diff(dim=-2), u.diff(dim=-1)
    return (
        F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1)) + F.pad(right, (1, 0, 0, 0)) - F.pad(right, (0, 1, 0, 0))
    )
