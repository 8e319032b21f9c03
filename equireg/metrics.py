"""Error measures of restored images and fields, one value per image, never pooled over a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, C, H, W) in [-1, 1], computed on clamped [0, 1] values.

    Infinite for equal images.
    """
    x_hat_01, x_01 = _to_01(x_hat, x)
    return peak_signal_noise_ratio(x_hat_01, x_01, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, C, H, W) in [-1, 1], computed on clamped [0, 1] values.

    Wang et al., 2004: Gaussian window of 11 x 11 pixels with standard deviation 1.5, population covariances, windows
    that lie inside the image only. Large images are averaged over f x f pixels first, f = round(min(H, W) / 256), as in
    the package piq, which the DAPS tables were made with.

    Raises:
        ValueError: if an image is smaller than the window.
    """
    x_hat_01, x_01 = _to_01(x_hat, x, smallest=11)
    f = max(1, round(min(x.shape[-2:]) / 256))
    _, similarity = structural_similarity_index_measure(
        F.avg_pool2d(x_hat_01, f), F.avg_pool2d(x_01, f), data_range=1.0, reduction="none", return_full_image=True
    )
    return similarity[..., 5:-5, 5:-5].mean((1, 2, 3))  # torchmetrics pads by reflection and keeps the border windows


def ssim_uniform7(x_hat: Tensor, x: Tensor) -> Tensor:
    """Structural similarity (B,) with a uniform window of 7 x 7 pixels and sample covariances, otherwise like ``ssim``.

    This is scikit-image's default, which the DiffStateGrad tables were made with.

    Raises:
        ValueError: if an image is smaller than the window.
    """
    a, b = (v.double() for v in _to_01(x_hat, x, smallest=7))  # variances of flat regions cancel in float32

    def mean(v: Tensor) -> Tensor:
        return F.avg_pool2d(v, kernel_size=7, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    sample = 49 / 48
    variance_a = sample * (mean(a * a) - mean_a**2)
    variance_b = sample * (mean(b * b) - mean_b**2)
    covariance = sample * (mean(a * b) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    similarity = similarity * (2 * covariance + c2) / (variance_a + variance_b + c2)
    return similarity.mean((1, 2, 3)).to(x.dtype)


def nmse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Normalised squared error (B,) of images in [-1, 1], computed on clamped [0, 1] values, as in DiffStateGrad.

    The mean over the channels of mean((x_hat - x)^2) / (mean(x^2) + 1e-6).
    """
    x_hat_01, x_01 = _to_01(x_hat, x)
    return ((x_hat_01 - x_01).square().mean((2, 3)) / (x_01.square().mean((2, 3)) + 1e-6)).mean(1)


def relative_l2(x_hat: Tensor, x: Tensor) -> Tensor:
    """||x_hat - x|| / ||x|| (B,) over everything but the batch axis, in the units given (fields: physical ones).

    Not finite where ``x`` is zero everywhere.
    """
    _check_same_shape(x_hat, x)
    return torch.linalg.vector_norm((x_hat - x).flatten(1), dim=1) / torch.linalg.vector_norm(x.flatten(1), dim=1)


def data_misfit(y: Tensor, Ax: Tensor, sigma: Tensor) -> Tensor:
    """||y - A x|| / (sigma sqrt(m)) (B,), m the number of entries of one measurement; near one for the true x.

    Args:
        y: measurements.
        Ax: what the operator makes of the restored images.
        sigma: standard deviation of the noise per image (B,); where it is zero the misfit is not divided by it.
    """
    _check_same_shape(y, Ax)
    rms = (y - Ax).flatten(1).square().mean(1).sqrt()
    return rms / torch.where(sigma == 0, 1, sigma).to(rms)


def _to_01(x_hat: Tensor, x: Tensor, smallest: int = 1) -> tuple[Tensor, Tensor]:
    """Both images from [-1, 1] to [0, 1], clamped."""
    _check_same_shape(x_hat, x)
    if x.ndim != 4 or min(x.shape[-2:]) < smallest:
        raise ValueError(f"images must be (batch, channels, >={smallest}, >={smallest}), got {tuple(x.shape)}")
    return ((x_hat + 1) / 2).clamp(0, 1), ((x + 1) / 2).clamp(0, 1)


def _check_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} must be equal")
