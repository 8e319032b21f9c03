"""Parity of the metrics with the published code, see operators.md beside the golden files."""

import torch
import torch.nn.functional as F

from equireg.metrics import nmse, psnr, relative_l2, ssim, ssim_uniform7
from tests.golden import GoldenArrays, parametrize_golden


@parametrize_golden("metrics_images*.npz")
def test_golden_metrics(golden):
    arrays = GoldenArrays(golden)
    v, v_hat = arrays.tensor("gt") / 255, arrays.tensor("pred") / 255
    x, x_hat = 2 * v - 1, 2 * v_hat - 1

    arrays.check("psnr_torchmetrics", psnr(x_hat, x), tolerance=1e-5)  # dB; the last bits of float32
    arrays.check("psnr_skimage", psnr(x_hat, x), tolerance=1e-5)
    arrays.check("psnr_piq", psnr(x_hat, x), tolerance=5e-5)  # piq adds 1e-8 to the squared error
    pooled = psnr(x_hat.flatten(0, 1)[None], x.flatten(0, 1)[None])
    arrays.check("psnr_torchmetrics_pooled_dim_none", pooled.squeeze(), tolerance=1e-5)

    arrays.check("ssim_torchmetrics_full_cropped5", ssim(x_hat, x))
    arrays.check("ssim_piq", ssim(x_hat, x), tolerance=2e-5)
    arrays.check("ssim_skimage_gauss11", ssim(x_hat, x), tolerance=2e-5)
    arrays.check("ssim_skimage_uniform7", ssim_uniform7(x_hat, x))
    enlarged_hat, enlarged = (F.interpolate(image, (512, 512), mode="nearest") for image in (x_hat, x))
    arrays.check("ssim_piq_nearest512", ssim(enlarged_hat, enlarged), tolerance=2e-5)

    arrays.check("nmse_diffstategrad", nmse(x_hat, x))
    arrays.check("rel_l2_per_image", relative_l2(v_hat, v))
    assert torch.equal(psnr(x_hat, x), torch.cat([psnr(a[None], b[None]) for a, b in zip(x_hat, x, strict=True)]))
