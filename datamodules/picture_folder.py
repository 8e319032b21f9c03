"""A folder of pictures, whichever of them are used."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from datamodules.base import ImageDataModule, Split, split_of
from datamodules.pictures import PICTURE_SUFFIXES, Inspection, Pictures, Preprocess, inspect_all, list_files

MANY = 10_000
"""Decoding more pictures than this at setup is announced."""


class PictureFolder(ImageDataModule):
    """The pictures below a folder, sorted by path; ``train`` and ``val`` are told apart by a hash of the file name.

    The pictures that a stage uses are decoded once at setup: damaged ones are reported, listed in ``unreadable`` and
    left out, and the positions of the others stay.

    Args:
        root: the folder, searched recursively.
        image_size: side of the images, or (height, width); that of the prior when left out. With ``preprocess: none``
            the pictures must have it, and when it is left out, they must all have one size.
        channels: 3 or 1 (grey); those of the prior when left out.
        preprocess: how pictures are brought to size: daps, adm, box, or none to keep theirs.
        val_percent: percentage of the pictures that validate a training.
        options: see ``ImageDataModule``.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if it holds no readable picture, if an argument is out of range, or if the prior or the operator
            cannot take the images.
    """

    suffixes: Collection[str] = PICTURE_SUFFIXES

    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int] | None = None,
        channels: Literal[1, 3] | None = None,
        preprocess: Preprocess = "daps",
        val_percent: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"image_size={image_size} must be one or two positive numbers")
        if channels not in (1, 3, None):
            raise ValueError(f"channels={channels} must be 1 or 3")
        if not 1 <= val_percent <= 99:
            raise ValueError(f"val_percent={val_percent} must be between 1 and 99")
        self.root = root
        self.image_size = None if size is None else tuple(size)
        self.channels = channels
        self.preprocess: Preprocess = preprocess
        self.val_percent = val_percent
        self._files: list[Path] | None = None
        self._inspections: dict[Path, Inspection] = {}
        self._shape: tuple[int, int, int] | None = None
        self._datasets: dict[Split | Literal["predicted"], Dataset] = {}
        self._told_about_colour = False

    def setup(self, stage: str) -> None:
        self.unreadable, self._shape, self._datasets = {}, None, {}
        for split in self.splits(stage):
            chosen = self.select(split, self.limit if stage == "predict" else None)
            if not chosen:
                message = f"no picture of root={self.root!r} falls into {split} with val_percent={self.val_percent}"
                if (stage, split) != ("fit", "val"):
                    raise ValueError(message)
                rank_zero_warn(f"{message}: the training is not validated")
            readable, faults = self._readable(chosen)
            self.unreadable |= faults
            self._datasets["predicted" if stage == "predict" else split] = self.make_dataset(readable)
        self.check_model()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        if self._shape is None:
            raise RuntimeError("image_shape is known after setup")
        return self._shape

    def dataset(self, split: Split) -> Dataset:
        if split not in self._datasets:  # one that the stage itself does not use
            self._datasets[split] = self.make_dataset(self._readable(self.select(split))[0])
        return self._datasets[split]

    def predicted(self) -> Dataset:
        if "predicted" not in self._datasets:
            raise RuntimeError("the images to restore are known after setup('predict')")
        return self._datasets["predicted"]

    def files(self) -> list[Path]:
        """All pictures of the folder, listed once."""
        if self._files is None:
            self._files = list_files(self.root, suffixes=self.suffixes)
        return self._files

    def select(self, split: Split, limit: int | None = None) -> list[tuple[int, Path]]:
        """Position and file of the first ``limit`` pictures of a split; ``test`` is the whole folder."""
        return self.hash_split(split)[:limit] if split != "test" else list(enumerate(self.files()[:limit]))

    def hash_split(self, split: Split, held_out: Collection[Path] = ()) -> list[tuple[int, Path]]:
        """Position and file of the pictures whose name falls into a split, except those that are held out."""
        return [
            (i, file)
            for i, file in enumerate(self.files())
            if file not in held_out and split_of(file.stem, self.val_percent) == split
        ]

    def make_dataset(self, chosen: Sequence[tuple[int, Path]]) -> Dataset:
        """The data set of readable pictures; sets the shape of the images."""
        indices, files = [i for i, _ in chosen], [file for _, file in chosen]
        channels = self._choose_channels()
        if self.preprocess != "none":
            height, width = self._choose_size()
        elif files:
            height, width = self._common_size(files)
        else:  # a training without validation pictures
            height, width = self.image_shape[1:]
        if self._shape not in (None, (channels, height, width)):
            raise ValueError(
                f"root={self.root!r} must hold pictures of one size, got {(height, width)} and {self._shape[1:]}"
            )
        self._shape = (channels, height, width)
        self._tell_about_colour(files, channels)
        return Pictures(files, indices, self._shape, self.preprocess)

    def inspection(self, file: Path) -> Inspection:
        """What is known about a file of a stage that has been set up."""
        return self._inspections[file]

    def _readable(self, chosen: Sequence[tuple[int, Path]]) -> tuple[list[tuple[int, Path]], dict[str, str]]:
        """The pictures that can be decoded, and why the others, by name, cannot; the latter are reported."""
        new = [file for _, file in chosen if file not in self._inspections]
        if len(new) > MANY:
            rank_zero_info(f"decoding the {len(new)} pictures of root={self.root!r} once, to find damaged ones")
        self._inspections |= zip(new, inspect_all(new), strict=True)
        damaged = [file for _, file in chosen if self._inspections[file].fault is not None]
        if not damaged:
            return list(chosen), {}
        example = f"{damaged[0].name!r} ({self._inspections[damaged[0]].fault})"
        if len(damaged) == len(chosen):
            raise ValueError(f"root={self.root!r}: none of {len(chosen)} files can be read, the first is {example}")
        rank_zero_warn(
            f"root={self.root!r}: {len(damaged)} of {len(chosen)} files cannot be read and are skipped: {example}"
        )
        faults: dict[str, str] = {}
        for file in damaged:
            name = file.stem if file.stem not in faults else str(file.relative_to(self.root))
            faults[name] = self._inspections[file].fault
        return [(i, file) for i, file in chosen if self._inspections[file].fault is None], faults

    def _choose_channels(self) -> int:
        shape = getattr(self.model_part("prior"), "image_shape", None)
        if self.channels is None and shape is None:
            raise ValueError("channels must be given (1 or 3): the model has no prior to take them from")
        channels = self.channels or shape[0]
        if channels not in (1, 3):
            raise ValueError(f"the prior is for images of {channels} channels, pictures have 1 or 3")
        return channels

    def _choose_size(self) -> tuple[int, int]:
        shape = getattr(self.model_part("prior"), "image_shape", None)
        if self.image_size is None and shape is None:
            raise ValueError("image_size must be given: the model has no prior to take it from")
        return self.image_size or tuple(shape[1:])

    def _common_size(self, files: Sequence[Path]) -> tuple[int, int]:
        """(H, W) of all files."""
        size = self._inspections[files[0]].shape[1:]
        wanted, whose = (size, repr(files[0].name)) if self.image_size is None else (self.image_size, "image_size")
        for file in files:
            size = self._inspections[file].shape[1:]
            if size != wanted:
                raise ValueError(
                    f"root={self.root!r}: {file.name!r} is {size[0]}x{size[1]} and {whose} {wanted[0]}x{wanted[1]}, "
                    "but with preprocess='none' all must be equal"
                )
        return wanted

    def _tell_about_colour(self, files: Sequence[Path], channels: int) -> None:
        """Says once per run that colours are lost."""
        coloured = sum(not self._inspections[file].is_grey for file in files)
        if channels == 1 and coloured and not self._told_about_colour:
            self._told_about_colour = True
            rank_zero_info(f"{coloured} of {len(files)} pictures are in colour and are converted to grey (ITU-R 601)")
