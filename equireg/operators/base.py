"""The contract of a measurement operator A in y = A(x) + noise."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from equireg.noise import SampleNoise
from equireg.operators.conjugate_gradients import conjugate_gradients
from equireg.operators.svd import OperatorSVD


class Operator(nn.Module, ABC):
    """A measurement operator with its noise, y = A(x) + sigma_y n.

    An operator is described by its constructor and becomes definite by ``realize``, which draws what differs from image
    to image (a mask, a kernel). ``forward`` is differentiable and per image: row i of y depends on row i of x alone.

    Args:
        sigma_y: standard deviation of the Gaussian measurement noise, in the units of A(x) (images are in [-1, 1]).
        poisson_rate: replaces the Gaussian noise by Poisson noise: with u = clip((A(x)+1)/2, 0, 1),
            y = 2 Poisson(255 rate u) / (255 rate) - 1, clipped to [-1, 1].

    Raises:
        ValueError: if ``sigma_y`` is negative or ``poisson_rate`` is not positive.
    """

    parameter_names: tuple[str, ...] = ()
    """Buffers that ``realize`` draws, each with the batch as first axis; ``mode: given`` reads them from files."""

    has_baseline = True
    """Whether a plain picture can be made of y, see ``baseline``."""

    def __init__(self, sigma_y: float = 0.05, poisson_rate: float | None = None) -> None:
        super().__init__()
        if not sigma_y >= 0:
            raise ValueError(f"sigma_y={sigma_y} must not be negative")
        if poisson_rate is not None and not poisson_rate > 0:
            raise ValueError(f"poisson_rate={poisson_rate} must be positive")
        self.sigma_y = sigma_y
        self.poisson_rate = poisson_rate
        self.image_shape: tuple[int, int, int] | None = None
        """(C, H, W) of the images, once realised."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A(x) for images x (B, C, H, W)."""

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when images of this (C, H, W) cannot be measured."""

    def y_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of one measurement of an image of ``shape`` (C, H, W)."""
        return shape

    def draw(self, shape: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
        """Draws the parameters of one image, keyed by ``parameter_names``; the draw depends on ``seed`` alone."""
        return {}

    def realize(self, shape: tuple[int, int, int], seeds: Sequence[int]) -> Self:
        """This operator with the parameters of len(seeds) images drawn and fixed.

        Args:
            shape: (C, H, W) of one image.
            seeds: one seed below 2**32 per image.
        """
        self.check_shape(shape)
        draws = [self.draw(shape, seed) for seed in seeds]
        return self.with_parameters(
            {name: torch.stack([d[name] for d in draws]) for name in self.parameter_names}, shape
        )

    def with_parameters(self, parameters: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Self:
        """This operator with given parameters (first axis: the batch), for images of ``shape`` (C, H, W).

        Raises:
            ValueError: if a parameter is missing.
        """
        missing = [name for name in self.parameter_names if name not in parameters]
        if missing:
            raise ValueError(f"{type(self).__name__} needs {', '.join(missing)}")
        definite = copy.copy(self)
        definite.image_shape = tuple(shape)
        definite._buffers = dict(self._buffers)
        for name in self.parameter_names:
            definite.register_buffer(name, parameters[name], persistent=False)
        return definite

    def measure(self, x: Tensor, noise: SampleNoise) -> Tensor:
        """y = A(x) + noise, never clipped when the noise is Gaussian."""
        return self.add_noise(self(x), noise)

    def add_noise(self, y: Tensor, noise: SampleNoise) -> Tensor:
        """The measurement y (B, ...) = A(x) with its noise."""
        if self.poisson_rate is not None:
            peak = 255 * self.poisson_rate
            return (2 * noise.poisson(peak * ((y + 1) / 2).clamp(0, 1)) / peak - 1).clamp(-1, 1)
        if self.sigma_y == 0:
            return y
        return y + self.sigma_y * noise.randn(tuple(y.shape[1:]), like=y)

    def noise_std(self, y: Tensor) -> Tensor:
        """Standard deviation of the measurement noise per image (B,), the root mean square over y when it varies."""
        if self.poisson_rate is None:
            return y.new_full((len(y),), self.sigma_y)
        return (4 * ((y + 1) / 2).clamp(0, 1) / (255 * self.poisson_rate)).flatten(1).mean(1).sqrt()

    def baseline(self, y: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The plain picture (B, *shape) that a restoration has to beat; y itself where it has the image's shape.

        Raises:
            NotImplementedError: if the operator has none.
        """
        if tuple(y.shape[1:]) != tuple(shape):
            raise NotImplementedError(f"{type(self).__name__} offers no baseline picture")
        return y

    def fingerprint(self, row: int) -> str:
        """Hash of everything that defines the measurement of image ``row`` but the image and the noise draw."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for name, value in sorted(vars(self).items()):
            plain = isinstance(value, int | float | str | bool | tuple | None)
            if plain and not name.startswith("_") and name != "training":
                digest.update(f"{name}={value!r};".encode())
        for name in self.parameter_names:
            digest.update(getattr(self, name)[row].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class LinearOperator(Operator):
    """A linear operator: it has an exact adjoint, and where a closed form exists a pseudo-inverse and an SVD."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y (B, C, H, W), exact: <A x, y> = <x, A^T y>."""

    def pinv(self, y: Tensor, ridge: float = 0.0) -> Tensor:
        """A^T (A A^T + ridge I)^-1 y: the Moore-Penrose inverse for ridge 0, its Tikhonov form otherwise.

        Without a closed form: conjugate gradients up to a relative residual of 1e-5, for a positive ridge alone.

        Raises:
            ValueError: if the operator has no usable pseudo-inverse at this ridge.
        """
        if not ridge > 0:
            raise ValueError(f"ridge={ridge} must be positive: {type(self).__name__} is not invertible")
        x, converged = conjugate_gradients(lambda x: self.adjoint(self(x)) + ridge * x, self.adjoint(y))
        if not converged.all():
            raise ValueError(f"conjugate gradients did not converge at ridge={ridge}; a larger ridge is needed")
        return x

    def svd(self, shape: tuple[int, int, int], threshold: float = 0.0) -> OperatorSVD:
        """The singular value decomposition for images of ``shape`` (C, H, W).

        Singular values below ``threshold``, of the one-dimensional factors where A is separable, are dropped.

        Raises:
            ValueError: if the operator has none in closed form.
        """
        raise ValueError(f"{type(self).__name__} has no closed-form singular value decomposition")

    def back_projection(self, y: Tensor) -> Tensor:
        """The cheap stand-in that DPS, PSLD and MCG call the transpose; it is not the adjoint."""
        return self.adjoint(y)
