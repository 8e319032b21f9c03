"""The metrics: closed forms, ranges, one value per image."""

import math

import pytest
import torch

from equireg.metrics import data_misfit, nmse, psnr, relative_l2, ssim, ssim_uniform7

METRICS = [psnr, ssim, ssim_uniform7, nmse, relative_l2]


def images(batch: int = 3, channels: int = 3, height: int = 24, width: int = 17) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_has_its_own_value_whatever_the_batch(metric, channels):
    x = images(channels=channels)
    x_hat = x + torch.tensor([0.01, 0.1, 0.3]).view(3, 1, 1, 1) * images(channels=channels).flip(0)
    alone = torch.cat([metric(a[None], b[None]) for a, b in zip(x_hat, x, strict=True)])
    assert alone.shape == (3,)
    torch.testing.assert_close(metric(x_hat, x), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim, ssim_uniform7, nmse], ids=lambda m: m.__name__)
def test_image_metrics_see_values_clamped_to_the_range_of_images(metric):
    x = images()
    torch.testing.assert_close(metric(3 * x, x), metric((3 * x).clamp(-1, 1), x), rtol=0, atol=0)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.__name__)
def test_metrics_refuse_shapes_that_would_broadcast(metric):
    with pytest.raises(ValueError, match="must be equal"):
        metric(images(3), images(1))


def test_psnr_of_a_constant_error_is_known():
    x = torch.zeros(2, 3, 8, 8)
    offset = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)  # 0.1 and 0.01 on [0, 1]
    torch.testing.assert_close(psnr(x + offset, x), torch.tensor([20.0, 40.0]), rtol=0, atol=1e-4)
    assert psnr(x, x).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("metric", [ssim, ssim_uniform7], ids=lambda m: m.__name__)
def test_ssim_of_equal_images_is_one(metric):
    torch.testing.assert_close(metric(images(), images()), torch.ones(3))


@pytest.mark.parametrize(("metric", "side"), [(ssim, 10), (ssim_uniform7, 6)], ids=["ssim", "ssim_uniform7"])
def test_ssim_refuses_images_smaller_than_its_window(metric, side):
    with pytest.raises(ValueError, match=f">={side + 1}"):
        metric(images(height=side), images(height=side))


def test_large_images_are_reduced_before_ssim():
    x, x_hat = images(1, 1, 512, 512), images(1, 1, 512, 512).flip(-1)
    reduced, reduced_hat = (torch.nn.functional.avg_pool2d(v, 2) for v in (x, x_hat))
    torch.testing.assert_close(ssim(x_hat, x), ssim(reduced_hat, reduced), rtol=0, atol=1e-6)


def test_relative_l2_and_nmse_of_a_scaled_image_are_known():
    x = images()
    torch.testing.assert_close(relative_l2(0.75 * x, x), torch.full((3,), 0.25))
    x_01 = x.abs()
    torch.testing.assert_close(nmse(0.5 * x_01 - 1, x_01 - 1), torch.full((3,), 0.25), rtol=1e-4, atol=0)


def test_data_misfit_is_one_for_residuals_as_large_as_the_noise():
    y = images()
    sigma = torch.tensor([0.05, 0.1, 0.0])
    residual = torch.tensor([0.05, 0.2, 0.3]).view(3, 1, 1, 1)
    torch.testing.assert_close(data_misfit(y, y + residual, sigma), torch.tensor([1.0, 2.0, 0.3]))
