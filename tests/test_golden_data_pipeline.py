"""Parity of the picture preprocessing with the published pipelines, see operators.md beside the golden files."""

import re

import pytest
import torch

from datamodules.pictures import prepare, read_picture
from tests.golden import GOLDEN, GoldenArrays, parametrize_golden

PICTURES = GOLDEN.parent / "data" / "images" / "imagenet"
PIPELINES = {"daps": "daps", "gd": "adm"}


@parametrize_golden("data_pipeline*.npz")
def test_golden_data_pipeline(golden):
    arrays = GoldenArrays(golden)
    numbers = sorted({int(match[1]) for name in arrays.arrays if (match := re.fullmatch(r"size_(\d+)", name))})
    assert numbers
    for number in numbers:
        file = PICTURES / f"ILSVRC2012_val_{49000 + number:08d}.JPEG"
        if not file.is_file():
            pytest.skip(f"{file} is missing")
        picture = read_picture(file, channels=3)
        assert picture.size == tuple(arrays[f"size_{number}"])
        for name, preprocess in PIPELINES.items():
            x = prepare(picture, (256, 256), preprocess)
            assert x.shape == (3, 256, 256)
            assert x.abs().max() <= 1
            prefix = f"{name}_{number}"
            arrays.check(f"{prefix}_center48", x[:, 104:152, 104:152], tolerance=1e-5)
            arrays.check(f"{prefix}_corner8", x[:, :8, :8], tolerance=1e-5)
            mean_std = torch.stack([x.double().mean(), x.double().std()])
            arrays.check(f"{prefix}_mean_std", mean_std, tolerance=1e-5)
