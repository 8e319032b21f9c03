"""What all image data modules share: splits, loaders, shares of processes, posterior draws, finished samples."""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, Subset

Split = Literal["train", "val", "test"]


class ImageDataModule(LightningDataModule, ABC):
    """Feeds images of one shape; subclasses say where they come from.

    A sample is a dictionary: ``index`` (position in the full set, part of the sample's random seed), ``draw`` (number
    of the posterior draw), ``name``, and ``x`` (C, H, W) in [-1, 1]; when measurements are given, ``y`` and a
    dictionary ``parameters`` of the operator's parameters take the place of ``x``.

    Each process gets every world_size-th sample, without padding or repeats, whatever the trainer's
    ``use_distributed_sampler`` says.

    Args:
        batch_size: images per batch and process.
        num_workers: loader processes.
        limit: use only the first images of the predicted split.
        draws: posterior draws per measurement.
        predict_split: split that ``predict`` restores.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 1,
        num_workers: int = 0,
        limit: int | None = None,
        draws: int = 1,
        predict_split: Split = "test",
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("draws", draws, 1)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} must be at least 1")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.limit = limit
        self.draws = draws
        self.predict_split: Split = predict_split
        self.unreadable: dict[str, str] = {}
        """Names of the samples left out because they cannot be read, with the reason; known after ``setup``."""
        self.finished: frozenset[tuple[int, int]] = frozenset()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer samples than processes

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images; known after ``setup``."""

    @abstractmethod
    def dataset(self, split: Split) -> Dataset:
        """The images of a split; known after ``setup``."""

    def predicted(self) -> Dataset:
        """The images that ``predict`` restores, the first ``limit`` of the predicted split."""
        return first(self.dataset(self.predict_split), self.limit)

    def train_dataloader(self) -> DataLoader:
        dataset = self.dataset("train")
        if self.world_size == 1:
            sampler = RandomSampler(dataset)
        else:
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # seed_everything, the same on every rank
            sampler = DistributedSampler(dataset, self.world_size, self.rank, seed=seed)
        return self._loader(dataset, sampler, drop_last=len(dataset) >= self.batch_size * self.world_size)

    def val_dataloader(self) -> DataLoader:
        return self._share_loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader:
        return self._share_loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader:
        return self._share_loader(self.pending())

    def samples(self) -> "Draws":
        """Everything that ``predict`` is to restore, finished or not."""
        return Draws(self.predicted(), self.draws)

    def pending(self) -> Dataset:
        """What ``predict`` still has to restore."""
        samples = self.samples()
        return Subset(samples, [i for i, key in enumerate(samples.keys()) if key not in self.finished])

    def exclude(self, finished: Collection[tuple[int, int]]) -> None:
        """Leaves samples (index, draw) out of ``predict`` that an earlier run has finished."""
        self.finished = frozenset(finished)

    def splits(self, stage: str) -> tuple[Split, ...]:
        """The splits that a stage of the trainer uses."""
        return {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": (self.predict_split,)}[
            stage
        ]

    def model_part(self, name: str) -> Any:
        """An attribute of the module being run, like its prior; None where there is none."""
        return getattr(getattr(self.trainer, "lightning_module", None), name, None)

    def check_model(self, parts: Sequence[str] = ("prior", "operator")) -> None:
        """Raises ValueError when a part of the module being run cannot take images of ``image_shape``."""
        for part in map(self.model_part, parts):
            if hasattr(part, "check_shape"):
                part.check_shape(self.image_shape)

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.trainer.global_rank if self.trainer else 0

    def _share_loader(self, dataset: Dataset) -> DataLoader:
        """Loads this process's part, in order."""
        share = dataset
        if self.world_size > 1:
            share = Subset(dataset, range(self.rank, len(dataset), self.world_size))
        # Lightning leaves a DistributedSampler alone: any other would be shared out a second time
        return self._loader(share, DistributedSampler(share, num_replicas=1, rank=0, shuffle=False))

    @property
    def _on_gpu(self) -> bool:
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        return isinstance(device, torch.device) and device.type == "cuda"

    def _loader(self, dataset: Dataset, sampler: Sampler, drop_last: bool = False) -> DataLoader:
        return DataLoader(
            dataset=dataset,
            sampler=sampler,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._on_gpu,
            drop_last=drop_last,
        )


class Draws(Dataset):
    """Every sample of ``dataset`` ``draws`` times, the draws of one measurement side by side."""

    def __init__(self, dataset: Dataset, draws: int) -> None:
        self.dataset = dataset
        self.draws = draws

    def __len__(self) -> int:
        return len(self.dataset) * self.draws

    def __getitem__(self, i: int) -> dict[str, Any]:
        position, draw = divmod(i, self.draws)
        return copy.copy(self.dataset[position]) | {"draw": draw}

    def keys(self) -> list[tuple[int, int]]:
        """(index, draw) of every sample, without reading an image."""
        return [(index, draw) for index in indices_of(self.dataset) for draw in range(self.draws)]


def first(dataset: Dataset, limit: int | None) -> Dataset:
    """The first ``limit`` samples of a dataset, all when it has fewer or there is no limit."""
    if limit is None or limit >= len(dataset):
        return dataset
    return Subset(dataset, range(limit))


def indices_of(dataset: Dataset) -> list[int]:
    """Indices in the full set of the samples of a dataset or of a subset of one; datasets list them as ``indices``."""
    if isinstance(dataset, Subset):
        inner = indices_of(dataset.dataset)
        return [inner[i] for i in dataset.indices]
    return list(dataset.indices) if hasattr(dataset, "indices") else list(range(len(dataset)))


def split_of(name: str, val_percent: int, test_percent: int = 0) -> Split:
    """The split of a sample by a hash of its name, which stays when samples are added or taken away."""
    percentile = int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) % 100
    if percentile < val_percent:
        return "val"
    return "test" if percentile < val_percent + test_percent else "train"
