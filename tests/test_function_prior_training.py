"""Priors on fields are trained with their own noise, exported, and compared with the linear denoiser."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import Helmholtz, NavierStokes
from equireg.commands.export import export_command
from equireg.gaussian import ImageStatistics
from equireg.groups import get_group
from equireg.noise import SampleNoise, Stream
from equireg.pde.generate import HelmholtzLaw, generate
from equireg.pde.noise_basis import NoiseBasis
from equireg.pde.random_fields import ExponentialNoise, WhiteNoise, exponential_covariance
from equireg.priors import EDMPrior
from lightning_modules import FunctionPriorTraining
from tests.test_training import make_trainer, tags
from tests.tiny_fields import TINY_FIELD_NETWORK, tiny_field_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs of the Helmholtz equation, 8x8."""
    folder = tmp_path_factory.mktemp("fields")
    for split, count in (("train", 40), ("val", 8), ("test", 12)):
        generate(HelmholtzLaw(8), folder, split, count, seed=0)
    return str(folder)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("linear", [None, "sine"])
@pytest.mark.parametrize("noise", ["exponential", "white"])
def test_a_prior_is_trained_averaged_exported_and_loaded(
    tmp_path: Path, folder: str, precision: str, linear: str | None, noise: str
) -> None:
    prior = EDMPrior("random", "helmholtz", network=TINY_FIELD_NETWORK | {"linear": linear}, noise=noise)
    path = tmp_path / "prior.safetensors"
    module = FunctionPriorTraining(prior, lr=1e-2, warmup_steps=0, num_samples=2, sample_steps=3, export=str(path))
    make_trainer(tmp_path, precision=precision).fit(module, datamodule=Helmholtz(folder, size=8, batch_size=8))
    loaded = EDMPrior(str(path))
    assert (loaded.description["noise"], loaded.pde) == (noise, "helmholtz")
    assert loaded.network.unet.conv_out.weight.any()  # it starts at zero
    if linear is not None:
        assert loaded.linear.fitted == 1
        variance = loaded.linear.log_variances.exp().mean().item()  # 36 of 64 modes hold the energy of the fields
        assert variance == pytest.approx(0.25 * 64 / 36, rel=0.6)
    assert export_command([str(tmp_path / "last.ckpt"), str(tmp_path / "again.safetensors")]) == 0
    again = EDMPrior(str(tmp_path / "again.safetensors"))
    torch.testing.assert_close(again.network.unet.conv_out.weight, loaded.network.unet.conv_out.weight)
    assert {"train/loss", "val/loss"} <= set(tags(tmp_path, "scalars"))
    assert tags(tmp_path, "images") == ["samples"]


def test_training_fields_are_moved_by_the_symmetries_of_their_equation(tmp_path: Path, folder: str) -> None:
    prior = EDMPrior("random", "helmholtz", network=TINY_FIELD_NETWORK)
    module = FunctionPriorTraining(prior, warmup_steps=0, num_samples=0, augmentation="helmholtz_d4")
    seen: list[torch.Tensor] = []
    module._loss = lambda x_0, sigma, noise: seen.append(x_0) or (prior.denoise(x_0, sigma) - x_0).flatten(1).mean(1)
    data = Helmholtz(folder, size=8, batch_size=8)
    make_trainer(tmp_path, limit_val_batches=0).fit(module, datamodule=data)
    fields = prior.normalize(torch.stack([sample["x"] for sample in data.dataset("train")]))
    poses = get_group("helmholtz_d4").elements
    moved = torch.stack([element(fields) for element in poses]).flatten(2)  # (poses, fields, points)
    found = [int((moved - x.flatten()).abs().amax(-1).amin(1).argmin()) for x in torch.cat(seen)]
    nearest = [(moved - x.flatten()).abs().amax(-1).min().item() for x in torch.cat(seen)]
    assert max(nearest) < 1e-5
    assert len(set(found)) == 8


def test_an_unknown_augmentation_is_refused() -> None:
    prior = EDMPrior("random", "helmholtz", network=TINY_FIELD_NETWORK)
    with pytest.raises(ValueError, match="'sideways' is unknown"):
        FunctionPriorTraining(prior, augmentation="sideways")


def test_training_lowers_the_loss(folder: str) -> None:
    torch.manual_seed(0)
    prior = EDMPrior("random", "helmholtz", network=TINY_FIELD_NETWORK)
    module = FunctionPriorTraining(prior, lr=5e-3, warmup_steps=5, p_mean=-0.4)
    losses = []
    step = module.training_step
    module.training_step = lambda *args: losses.append(step(*args)) or losses[-1]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=60,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=Helmholtz(folder, size=8, batch_size=20))
    losses = torch.stack(losses)
    assert losses[-15:].mean() < 0.9 * losses[:5].mean()


def test_the_gate_compares_with_the_linear_denoiser(tmp_path: Path, folder: str) -> None:
    module = FunctionPriorTraining(tiny_field_prior(), num_samples=2, sample_steps=3, test_sigmas=(0.3, 3.0))
    data = Helmholtz(folder, size=8, batch_size=5)
    metrics = make_trainer(tmp_path).test(module, datamodule=data, verbose=False)[0]
    for sigma in ("0.3", "3"):
        ratio = metrics[f"test/rmse_prior_sigma{sigma}"] / metrics[f"test/rmse_linear_sigma{sigma}"]
        assert metrics[f"test/ratio_sigma{sigma}"] == pytest.approx(ratio, rel=1e-5)
        assert ratio > 1  # random weights


def test_the_linear_bar_knows_the_correlation_of_the_noise() -> None:
    """White fields in strongly correlated noise: the best linear denoiser, by its covariances."""
    noise = ExponentialNoise(scale=0.5)
    covariance = exponential_covariance(6, 0.5)
    x_0 = SampleNoise(range(3000), 0, Stream.DATA).randn((1, 6, 6), like=torch.zeros(1))
    x = x_0 + noise.draw(SampleNoise(range(3000), 1, Stream.DATA), (1, 6, 6), like=x_0)
    basis = NoiseBasis(noise, 6)
    torch.testing.assert_close(basis.colour(basis.whiten(x)), x, rtol=0, atol=1e-4)
    estimate = basis.colour(ImageStatistics(basis.whiten(x_0)).denoise(basis.whiten(x), 1.0))
    error = (estimate - x_0).square().mean().item()
    identity = torch.eye(36, dtype=torch.float64)
    best = (identity - torch.linalg.inv(identity + covariance)).trace().item() / 36
    assert error == pytest.approx(best, rel=0.05)
    assert torch.equal(NoiseBasis(WhiteNoise(), 6).whiten(x), x)


def test_levels_have_the_published_distribution() -> None:
    module = FunctionPriorTraining(tiny_field_prior(), p_mean=-1.2, p_std=1.2)
    quantiles = (torch.arange(1000) + 0.5) / 1000
    logs = module._sigma(quantiles).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert logs.std().item() == pytest.approx(1.2, rel=0.01)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match=r"p_std=0.0 must be positive"):
        FunctionPriorTraining(tiny_field_prior(), p_std=0.0)
    module = FunctionPriorTraining(tiny_field_prior("helmholtz"))
    data = NavierStokes(folder, size=8, generate_train=1, generate_val=1, batch_size=8)
    with pytest.raises(ValueError, match="the prior is on fields of helmholtz, the data are of navier_stokes"):
        make_trainer(tmp_path).fit(module, datamodule=data)
