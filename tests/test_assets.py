"""The bundled weights are what their cards say."""

from pathlib import Path

import h5py
import pytest
import torch
from torch import Tensor

from equireg.autoencoder import Autoencoder
from equireg.groups import get_group
from equireg.metrics import psnr
from equireg.mpe import Encoder
from equireg.priors import VPPrior
from equireg.regularizer import equivariance_error
from tests.golden import ROOT

ASSETS = sorted((ROOT / "equireg/assets").glob("*.safetensors"))
FACES = ROOT.parent / "shared/data/faces64.h5"


@pytest.fixture(scope="module")
def faces() -> Tensor:
    """Sixteen test faces of different people (16, 1, 64, 64)."""
    if not FACES.is_file():
        pytest.skip(f"no {FACES}")
    with h5py.File(FACES) as file:
        return torch.from_numpy(file["test/images"][::25][:16]).float() / 127.5 - 1


@pytest.mark.parametrize("path", ASSETS, ids=lambda path: path.stem)
def test_weights_are_small_and_have_a_card(path: Path) -> None:
    assert path.stat().st_size <= 12e6
    card = path.with_suffix(".md").read_text()
    for word in ("data", "config", "command", "seed", "steps", "losses"):
        assert word in card
    picture = card.split("](../../docs/")[1].split(")")[0]
    assert (ROOT / "docs" / picture).is_file()


def test_the_bundled_prior_denoises_faces(faces: Tensor) -> None:
    prior = VPPrior(str(ROOT / "equireg/assets/faces64_prior.safetensors"))
    step = list(prior.schedule(1000))[1000 - 100]  # sigma about 0.4
    noise = torch.randn(faces.shape, generator=torch.Generator().manual_seed(0))
    x_t = step.alpha_bar**0.5 * faces + (1 - step.alpha_bar) ** 0.5 * noise
    with torch.no_grad():
        x0_hat = prior(x_t, step).x0_hat
    noisy = x_t / step.alpha_bar**0.5
    assert psnr(x0_hat, faces).mean() > psnr(noisy, faces).mean() + 9


def test_the_bundled_encoder_is_manifold_preferential_equivariant(faces: Tensor) -> None:
    autoencoder = Autoencoder(str(ROOT / "equireg/assets/faces64_autoencoder.safetensors"))
    f, group, g = Encoder(autoencoder), get_group("hflip"), torch.ones(len(faces), dtype=torch.long)
    noise = torch.randn(faces.shape, generator=torch.Generator().manual_seed(0))
    errors = [equivariance_error(f, group, faces + sigma * noise, g).mean().item() for sigma in (0, 0.1, 0.2, 0.5, 1)]
    assert errors == sorted(errors)
    assert errors[-1] > 2 * errors[0]
    with torch.no_grad():
        assert psnr(autoencoder(faces), faces).mean() > 28
