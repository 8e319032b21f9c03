"""Images packed into one HDF5 file, the fast way to feed a training."""

import os
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from datamodules.base import ImageDataModule, Split, first


class Packed(ImageDataModule):
    """An HDF5 file with groups train, val and test, each with ``images`` uint8 [N, C, H, W] and optional ``names``.

    ``python cli.py data pack`` makes such files. Splits that fit are read into memory at setup: chunks of many images
    make single random reads slow.

    Args:
        path: the file.
        indices: restore only the images at these positions of the predicted split.
        cache_bytes: largest split that is read into memory; of larger ones each image is read when it is wanted.
        options: see ``ImageDataModule``.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is truncated or has another layout, if an index is not in it, or if the prior or the operator
            cannot take its images.
    """

    def __init__(
        self, path: str, indices: list[int] | None = None, cache_bytes: int = 2 * 1024**3, **options: Any
    ) -> None:
        super().__init__(**options)
        self.path = path
        self.indices = indices
        self.cache_bytes = cache_bytes
        self.images: dict[Split, ArrayImages | FileImages] = {}

    def setup(self, stage: str) -> None:
        shapes = {split: self.dataset(split).image_shape for split in self.splits(stage)}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"path={self.path!r} must hold images of one shape (C, H, W), got {shapes}")
        if stage == "predict":
            self.predicted()
        self.check_model()

    def teardown(self, stage: str) -> None:
        for images in self.images.values():
            images.close()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        if not self.images:
            raise RuntimeError("image_shape is known after setup")
        return next(iter(self.images.values())).image_shape

    def dataset(self, split: Split) -> Dataset:
        if split not in self.images:
            images = FileImages(self.path, split)
            self.images[split] = images.in_memory() if images.num_bytes <= self.cache_bytes else images
        return self.images[split]

    def predicted(self) -> Dataset:
        dataset = self.dataset(self.predict_split)
        if self.indices is None:
            return first(dataset, self.limit)
        if not all(0 <= i < len(dataset) for i in self.indices):
            raise ValueError(
                f"indices={self.indices} must be from 0 to {len(dataset) - 1}, the images of {self.predict_split}"
            )
        if len(set(self.indices)) < len(self.indices):
            raise ValueError(f"indices={self.indices} must not repeat an image; draws asks for several restorations")
        return first(Subset(dataset, self.indices), self.limit)


class ArrayImages(Dataset):
    """uint8 images (N, C, H, W) in memory, served in [-1, 1]."""

    def __init__(self, pixels: Tensor, names: list[str]) -> None:
        self.pixels = pixels
        self.names = names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"index": i, "name": self.names[i], "x": self.pixels[i].float() / 127.5 - 1}

    def close(self) -> None:
        """Nothing to close."""


class FileImages(Dataset):
    """One split of a packed file, each image read when it is wanted and served in [-1, 1].

    Args:
        path: the file.
        split: the split.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is truncated, not HDF5 or has another layout.
    """

    def __init__(self, path: str | Path, split: Split) -> None:
        self.path = str(path)
        self.split = split
        self._images: h5py.Dataset | None = None
        self._owner = 0
        if not Path(path).is_file():
            raise FileNotFoundError(f"path={self.path!r} does not exist; it must be an HDF5 file with images per split")
        try:
            with h5py.File(path, "r") as file:
                count, self.image_shape, self.names = self._describe(file)
        except OSError as error:
            raise ValueError(f"path={self.path!r} is truncated or not an HDF5 file ({error})") from error
        self.names = self.names or [f"{split}{i:05d}" for i in range(count)]

    @property
    def num_bytes(self) -> int:
        """Size of all pixels in memory."""
        channels, height, width = self.image_shape
        return len(self) * channels * height * width

    def in_memory(self) -> ArrayImages:
        """The same images, read once."""
        pixels = self._read(slice(None))
        self.close()
        return ArrayImages(pixels, self.names)

    def close(self) -> None:
        """Closes the file, which the next access opens again."""
        if self._images is not None and self._owner == os.getpid():
            self._images.file.close()
        self._images = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"index": i, "name": self.names[i], "x": self._read(i).float() / 127.5 - 1}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}

    def _read(self, which: int | slice) -> Tensor:
        try:
            if self._images is None or self._owner != os.getpid():  # HDF5 handles do not survive a fork
                self._images, self._owner = h5py.File(self.path, "r")[self.split]["images"], os.getpid()
            return torch.from_numpy(self._images[which])
        except OSError as error:
            raise ValueError(f"path={self.path!r}: {self.split}/images is damaged ({error})") from error

    def _describe(self, file: h5py.File) -> tuple[int, tuple[int, int, int], list[str]]:
        """Number of images, (C, H, W) and names, empty when the file has none."""
        split, path = self.split, self.path
        group = file.get(split)
        if not isinstance(group, h5py.Group) or not isinstance(group.get("images"), h5py.Dataset):
            raise ValueError(f"path={path!r} has no data set {split}/images; it has {', '.join(file) or 'nothing'}")
        images = group["images"]
        if images.ndim != 4 or images.dtype != "uint8":
            raise ValueError(
                f"path={path!r}: {split}/images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}"
            )
        if len(images) == 0:
            raise ValueError(f"path={path!r}: {split}/images is empty")
        if group.attrs.get("count", len(images)) != len(images):
            raise ValueError(f"path={path!r}: {split}/images has {len(images)} of {group.attrs['count']} images")
        names = []
        if "names" in group:
            if h5py.check_string_dtype(group["names"].dtype) is None:
                raise ValueError(f"path={path!r}: {split}/names must be strings, got {group['names'].dtype}")
            names = list(group["names"].asstr()[:])
        if names and len(names) != len(images):
            raise ValueError(f"path={path!r}: {split} has {len(names)} names for {len(images)} images")
        return len(images), tuple(images.shape[1:]), names
