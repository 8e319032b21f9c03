"""Pictures in a folder: clean ones that are measured in the run, or measurements that the user brings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from datamodules.base import Split
from datamodules.measurements import PARAMETERS, Measurements, match_files
from datamodules.picture_folder import PictureFolder
from datamodules.pictures import ARRAY_SUFFIX, PICTURE_SUFFIXES

MAX_FACTOR = 32
"""Largest reduction of the image by an operator that ``preprocess='none'`` finds by itself."""


class ImageFolder(PictureFolder):
    """A folder of pictures to restore, or to train on.

    ``predict`` and ``test`` take the whole folder, ``fit`` and ``validate`` split it. With mode ``simulate`` the
    pictures are clean, and the run measures them. With mode ``given`` they are measurements y, in the size of y:
    nothing is resized, there is no ground truth, and ``image_size`` (the prior's, when left out) is that of the
    restored image; with ``preprocess: none`` it is found from the size of y.

    Args:
        root: the folder, searched recursively; with mode ``given`` it may hold .npy files (C, H, W) in units of A(x).
        mode: whether the pictures are clean images or measurements.
        masks: for inpainting with mode ``given``: one file for all, or a folder with one of the same stem for each.
            Pictures that are white where pixels are known, or .npy files of zeros and ones; what a picture to restore
            shows elsewhere is ignored.
        kernels: for deblurring with mode ``given``, likewise; odd square pictures or .npy files, divided by their sum.
        options: see ``PictureFolder``.

    Raises:
        FileNotFoundError: if a folder or file is missing.
        ValueError: if a mask or kernel is missing, superfluous, or of the wrong size; if a measurement does not fit the
            operator; and as ``PictureFolder``.
    """

    def __init__(
        self,
        root: str,
        mode: Literal["simulate", "given"] = "simulate",
        masks: str | None = None,
        kernels: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        if mode not in ("simulate", "given"):
            raise ValueError(f"mode={mode!r} must be 'simulate' or 'given'")
        self.mode = mode
        self.masks = masks
        self.kernels = kernels
        self.parameter_paths = {"mask": masks, "kernel": kernels}
        if mode == "given":
            self.suffixes = PICTURE_SUFFIXES | {ARRAY_SUFFIX}
        for name, path in self.parameter_paths.items():
            if path is not None and mode != "given":
                raise ValueError(
                    f"{PARAMETERS[name][1]}={path!r} needs mode='given'; with mode='simulate' they are drawn"
                )

    def setup(self, stage: str) -> None:
        if self.mode == "given" and stage != "predict":
            raise ValueError(f"mode='given' has no clean images, which {stage} needs; it is for predict")
        super().setup(stage)

    def dataset(self, split: Split) -> Dataset:
        if self.mode == "given":
            raise ValueError(f"mode='given' has no clean images, but {split} images are asked for")
        return super().dataset(split)

    def check_model(self, parts: Sequence[str] = ("prior", "operator")) -> None:
        operator = self.model_part("operator")
        if self.mode == "given" and operator is not None and operator.parameter_names:
            parts = ("prior",)  # an operator's check_shape is about parameters it draws; the given ones are checked
        super().check_model(parts)

    def make_dataset(self, chosen: Sequence[tuple[int, Path]]) -> Dataset:
        if self.mode == "simulate":
            return super().make_dataset(chosen)
        indices, files = [i for i, _ in chosen], [file for _, file in chosen]
        self._shape, y_shape = self._given_shapes(files)
        for file in files:
            self._check_measurement(file, y_shape)
        self._tell_about_colour(files, y_shape[0])
        dataset = Measurements(files, indices, y_shape, self._parameter_files(files))
        self._check_parameters(dataset)
        return dataset

    def _given_shapes(self, files: Sequence[Path]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes (C, H, W) of the restored images and of their measurements."""
        operator, channels = self.model_part("operator"), self._choose_channels()
        if self.preprocess != "none" or self.image_size is not None:
            shape = (channels, *self._choose_size())
            return shape, shape if operator is None else tuple(operator.y_shape(shape))
        size = self._common_size(files)
        if operator is None:
            return (channels, *size), (channels, *size)
        for factor in range(1, MAX_FACTOR + 1):
            shape = (channels, factor * size[0], factor * size[1])
            if tuple(operator.y_shape(shape)[1:]) == size:
                return shape, tuple(operator.y_shape(shape))
        kind = type(operator).__name__
        raise ValueError(f"image_size must be given: {kind} makes {size[0]}x{size[1]} of no multiple of that size")

    def _check_measurement(self, file: Path, y_shape: tuple[int, int, int]) -> None:
        shape, is_array = self.inspection(file).shape, self.inspection(file).is_array
        if not is_array and y_shape[0] in (1, 3):
            shape = (y_shape[0], *shape[1:])  # converted when it is read
        if shape != y_shape:
            operator = type(self.model_part("operator")).__name__
            raise ValueError(
                f"root={self.root!r}: measurement {file.name!r} has the shape {shape}, but {operator} makes {y_shape} "
                f"of images {self.image_shape}"
            )

    def _parameter_files(self, files: Sequence[Path]) -> dict[str, list[Path]]:
        """The files of every parameter that the operator has, one per measurement."""
        operator = self.model_part("operator")
        kind = type(operator).__name__
        given = {name for name, path in self.parameter_paths.items() if path is not None}
        wanted = given if operator is None else set(operator.parameter_names)
        for name in sorted(wanted - given):
            if name not in PARAMETERS:
                raise ValueError(f"mode='given' cannot be used with {kind}, whose {name} cannot be read from files")
            argument = PARAMETERS[name][1]
            raise ValueError(f"{argument} must be given: with mode='given', {kind} needs the {name} of every picture")
        for name in sorted(given - wanted):
            raise ValueError(f"{PARAMETERS[name][1]}={self.parameter_paths[name]!r} is not used: {kind} has no {name}")
        return {
            name: match_files(PARAMETERS[name][1], self.parameter_paths[name], self.root, files)
            for name in sorted(wanted)
        }

    def _check_parameters(self, dataset: Measurements) -> None:
        """Reads all masks or kernels before the run, and lets the operator judge them."""
        operator = self.model_part("operator")
        first_shapes: dict[str, tuple[int, ...]] = {}
        for i, file in enumerate(dataset.files):
            parameters = dataset.parameters_of(i)
            for name, value in parameters.items():
                argument = f"{PARAMETERS[name][1]}={self.parameter_paths[name]!r}"
                shape = tuple(value.shape)
                if name == "mask" and shape[1:] != self.image_shape[1:]:
                    size = f"{shape[1]}x{shape[2]} and not {self.image_shape[1]}x{self.image_shape[2]} as the images"
                    raise ValueError(f"{argument}: the mask of {file.name!r} is {size}")
                if first_shapes.setdefault(name, shape) != shape and self.batch_size > 1:
                    raise ValueError(f"{argument} of several sizes need batch_size=1, not {self.batch_size}")
            if operator is not None and parameters:
                arguments = " and ".join(PARAMETERS[name][1] for name in parameters)
                try:
                    operator.with_parameters({k: value[None] for k, value in parameters.items()}, self.image_shape)
                except ValueError as error:
                    raise ValueError(f"{arguments}: those of {file.name!r} do not fit ({error})") from error
