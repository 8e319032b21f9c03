"""Gaussian random fields: the laws of the equations' input fields, and the noise of function-space diffusion.

Each is a linear map of standard normals, so a field depends on the normals alone: drawn through ``equireg.noise`` on
(seed, index), recorded ones in tests, ``torch.randn`` in a training.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from equireg.noise import Noise

Method = Literal["auto", "cholesky", "circulant"]

LARGEST_CHOLESKY = 64
"""Side up to which ``auto`` factorises the covariance: 64 MB and seconds; at 128 it is 1 GB and minutes."""


class RandomField(ABC):
    """A centred Gaussian random field, as a linear map of standard normals."""

    @abstractmethod
    def normals_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the normals of one field of ``shape``."""

    @abstractmethod
    def from_normals(self, normals: Tensor) -> Tensor:
        """Fields (B, *shape) of standard normals (B, *normals_shape(shape)), on their device and in their dtype."""

    def covariance(self, v: Tensor) -> Tensor:
        """K v for fields v (..., N, N), K the covariance of the field's values; in v's dtype.

        Raises:
            NotImplementedError: for laws that no diffusion takes its noise from.
        """
        raise NotImplementedError(f"{type(self).__name__} is no noise of a diffusion")

    def draw(self, noise: Noise, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Fields (B, *shape), each from its own sample's stream, on ``like``'s device and in its dtype.

        Args:
            noise: where the normals come from.
            shape: of one field: (N, N) for the laws of input fields, (C, N, N) for the noise of a diffusion.
            like: tells device and dtype.
        """
        return self.from_normals(noise.randn(self.normals_shape(shape), like))


class PeriodicField(RandomField):
    """The periodic field on [0, 1)^2 that starts the Navier-Stokes flow: fields (N, N).

    With xi_k complex standard normals per integer wavenumber k, a = Re ifft2(lambda_k xi_k),
    lambda_k = N^2 sqrt(2) tau^(alpha-1) (4 pi^2 |k|^2 + tau^2)^(-alpha/2), lambda_0 = 0. These are the eigenvalues of
    the published code (Li et al., ICLR 2021), which give the published standard deviation 0.262; the law
    N(0, 7^(3/2) (-Laplace + 49)^(-2.5)) quoted in papers has others.

    Args:
        alpha: smoothness.
        tau: inverse length scale.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, alpha: float = 2.5, tau: float = 7.0) -> None:
        _check_law(alpha, tau)
        self.alpha = alpha
        self.tau = tau

    def normals_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*square(shape), 2)  # real and imaginary part

    def amplitudes(self, size: int, like: Tensor) -> Tensor:
        """lambda_k (N, N), in the order of ``torch.fft.fftfreq``."""
        k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=like.device)
        squared = k[:, None] ** 2 + k**2
        scale = size**2 * math.sqrt(2) * self.tau ** (self.alpha - 1)
        amplitudes = scale * (4 * math.pi**2 * squared + self.tau**2) ** (-self.alpha / 2)
        amplitudes[0, 0] = 0
        return amplitudes.to(like.dtype)

    def from_normals(self, normals: Tensor) -> Tensor:
        coefficients = torch.view_as_complex(normals.contiguous())
        return torch.fft.ifft2(self.amplitudes(normals.shape[1], normals) * coefficients).real


class NeumannField(RandomField):
    """The field on [0, 1]^2 that is the source of the Helmholtz equation, zero on the edge: fields (S, S).

    The inverse orthonormal DCT-II of S tau^(alpha-1) (pi^2 (i^2 + j^2) + tau^2)^(-alpha/2) xi_ij without its mean, with
    the edges set to 0 afterwards. The DCT's points are cell centres and the solver's include both ends: an
    inconsistency of the published code, kept.

    Args:
        alpha: smoothness.
        tau: inverse length scale.
        zero_edges: set the four edges to 0.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, alpha: float = 2.0, tau: float = 3.0, zero_edges: bool = True) -> None:
        _check_law(alpha, tau)
        self.alpha = alpha
        self.tau = tau
        self.zero_edges = zero_edges

    def normals_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return square(shape)

    def amplitudes(self, size: int, like: Tensor) -> Tensor:
        """Standard deviations (S, S) of the cosine coefficients."""
        k = torch.arange(size, dtype=torch.float64, device=like.device)
        squared = math.pi**2 * (k[:, None] ** 2 + k**2) + self.tau**2
        amplitudes = size * self.tau ** (self.alpha - 1) * squared ** (-self.alpha / 2)
        amplitudes[0, 0] = 0
        return amplitudes.to(like.dtype)

    def from_normals(self, normals: Tensor) -> Tensor:
        size = normals.shape[-1]
        basis = cosine_basis(size, normals)
        field = basis @ (self.amplitudes(size, normals) * normals) @ basis.T
        return field * interior(size, field) if self.zero_edges else field


class ExponentialNoise(RandomField):
    """The noise of FunDPS's diffusion (Yao et al., 2025), called RBF there: fields (C, N, N), independent channels.

    Covariance exp(-|p - p'| / (2 scale^2)) + eps^2 [p = p'] at the points (i/N, j/N). The distance is NOT squared: the
    published checkpoints were trained with this exponential kernel of length 2 scale^2, which is rough.

    Args:
        scale: the published code's ``rbf_scale``; half the root of twice the correlation length.
        eps: standard deviation of the white part.
        method: ``cholesky`` maps the normals as the published code does; ``circulant`` has the same law by FFT on a
            torus of twice the side; ``auto`` takes the former up to N = 64.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, scale: float = 0.05, eps: float = 0.01, method: Method = "auto") -> None:
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale={scale} must be positive")
        if not (eps >= 0 and math.isfinite(eps)):
            raise ValueError(f"eps={eps} must not be negative")
        if method not in ("auto", "cholesky", "circulant"):
            raise ValueError(f"method={method!r} must be 'auto', 'cholesky' or 'circulant'")
        self.scale = scale
        self.eps = eps
        self.method: Method = method

    def normals_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, *sides = shape
        size, _ = square(tuple(sides))
        if self.method == "cholesky" or (self.method == "auto" and size <= LARGEST_CHOLESKY):
            return (size**2, channels)  # channel last, the published order
        return (channels, 2 * size, 2 * size)

    def from_normals(self, normals: Tensor) -> Tensor:
        if normals.ndim == 3:
            size = math.isqrt(normals.shape[1])
            factor = _cholesky(size, self.scale, self.eps, normals.dtype, normals.device)
            columns = factor @ normals.movedim(0, 1).flatten(1)  # one product: a batched one reads the factor B times
            return columns.unflatten(1, (len(normals), -1)).permute(1, 2, 0).unflatten(-1, (size, size))
        side = normals.shape[-1]
        roots = _torus_roots(side, self.scale, self.eps, normals.dtype, normals.device)
        field = torch.fft.irfft2(roots * torch.fft.rfft2(normals), s=(side, side))
        return field[..., : side // 2, : side // 2].contiguous()

    def covariance(self, v: Tensor) -> Tensor:
        size = v.shape[-1]
        eigenvalues = _torus_eigenvalues(2 * size, self.scale, self.eps).to(v)
        return torch.fft.irfft2(eigenvalues * torch.fft.rfft2(v, s=(2 * size, 2 * size)))[..., :size, :size]


class WhiteNoise(RandomField):
    """Independent standard normals: the noise of EDM (Karras et al., NeurIPS 2022); fields of any shape."""

    def normals_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def from_normals(self, normals: Tensor) -> Tensor:
        return normals

    def covariance(self, v: Tensor) -> Tensor:
        return v


def exponential_covariance(size: int, scale: float = 0.05, eps: float = 0.01) -> Tensor:
    """The covariance (N^2, N^2) of ``ExponentialNoise``, float64, points in row-major order."""
    p = torch.arange(size, dtype=torch.float64) / size
    points = torch.cartesian_prod(p, p)
    covariance = torch.exp(-torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / (2 * scale**2))
    covariance.diagonal().add_(eps**2)
    return covariance


def cosine_basis(size: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II basis (S, S): column k holds the k-th cosine, so B L B^T is the inverse transform of L."""
    k = torch.arange(size, dtype=torch.float64, device=like.device)
    basis = torch.cos(math.pi * (k[:, None] + 0.5) * k / size) * math.sqrt(2 / size)
    basis[:, 0] /= math.sqrt(2)
    return basis.to(like.dtype)


def interior(size: int, like: Tensor) -> Tensor:
    """(S, S): zero on the edge, one elsewhere."""
    mask = torch.zeros(size, size, dtype=like.dtype, device=like.device)
    mask[1:-1, 1:-1] = 1
    return mask


def square(shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, N).

    Raises:
        ValueError: if ``shape`` is not two equal numbers.
    """
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2:
        raise ValueError(f"fields must be square, (N, N) with N >= 2, not {tuple(shape)}")
    return shape[0], shape[1]


@lru_cache(maxsize=4)
def _cholesky(size: int, scale: float, eps: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linalg.cholesky(exponential_covariance(size, scale, eps)).to(device, dtype)


@lru_cache(maxsize=4)
def _torus_roots(side: int, scale: float, eps: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Square roots of the eigenvalues of the kernel on a torus of ``side`` = 2 N points."""
    eigenvalues = _torus_eigenvalues(side, scale, eps)
    if eigenvalues.min() < 0:  # long correlations do not close around the torus
        raise ValueError(f"scale={scale} is too large for method='circulant'; use 'cholesky'")
    return eigenvalues.sqrt().to(device, dtype)


@lru_cache(maxsize=4)
def _torus_eigenvalues(side: int, scale: float, eps: float) -> Tensor:
    """Eigenvalues (side, side // 2 + 1) of the exponential kernel on a torus of ``side`` = 2 N points, float64."""
    i = torch.arange(side, dtype=torch.float64)
    distance = torch.minimum(i, side - i) / (side // 2)
    kernel = torch.exp(-torch.hypot(distance[:, None], distance) / (2 * scale**2))
    return torch.fft.rfft2(kernel).real + eps**2


def _check_law(alpha: float, tau: float) -> None:
    if not alpha > 1:
        raise ValueError(f"alpha={alpha} must be above 1: rougher fields have no finite variance in two dimensions")
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive")
