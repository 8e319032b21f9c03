"""Tiny problems that every sampler can run in a second."""

import h5py
import numpy as np
import pytest
import torch

from equireg.autoencoder import Autoencoder
from equireg.mpe import Encoder
from equireg.priors import LatentPrior, VPPrior

torch.set_num_threads(1)

TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}

TINY_AUTOENCODER = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 2,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}

TINY_LATENT_UNET = TINY_UNET | {"in_channels": 2, "out_channels": 2}


def make_latent_prior(family: str = "kl", dtype: torch.dtype = torch.float32) -> LatentPrior:
    """A prior on the 2x8x8 latents of 1x16x16 images with random weights, the same at every call."""
    codes = {"num_vq_embeddings": 16} if family == "vq" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = VPPrior("random", network=TINY_LATENT_UNET, beta_schedule="scaled_linear")
        return LatentPrior(prior, Autoencoder("random", family, TINY_AUTOENCODER | codes), scale_factor=1.0).to(dtype)


@pytest.fixture(scope="session")
def tiny_prior() -> VPPrior:
    """A prior on 1x16x16 images with random weights, folded 2x2."""
    torch.manual_seed(0)
    return VPPrior("random", network=TINY_UNET, space_to_depth=2)


@pytest.fixture(scope="session")
def tiny_autoencoder() -> Autoencoder:
    """An autoencoder of 1x16x16 images with random weights."""
    torch.manual_seed(0)
    return Autoencoder("random", "kl", TINY_AUTOENCODER)


@pytest.fixture
def encoder(tiny_autoencoder: Autoencoder) -> Encoder:
    return Encoder(tiny_autoencoder)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Six smooth images (6, 1, 16, 16) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(6, 1, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic").clamp(-2, 2) / 2


@pytest.fixture(scope="session")
def faces_file(tmp_path_factory: pytest.TempPathFactory, images: torch.Tensor) -> str:
    """A file of the faces layout: 1x16x16, 24 training, 8 validation and 6 test images."""
    path = tmp_path_factory.mktemp("data") / "tiny.h5"
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split, count in (("train", 24), ("val", 8)):
            file[f"{split}/images"] = generator.integers(0, 256, (count, 1, 16, 16), dtype=np.uint8)
        file["test/images"] = ((images + 1) * 127.5).round().to(torch.uint8).numpy()
    return str(path)
