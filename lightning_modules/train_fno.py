"""Training of a Fourier neural operator: a solver, and through what it learns an MPE function."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from neuralop import LpLoss
from torch import Tensor
from torchmetrics import MeanMetric

from equireg.fno import FNO
from equireg.groups import get_group
from equireg.metrics import relative_l2
from equireg.noise import SampleNoise, Stream
from equireg.pde.equations import get_equation
from equireg.pictures import field_pictures
from equireg.regularizer import equivariance_error
from lightning_modules.training import cosine, describe, log_pictures


class FNOModule(LightningModule):
    """Supervised training on pairs (Li et al., ICLR 2021): relative L2 of normalised fields, no augmentation.

    Without augmentation the operator learns the equation's symmetries where there is data and nowhere else, which makes
    it manifold-preferential equivariant (EquiReg, Sec. 5). The equivariance error on clean and on noisy fields is
    logged all along; ``test`` measures it at every noise level.

    Args:
        fno: what to train; random weights are asked for by name. Untrained, it takes the units of the data.
        lr: highest learning rate of AdamW, from where it falls to 0 like half a cosine.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up.
        group: whose elements the equivariance error is averaged over; the equation's true symmetry when left out.
        sigma: standard deviation of the white noise by which ``validate`` perturbs fields, normalised ones (of standard
            deviation 0.5).
        test_sigmas: the same for ``test``.
        num_pictures: fields in the grid of targets, predictions and errors.
        export: file that the trained weights are written to at the end of ``fit``.

    Raises:
        ValueError: if the group is unknown; in ``setup`` if data or precision do not fit.
    """

    def __init__(
        self,
        fno: FNO,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_steps: int = 50,
        group: str | None = None,
        sigma: float = 0.1,
        test_sigmas: tuple[float, ...] = (0.02, 0.1, 0.5),
        num_pictures: int = 4,
        export: str | None = None,
    ) -> None:
        super().__init__()
        self.fno = fno
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.group = get_group(group or get_equation(fno.pde).symmetry)
        self.sigma = sigma
        self.test_sigmas = test_sigmas
        self.num_pictures = num_pictures
        self.export = export
        self.loss = LpLoss(d=2, p=2)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return cosine(optimizer, self.warmup_steps, self.trainer.estimated_stepping_batches)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        self.fno.check_equation(getattr(data, "pde", None))
        if self.trainer.precision != "32-true":
            raise ValueError(f"precision={self.trainer.precision!r}: complex weights are trained in '32-true'")
        self.fno.check_shape(data.image_shape)
        self.group.check_shape(data.image_shape)
        if stage == "fit" and self.fno.is_untrained:
            self.fno.adopt(data.normalizer)
        if stage == "test":
            self.errors = torch.nn.ModuleList(MeanMetric() for _ in range(1 + len(self.test_sigmas)))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        source, target = self._pair(batch["x"])
        loss = self.loss(self.fno(source), target) / len(target)  # neuralop sums over the batch
        self.log("train/relative_l2", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self._log_error("val", batch, batch_idx)
        for sigma in (0.0, self.sigma):
            error = self.equivariance_error(batch, sigma).mean()
            self.log(f"val/equivariance_error_sigma{sigma:g}", error, sync_dist=True, batch_size=len(batch["x"]))

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """Relative L2 in physical units, and the relative equivariance error at every noise level."""
        self._log_error("test", batch, batch_idx)
        for metric, sigma in zip(self.errors, (0.0, *self.test_sigmas), strict=True):
            metric.update(self.equivariance_error(batch, sigma))

    def on_test_epoch_end(self) -> None:
        for metric, sigma in zip(self.errors, (0.0, *self.test_sigmas), strict=True):
            self.log(f"test/equivariance_error_sigma{sigma:g}", metric.compute())

    def on_fit_end(self) -> None:
        if self.export and self.trainer.is_global_zero:
            self.fno.save(Path(self.export))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        describe(checkpoint, self.fno.description, "fno.network.")

    def equivariance_error(self, batch: dict, sigma: float) -> Tensor:
        """||S_g f(x) - f(T_g x)|| / ||f(x)|| (B,) of fields with white noise, averaged over the group's pool."""
        source, _ = self._pair(batch["x"])
        noise = SampleNoise(batch["index"].tolist(), 0, Stream.GROUP).randn(tuple(source.shape[1:]), like=source)
        noisy = source + sigma * noise
        pool = [torch.full((len(noisy),), number, device=noisy.device) for number in self.group.pool]
        return torch.stack([equivariance_error(self.fno, self.group, noisy, g) for g in pool]).mean(0)

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Source and target (B, 1, N, N), normalised."""
        x = self.fno.normalizer.normalize(x)
        return x[:, self.fno.source, None], x[:, self.fno.target, None]

    def _log_error(self, stage: str, batch: dict, batch_idx: int) -> None:
        target = batch["x"][:, self.fno.target, None]
        prediction = self.fno.map(batch["x"][:, self.fno.source, None])
        error = relative_l2(prediction, target).mean()
        self.log(f"{stage}/relative_l2", error, prog_bar=True, sync_dist=True, batch_size=len(target))
        if batch_idx == 0 and not self.trainer.sanity_checking:
            fields = torch.cat([target, prediction, prediction - target], dim=1)[: self.num_pictures]
            largest = fields[:, :1].abs().amax((2, 3), keepdim=True)  # one scale for the three
            log_pictures(self, "truth_prediction_error", field_pictures(fields, largest))
