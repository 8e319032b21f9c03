"""Measurements that the user brings: y from files, with the masks or kernels of the operator."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.pictures import ARRAY_SUFFIX, PICTURE_SUFFIXES, list_files, read_array, read_picture, to_bytes


class Measurements(Dataset):
    """Measurements in [-1, 1] (arrays in units of A(x)), each with the parameters of its operator.

    Pictures become zero where their mask is zero, whatever they show there; arrays are taken as they are.

    Args:
        files: pictures, or .npy files of shape ``y_shape``.
        indices: position of each in the full set.
        y_shape: (C, H, W) of one measurement.
        parameters: files of each parameter, one per measurement; the keys are the operator's ``parameter_names``.
    """

    def __init__(
        self,
        files: Sequence[Path],
        indices: Sequence[int],
        y_shape: tuple[int, int, int],
        parameters: Mapping[str, Sequence[Path]],
    ) -> None:
        self.files = files
        self.indices = indices
        self.y_shape = y_shape
        self.parameters = parameters

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        file, parameters = self.files[i], self.parameters_of(i)
        if file.suffix.lower() == ARRAY_SUFFIX:
            y = read_array(file)
        else:
            y = to_bytes(read_picture(file, self.y_shape[0])).float() / 127.5 - 1
            if "mask" in parameters:
                y = parameters["mask"] * y  # what the picture shows in its holes is no measurement
        return {"index": self.indices[i], "name": file.stem, "y": y, "parameters": parameters}

    def parameters_of(self, i: int) -> dict[str, Tensor]:
        """The operator's parameters of measurement ``i``.

        Raises:
            ValueError: if a file cannot be read or holds no such parameter.
        """
        return {name: read_parameter(name, files[i]) for name, files in self.parameters.items()}


def match_files(argument: str, path: str, root: str, files: Sequence[Path]) -> list[Path]:
    """The mask or kernel file of every measurement.

    Args:
        argument: name of the argument that holds ``path``, for the errors.
        path: one file for all, or a folder with a file of the same stem (in the same subfolder) for each.
        root: folder of the measurements.
        files: the measurements.

    Raises:
        FileNotFoundError: if ``path`` is missing.
        ValueError: if a measurement has no file, or several.
    """
    if Path(path).is_file():
        return [Path(path)] * len(files)
    if not Path(path).exists():
        raise FileNotFoundError(f"{argument}={path!r} must be an existing file or folder")
    candidates: dict[Path, list[Path]] = {}
    for file in list_files(path, argument, PICTURE_SUFFIXES | {ARRAY_SUFFIX}):
        candidates.setdefault(file.relative_to(path).with_suffix(""), []).append(file)
    keys = [file.relative_to(root).with_suffix("") for file in files]
    missing = [str(key) for key in keys if key not in candidates]
    if missing:
        raise ValueError(
            f"{argument}={path!r} lacks a file for {len(missing)} of {len(files)} measurements, "
            f"the first is {missing[0]!r}"
        )
    for key in keys:
        if len(candidates[key]) > 1:
            raise ValueError(f"{argument}={path!r} holds several files for {str(key)!r}: {_names(candidates[key])}")
    return [candidates[key][0] for key in keys]


def read_parameter(name: str, file: Path) -> Tensor:
    """A parameter of an operator from a picture or .npy file.

    Raises:
        ValueError: if the file cannot be read or holds something else.
    """
    read, _ = PARAMETERS[name]
    try:
        if file.suffix.lower() == ARRAY_SUFFIX:
            values = np.load(file, allow_pickle=False)
        else:
            values = np.asarray(read_picture(file, channels=1))
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise ValueError(f"{name} file {str(file)!r} cannot be read ({error})") from error
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or values.dtype.kind not in "buif":
        raise ValueError(f"{name} file {str(file)!r} must hold one array (H, W), got {values.dtype} {values.shape}")
    return read(values, file)


def read_mask(values: np.ndarray, file: Path) -> Tensor:
    """A mask (1, H, W) of zeros and ones, from zeros and ones or from a picture that is white where pixels are kept."""
    if file.suffix.lower() != ARRAY_SUFFIX:
        values = values > 127
        hint = ", in a picture those brighter than 127"
    else:
        hint = ""
    if not np.isin(values, (0, 1)).all():
        raise ValueError(
            f"mask file {str(file)!r} must hold only zeros and ones, got {values.min():g} to {values.max():g}"
        )
    if not values.any():
        raise ValueError(f"mask file {str(file)!r} keeps no pixel; ones mark the kept pixels{hint}")
    return torch.from_numpy(values.astype(np.float32))[None]


def read_kernel(values: np.ndarray, file: Path) -> Tensor:
    """A blur kernel (k, k), divided by its sum."""
    height, width = values.shape
    if height != width or height % 2 == 0:
        raise ValueError(f"kernel file {str(file)!r} must be square with an odd side, got {height}x{width}")
    total = values.sum(dtype=np.float64)
    if not (np.isfinite(total) and total > 0):
        raise ValueError(f"kernel file {str(file)!r} must have a positive sum, got {total:g}")
    return torch.from_numpy((values / total).astype(np.float32))


PARAMETERS: dict[str, tuple[Callable[[np.ndarray, Path], Tensor], str]] = {
    "mask": (read_mask, "masks"),
    "kernel": (read_kernel, "kernels"),
}
"""Parameters of operators that can be read from files: the reader, and the argument that names the files."""


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)
