"""Trainings fit, log, export what samplers load, and test what the gates ask for."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules import Faces
from equireg.autoencoder import Autoencoder
from equireg.commands.export import export_command
from equireg.gaussian import ImageStatistics
from equireg.priors import LatentPrior, VPPrior
from lightning_modules import AutoencoderTraining, DecoderTraining, DiffusionPriorTraining, LatentPriorTraining
from tests.conftest import TINY_AUTOENCODER, TINY_UNET, make_latent_prior


def make_trainer(folder: Path, **options: object) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=6,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        callbacks=[
            EMAWeightAveraging(decay=0.5),
            ModelCheckpoint(folder, save_last=True, every_n_train_steps=3),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **options,
    )


def tags(folder: Path, kind: str) -> list[str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Tags()[kind]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_prior_is_trained_averaged_exported_and_loaded(tmp_path: Path, faces_file: str, precision: str) -> None:
    prior = VPPrior("random", network=TINY_UNET, space_to_depth=2)
    before = prior.network.unet.conv_in.weight.clone()
    path = tmp_path / "prior.safetensors"
    module = DiffusionPriorTraining(prior, warmup_steps=2, num_samples=4, sample_steps=3, export=str(path))
    make_trainer(tmp_path, precision=precision).fit(module, datamodule=Faces(faces_file, batch_size=8))
    loaded = VPPrior(str(path))
    assert not torch.allclose(loaded.network.unet.conv_in.weight, before.half().float())
    torch.testing.assert_close(
        loaded.network.unet.conv_in.weight, prior.network.unet.conv_in.weight, rtol=1e-3, atol=1e-3
    )
    assert {"train/loss", "val/loss"} <= set(tags(tmp_path, "scalars"))
    assert tags(tmp_path, "images") == ["samples"]


def test_the_exported_weights_are_the_averaged_ones_and_a_checkpoint_exports_the_same(
    tmp_path: Path, faces_file: str
) -> None:
    prior = VPPrior("random", network=TINY_UNET, space_to_depth=2)
    module = DiffusionPriorTraining(prior, lr=1e-2, warmup_steps=0, export=str(tmp_path / "end.safetensors"))
    make_trainer(tmp_path, limit_val_batches=0).fit(module, datamodule=Faces(faces_file, batch_size=8))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    name = "prior.network.unet.conv_in.weight"
    averaged, raw = checkpoint["state_dict"][name], checkpoint["current_model_state"][name]
    assert not torch.allclose(averaged, raw, atol=1e-4)
    assert export_command([str(tmp_path / "last.ckpt"), str(tmp_path / "export.safetensors")]) == 0
    assert export_command([str(tmp_path / "last.ckpt"), str(tmp_path / "raw.safetensors"), "--raw"]) == 0
    for file, expected in (("end", averaged), ("export", averaged), ("raw", raw)):
        loaded = VPPrior(str(tmp_path / f"{file}.safetensors")).network.unet.conv_in.weight
        torch.testing.assert_close(loaded, expected.half().float())


def test_a_latent_prior_is_trained_on_images_encoded_once(tmp_path: Path, faces_file: str) -> None:
    prior = make_latent_prior()
    encoded = []
    prior.encoder.register_forward_hook(lambda encoder, inputs, z: encoded.append(len(z)))
    path = tmp_path / "prior.safetensors"
    module = LatentPriorTraining(prior, warmup_steps=2, num_samples=4, sample_steps=3, export=str(path))
    make_trainer(tmp_path, limit_val_batches=0).fit(module, datamodule=Faces(faces_file, batch_size=8))
    assert sum(encoded) == 2 * 24  # 24 images and their mirror images; six steps see 48
    assert module.latents.std().item() == pytest.approx(1, rel=1e-5)
    data = module.trainer.datamodule
    x = torch.stack([data.dataset("train")[i]["x"] for i in (3, 5)])
    torch.testing.assert_close(module.latents[1, [3, 5]], prior.encode(x.flip(-1)))
    loaded = LatentPrior(VPPrior(str(path)), prior.autoencoder)
    assert loaded.scale_factor == pytest.approx(prior.scale_factor)
    assert not torch.allclose(loaded.network.unet.conv_in.weight, make_latent_prior().network.unet.conv_in.weight)
    assert export_command([str(tmp_path / "last.ckpt"), str(tmp_path / "export.safetensors")]) == 0
    assert VPPrior(str(tmp_path / "export.safetensors")).description == VPPrior(str(path)).description


def test_a_latent_prior_is_validated_sampled_and_tested_in_its_latents(tmp_path: Path, faces_file: str) -> None:
    module = LatentPriorTraining(make_latent_prior(), num_samples=4, sample_steps=3, test_sigmas=(1.0,))
    make_trainer(tmp_path).fit(module, datamodule=Faces(faces_file, batch_size=8))
    assert tags(tmp_path, "images") == ["samples"]
    assert {"train/loss", "val/loss"} <= set(tags(tmp_path, "scalars"))
    metrics = make_trainer(tmp_path).test(module, datamodule=Faces(faces_file, batch_size=3), verbose=False)[0]
    assert metrics["test/ratio_sigma1"] > 0
    assert module.statistics.mean.shape == (2 * 8 * 8,)


def test_training_lowers_the_loss(tmp_path: Path, faces_file: str) -> None:
    torch.manual_seed(0)
    module = DiffusionPriorTraining(VPPrior("random", network=TINY_UNET, space_to_depth=2), lr=3e-3, warmup_steps=5)
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
    trainer.fit(module, datamodule=Faces(faces_file, batch_size=24))
    assert torch.stack(losses[-10:]).mean() < 0.7 * torch.stack(losses[:10]).mean()


@pytest.mark.parametrize("family", ["kl", "vq"])
@pytest.mark.parametrize("equivariance_weight", [0.0, 0.1])
def test_an_autoencoder_is_trained_exported_and_loaded(
    tmp_path: Path, faces_file: str, family: str, equivariance_weight: float
) -> None:
    network = TINY_AUTOENCODER | ({"num_vq_embeddings": 16} if family == "vq" else {})
    path = tmp_path / "autoencoder.safetensors"
    module = AutoencoderTraining(
        Autoencoder("random", family, network),
        group="d4",
        export=str(path),
        equivariance_weight=equivariance_weight,
    )
    make_trainer(tmp_path).fit(module, datamodule=Faces(faces_file, batch_size=8))
    loaded = Autoencoder(str(path))
    assert (loaded.family, loaded.factor, loaded.channels) == (family, 2, 1)
    assert "truth_and_reconstruction" in tags(tmp_path, "images")


def test_a_decoder_is_trained_and_the_encoder_stays(tmp_path: Path, faces_file: str) -> None:
    path, data = tmp_path / "autoencoder.safetensors", Faces(faces_file, batch_size=8)
    autoencoder = Autoencoder("random", "kl", TINY_AUTOENCODER)
    x = data.dataset("val")[0]["x"][None]
    features, picture = autoencoder.features(x), autoencoder(x)
    make_trainer(tmp_path).fit(DecoderTraining(autoencoder, lr=1e-2, warmup_steps=1, export=str(path)), datamodule=data)
    loaded = Autoencoder(str(path))
    torch.testing.assert_close(loaded.features(x), features, rtol=1e-2, atol=1e-3)  # half precision in the file
    assert not torch.allclose(loaded(x), picture, atol=1e-2)
    images = torch.stack([sample["x"] for sample in data.dataset("train")])
    std, mean = torch.std_mean(loaded.encode(images), dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=2e-2)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=2e-2, atol=0)


def test_codes_fix_the_scale_of_their_latents() -> None:
    vq = Autoencoder("random", "vq", TINY_AUTOENCODER | {"num_vq_embeddings": 16})
    with pytest.raises(ValueError, match="vq"):
        DecoderTraining(vq)


def test_standardised_latents_decode_to_the_same_image(tiny_autoencoder: Autoencoder) -> None:
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    image, features, sigma = tiny_autoencoder(x), tiny_autoencoder.features(x), tiny_autoencoder.moments(x)[:, 2:]
    std, mean = torch.std_mean(tiny_autoencoder.encode(x), dim=(0, 2, 3))
    tiny_autoencoder.standardize(mean, std)
    torch.testing.assert_close(tiny_autoencoder(x), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiny_autoencoder.features(x), features, rtol=1e-4, atol=1e-5)
    z = tiny_autoencoder.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros_like(mean), rtol=0, atol=1e-4)
    c = len(mean)
    scaled = tiny_autoencoder.moments(x)[:, c:]
    torch.testing.assert_close(scaled, sigma - 2 * std.log().view(1, -1, 1, 1), rtol=1e-4, atol=1e-4)


def test_the_decoder_gate_measures_the_decoder(tmp_path: Path, faces_file: str, tiny_autoencoder: Autoencoder) -> None:
    module = DecoderTraining(tiny_autoencoder, test_sigmas=(0.1, 1.0))
    metrics = make_trainer(tmp_path).test(module, datamodule=Faces(faces_file, batch_size=3), verbose=False)[0]
    assert set(metrics) == {"test/psnr", *(f"test/equivariance_error_sigma{s}" for s in ("0", "0.1", "1"))}
    assert all(value > 0 for value in metrics.values())


def test_the_autoencoder_gate_measures_reconstruction_and_equivariance(
    tmp_path: Path, faces_file: str, tiny_autoencoder: Autoencoder
) -> None:
    module = AutoencoderTraining(tiny_autoencoder, test_sigmas=(0.1, 1.0))
    metrics = make_trainer(tmp_path).test(module, datamodule=Faces(faces_file, batch_size=3), verbose=False)[0]
    names = {"test/psnr", *(f"test/equivariance_error_sigma{s}" for s in ("0", "0.1", "1"))}
    assert set(metrics) == names
    assert all(value > 0 for value in metrics.values())


def test_the_prior_gate_compares_with_the_linear_denoiser(tmp_path: Path, faces_file: str, tiny_prior: VPPrior) -> None:
    module = DiffusionPriorTraining(tiny_prior, test_sigmas=(0.3, 3.0))
    metrics = make_trainer(tmp_path).test(module, datamodule=Faces(faces_file, batch_size=3), verbose=False)[0]
    for sigma in ("0.3", "3"):
        ratio = metrics[f"test/rmse_prior_sigma{sigma}"] / metrics[f"test/rmse_linear_sigma{sigma}"]
        assert metrics[f"test/ratio_sigma{sigma}"] == pytest.approx(ratio, rel=1e-5)


def test_the_linear_denoiser_is_optimal_for_gaussian_images() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    images = (torch.randn(4000, 16, generator=generator, dtype=torch.float64) @ mixing).view(-1, 1, 4, 4).float()
    statistics = ImageStatistics(images[:3000])
    x, sigma = images[3000:], 1.0
    noisy = x + sigma * torch.randn(x.shape, generator=generator)
    error = (statistics.denoise(noisy, sigma) - x).square().mean()
    covariance = (mixing.T @ mixing).float()
    expected = (covariance - covariance @ torch.linalg.inv(covariance + torch.eye(16)) @ covariance).trace() / 16
    assert error == pytest.approx(expected.item(), rel=0.05)  # 1000 test images and an estimated covariance


def test_a_prior_that_does_not_fit_the_images_is_refused_before_training(tmp_path: Path, faces_file: str) -> None:
    prior = VPPrior("random", network=TINY_UNET | {"in_channels": 3, "out_channels": 3})
    with pytest.raises(ValueError, match="images have 1 channels, the prior was trained on 3"):
        make_trainer(tmp_path).fit(DiffusionPriorTraining(prior), datamodule=Faces(faces_file, batch_size=8))


def test_export_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing.ckpt' does not exist"):
        export_command([str(tmp_path / "missing.ckpt"), str(tmp_path / "out.safetensors")])
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="was not written by a training of this library"):
        export_command([str(tmp_path / "other.ckpt"), str(tmp_path / "out.safetensors")])
