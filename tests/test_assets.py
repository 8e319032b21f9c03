"""The bundled weights are what their cards say."""

from pathlib import Path

import h5py
import pytest
import torch
from torch import Tensor

from equireg.autoencoder import Autoencoder
from equireg.groups import get_group
from equireg.metrics import psnr, relative_l2
from equireg.mpe import Encoder, NeuralOperator
from equireg.noise import SampleNoise, Stream
from equireg.pde.equations import get_equation
from equireg.pde.files import field_path, read_pairs
from equireg.pde.generate import generate, law_of
from equireg.priors import EDMPrior, LatentPrior, VPPrior
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


def test_the_bundled_latent_prior_denoises_latents_of_faces(faces: Tensor) -> None:
    assets = ROOT / "equireg/assets"
    autoencoder = Autoencoder(str(assets / "faces64_autoencoder.safetensors"))
    prior = LatentPrior(VPPrior(str(assets / "faces64_latent_prior.safetensors")), autoencoder)
    step = list(prior.schedule(1000))[1000 - 200]
    sigma = (1 / step.alpha_bar - 1) ** 0.5  # about 0.6
    with torch.no_grad():
        z = prior.encode(faces)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        error = (prior(step.alpha_bar**0.5 * (z + sigma * noise), step).x0_hat - z).square().mean().sqrt()
    assert z.std() == pytest.approx(1, abs=0.15)
    assert error < 0.5 * sigma


def test_the_bundled_decoder_is_manifold_preferential_equivariant(faces: Tensor) -> None:
    autoencoder = Autoencoder(str(ROOT / "equireg/assets/faces64_autoencoder.safetensors"))
    group, g = get_group("hflip"), torch.ones(len(faces), dtype=torch.long)
    with torch.no_grad():
        z = autoencoder.encode(faces)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        errors = [
            equivariance_error(autoencoder.decode, group, z + sigma * noise, g).mean().item()
            for sigma in (0, 0.2, 0.5, 1)
        ]
    assert errors == sorted(errors)
    assert errors[-1] > 2 * errors[0]


def test_the_bundled_encoder_is_manifold_preferential_equivariant(faces: Tensor) -> None:
    autoencoder = Autoencoder(str(ROOT / "equireg/assets/faces64_autoencoder.safetensors"))
    f, group, g = Encoder(autoencoder), get_group("hflip"), torch.ones(len(faces), dtype=torch.long)
    noise = torch.randn(faces.shape, generator=torch.Generator().manual_seed(0))
    errors = [equivariance_error(f, group, faces + sigma * noise, g).mean().item() for sigma in (0, 0.1, 0.2, 0.5, 1)]
    assert errors == sorted(errors)
    assert errors[-1] > 2 * errors[0]
    with torch.no_grad():
        assert psnr(autoencoder(faces), faces).mean() > 28


# The equations


@pytest.fixture(scope="module", params=["helmholtz", "navier_stokes"])
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tensor]:
    """An equation and eight of its fields that nothing was trained on (8, 2, 64, 64)."""
    folder = tmp_path_factory.mktemp("fields")
    generate(law_of(request.param, 64, {}), folder, "test", 8, seed=1)
    return request.param, torch.from_numpy(read_pairs(field_path(folder, request.param, "test", 64)))


def test_the_bundled_operator_solves_its_equation_and_is_equivariant_on_its_fields(pairs: tuple[str, Tensor]) -> None:
    pde, x = pairs
    f = NeuralOperator(str(ROOT / f"equireg/assets/fno_{pde}64.safetensors"), pde)
    u = f.fno.normalizer.normalize(x)[:, 1:]
    with torch.no_grad():
        assert relative_l2(f.fno.map(x[:, 1:]), x[:, :1]).mean() < 0.08
        group = get_group(get_equation(pde).symmetry)
        g = torch.full((len(x),), group.pool[0])
        noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(0))
        clean, noisy = (equivariance_error(f, group, u + sigma * noise, g).mean() for sigma in (0.0, 0.1))
    assert clean < 0.06
    assert noisy > 4 * clean


def test_the_bundled_field_prior_denoises(pairs: tuple[str, Tensor]) -> None:
    pde, x = pairs
    prior = EDMPrior(str(ROOT / f"equireg/assets/{pde}64_prior.safetensors"))
    x_0 = prior.normalize(x)
    noise = prior.draw_noise(SampleNoise(range(len(x)), 0, Stream.SAMPLER), tuple(x.shape[1:]), like=x_0)
    for sigma, bound in ((0.1, 0.35), (1.0, 0.15)):
        with torch.no_grad():
            error = (prior.denoise(x_0 + sigma * noise, sigma) - x_0).square().mean().sqrt()
        assert error < bound * sigma
