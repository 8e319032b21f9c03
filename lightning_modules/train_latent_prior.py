"""Training of a latent diffusion prior."""

import torch
from torch import Tensor

from equireg.gaussian import ImageStatistics
from equireg.priors import LatentPrior
from lightning_modules.train_prior import DiffusionPriorTraining
from lightning_modules.training import in_batches


class LatentPriorTraining(DiffusionPriorTraining):
    """Denoising training of the prior in a ``LatentPrior``, on the latents of images, see ``DiffusionPriorTraining``.

    The autoencoder is frozen and the training images do not change, so they are encoded once, before the first step,
    and kept in memory; every element of ``augmentation`` moves the images before they are encoded, since an encoder is
    only nearly equivariant.

    Args:
        prior: the latent prior to train, with a trained autoencoder.
        scale_by_std: sets the prior's scale factor to one over the standard deviation of the training latents (Rombach
            et al., CVPR 2022, App. G); exported with the weights.
        lr, warmup_steps, decay_steps, augmentation, num_samples, sample_steps, export: see ``DiffusionPriorTraining``.
        test_sigmas: noise levels of ``test``, standard deviations on scaled latents.
    """

    weights_prefix = "prior.prior.network.unet."

    def __init__(
        self,
        prior: LatentPrior,
        scale_by_std: bool = True,
        lr: float = 3e-4,
        warmup_steps: int = 500,
        decay_steps: int = 0,
        augmentation: str | None = "hflip",
        num_samples: int = 16,
        sample_steps: int = 100,
        test_sigmas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0),
        export: str | None = None,
    ) -> None:
        super().__init__(
            prior, lr, warmup_steps, decay_steps, augmentation, num_samples, sample_steps, test_sigmas, export
        )
        self.scale_by_std = scale_by_std

    def on_fit_start(self) -> None:
        poses = 1 if self.group is None else len(self.group.elements)
        self.latents, self.rows = self.encode_training_set(poses)
        if self.scale_by_std:
            factor = 1 / self.latents.std().item()
            self.latents *= factor
            self.prior.scale_factor *= factor

    @torch.no_grad()
    def encode_training_set(self, poses: int) -> tuple[Tensor, dict[int, int]]:
        """Latents (poses, N, c, h, w) of the training images, and the row of every sample's index."""
        latents: list[list[Tensor]] = [[] for _ in range(poses)]
        rows: dict[int, int] = {}
        for x, indices in in_batches(self.trainer.datamodule.dataset("train")):
            rows |= {index: len(rows) + i for i, index in enumerate(indices)}
            x = x.to(self.device)
            for pose in range(poses):
                g = torch.full((len(x),), pose, device=x.device)
                moved = x if self.group is None else self.group.transform(x, g)
                latents[pose].append(self.prior.encode(moved))
        return torch.stack([torch.cat(parts) for parts in latents]), rows

    def training_targets(self, batch: dict) -> Tensor:
        rows = torch.tensor([self.rows[index] for index in batch["index"].tolist()], device=self.device)
        return self.latents[torch.randint(len(self.latents), rows.shape, device=self.device), rows]

    @torch.no_grad()
    def targets(self, batch: dict) -> Tensor:
        return self.prior.encode(batch["x"])

    def sample_shape(self) -> tuple[int, int, int]:
        return self.prior.latent_shape(self.trainer.datamodule.image_shape)

    @torch.no_grad()
    def pictures(self, samples: Tensor) -> Tensor:
        return self.prior.decode(samples).clamp(-1, 1)

    def on_test_start(self) -> None:
        latents, _ = self.encode_training_set(poses=1)
        self.statistics = ImageStatistics(latents[0].cpu())
