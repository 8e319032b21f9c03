"""Training of an autoencoder: a first stage, and through its augmentation an MPE function."""

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import mse_loss
from torchmetrics import MeanMetric

from equireg.autoencoder import Autoencoder, kl_divergence, sample_latent
from equireg.groups import get_group
from equireg.metrics import psnr
from equireg.mpe import Encoder
from equireg.noise import SampleNoise, Stream
from equireg.regularizer import equivariance_error
from lightning_modules.training import augment, describe, log_pictures, scheduled


class AutoencoderTraining(LightningModule):
    """Reconstruction training of an AutoencoderKL or VQModel on images moved by a group.

    The augmentation is what makes the encoder manifold-preferential equivariant: on the data it sees every image in all
    poses, off the data it never learned what to do (EquiReg, Sec. 4). ``test`` measures exactly that.

    Args:
        autoencoder: what to train; random weights are asked for by name.
        group: name of the group whose elements move the training images.
        lr: highest learning rate of Adam.
        warmup_steps: steps of linear warm-up.
        decay_steps: last steps, over which the learning rate falls linearly to 0.
        kl_weight: weight of the KL term, per pixel, against the mean squared error (KL family).
        equivariance_weight: weight of the relative squared equivariance error of the latent on training images. The
            augmentation alone leaves a latent free to carry odd features (their sign changes under a flip); this term
            asks for equivariance on the data outright, and still says nothing off it.
        test_sigmas: noise levels at which ``test`` measures the equivariance error, on [-1, 1] images.
        num_pictures: images in the reconstruction grid.
        export: file that the trained (averaged) weights are written to at the end of ``fit``.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        group: str = "hflip",
        lr: float = 5e-4,
        warmup_steps: int = 200,
        decay_steps: int = 0,
        kl_weight: float = 1e-6,
        equivariance_weight: float = 0.0,
        test_sigmas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0),
        num_pictures: int = 8,
        export: str | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.group = get_group(group)
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.kl_weight = kl_weight
        self.equivariance_weight = equivariance_weight
        self.test_sigmas = test_sigmas
        self.num_pictures = num_pictures
        self.export = export

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return scheduled(optimizer, self.warmup_steps, self.decay_steps, self.trainer.max_steps)

    def setup(self, stage: str) -> None:
        self.autoencoder.check_shape(self.trainer.datamodule.image_shape)
        if stage == "test":
            self.errors = torch.nn.ModuleList(MeanMetric() for _ in range(1 + len(self.test_sigmas)))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x = augment(batch["x"], self.group)
        if self.equivariance_weight:
            g = self.random_elements(x)
            x = torch.cat([x, self.group.transform(x, g)])  # every image in two poses, reconstructed in both
        moments = self.autoencoder.moments(x)
        if self.autoencoder.family == "kl":
            reconstruction = self.autoencoder.decode(sample_latent(moments))
            regularisation = self.kl_weight * kl_divergence(moments.float()).mean() / x[0].numel()
        else:
            reconstruction, regularisation = self.autoencoder.decode_training(moments)
        error = mse_loss(reconstruction.float(), x)
        self.log_dict({"train/mse": error, "train/regularisation": regularisation}, prog_bar=True)
        if not self.equivariance_weight:
            return error + regularisation
        latent, moved = self.autoencoder.latent(moments).float().chunk(2)
        defect = self.group.transform_features(latent, g) - moved
        equivariance = defect.square().mean() / latent.detach().square().mean()  # relative: no reward for shrinking z
        self.log("train/equivariance", equivariance, prog_bar=True)
        return error + regularisation + self.equivariance_weight * equivariance

    def random_elements(self, x: Tensor) -> Tensor:
        """Numbers (B,) of elements drawn from the group's pool, one per image."""
        pool = torch.tensor(self.group.pool, device=x.device)
        return pool[torch.randint(len(pool), (len(x),), device=x.device)]

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x = batch["x"]
        reconstruction = self.autoencoder(x).float()
        self.log("val/psnr", psnr(reconstruction, x).mean(), prog_bar=True, sync_dist=True, batch_size=len(x))
        if batch_idx == 0:
            self._show(x, reconstruction)

    def on_fit_end(self) -> None:
        if self.export and self.trainer.is_global_zero:
            self.autoencoder.save(Path(self.export))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        describe(checkpoint, self.autoencoder.description, "autoencoder.net.")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """Reconstruction PSNR, and the relative equivariance error of the trained part on clean and on noisy inputs."""
        x = batch["x"]
        reconstruction = self.autoencoder(x)
        self.log("test/psnr", psnr(reconstruction, x).mean(), sync_dist=True, batch_size=len(x))
        if batch_idx == 0:
            self._show(x, reconstruction)
        f, points, unit = self.probed(x)
        noise = SampleNoise(batch["index"].tolist(), 0, Stream.GROUP)
        g = self.group.draw(noise, len(x), x.device)
        n = unit * noise.randn(tuple(points.shape[1:]), like=points)
        for metric, sigma in zip(self.errors, (0.0, *self.test_sigmas), strict=True):
            metric.update(equivariance_error(f, self.group, points + sigma * n, g))

    def probed(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor | float]:
        """The function whose equivariance ``test`` measures, where it measures it, and the unit of the noise there."""
        return Encoder(self.autoencoder), x, 1.0

    def _show(self, x: Tensor, reconstruction: Tensor) -> None:
        pair = torch.cat([x[: self.num_pictures], reconstruction[: self.num_pictures]])
        log_pictures(self, "truth_and_reconstruction", pair)

    def on_test_epoch_end(self) -> None:
        for metric, sigma in zip(self.errors, (0.0, *self.test_sigmas), strict=True):
            self.log(f"test/equivariance_error_sigma{sigma:g}", metric.compute())
