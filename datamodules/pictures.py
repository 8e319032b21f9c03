"""Picture files: finding, reading and bringing them to the size that a prior wants."""

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
ARRAY_SUFFIX = ".npy"

Preprocess = Literal["daps", "adm", "box", "none"]
"""How a picture is brought to size; all but ``none`` end with a centre crop.

daps: shorter side by antialiased bilinear interpolation of floats (zhangbingliang2019/DAPS).
adm: halved with BOX while both sides are twice too large, then BICUBIC (openai/guided-diffusion, its training data).
box: shorter side by Pillow's BOX filter, the area mean up to rounding where the factor is an integer.
none: no change.
"""


class Inspection(NamedTuple):
    """What decoding a file once tells: its shape and kind, or why it cannot be decoded."""

    shape: tuple[int, int, int] = (0, 0, 0)
    is_grey: bool = True
    is_array: bool = False
    fault: str | None = None


class Pictures(Dataset):
    """Picture files as images in [-1, 1].

    Args:
        files: the pictures.
        indices: position of each in the full set.
        shape: (C, H, W) of the images.
        preprocess: how they are brought to this size.
    """

    def __init__(
        self, files: Sequence[Path], indices: Sequence[int], shape: tuple[int, int, int], preprocess: Preprocess
    ) -> None:
        self.files = files
        self.indices = indices
        self.shape = shape
        self.preprocess: Preprocess = preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        file, (channels, *size) = self.files[i], self.shape
        return {
            "index": self.indices[i],
            "name": file.stem,
            "x": prepare(read_picture(file, channels), tuple(size), self.preprocess),
        }


def list_files(root: str, argument: str = "root", suffixes: Collection[str] = PICTURE_SUFFIXES) -> list[Path]:
    """All files below a folder with one of the suffixes, sorted by path string; names with a leading dot are left out.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if it holds no such file.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{argument}={root!r} must be an existing folder")
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = (Path(folder, name) for name in names if not name.startswith("."))
        found += [file for file in visible if file.suffix.lower() in suffixes]
    if not found:
        raise ValueError(f"{argument}={root!r} holds no file that ends in {', '.join(sorted(suffixes))}")
    return sorted(found, key=str)


def inspect_all(files: Sequence[Path]) -> list[Inspection]:
    """Decodes every file once, in threads."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(inspect, files))


def inspect(file: Path) -> Inspection:
    """Decodes a picture or array."""
    try:
        if file.suffix.lower() == ARRAY_SUFFIX:
            return Inspection(tuple(read_array(file).shape), is_array=True)
        with Image.open(file) as opened:
            is_grey = opened.mode in ("1", "L", "LA", "La") or opened.mode.startswith("I;16")
        picture = read_picture(file, channels=1 if is_grey else 3)
        return Inspection((len(picture.getbands()), picture.height, picture.width), is_grey)
    except Exception as error:  # decoders raise nearly anything on damaged files; the caller reports the reason
        return Inspection(fault=str(error) or type(error).__name__)


def read_picture(file: Path, channels: int) -> Image.Image:
    """A picture in 8-bit RGB or grey; as in the papers, alpha is dropped, colour profile and EXIF rotation are ignored.

    Raises:
        ValueError: if its pixels have no fixed range (32-bit pictures).
    """
    with Image.open(file) as picture:
        if picture.mode.startswith("I;16"):  # Pillow would clip it at 255
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        elif picture.mode in ("I", "F"):
            raise ValueError(f"32-bit pixels (mode {picture.mode}) have no fixed range")
        picture = picture.convert("RGB")
    return picture.convert("L") if channels == 1 else picture


def read_array(file: Path) -> Tensor:
    """A measurement (C, H, W) that is no picture, float32, from a .npy file in the units of A(x).

    Raises:
        ValueError: if it has another rank, holds integers, or numbers that are not finite.
    """
    array = np.load(file, allow_pickle=False)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(f"the array must be floats (C, H, W), got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("the array holds numbers that are not finite")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def prepare(picture: Image.Image, size: tuple[int, int], preprocess: Preprocess) -> Tensor:
    """A picture as an image (C, H, W) in [-1, 1] of ``size`` (H, W)."""
    if preprocess == "daps":
        return _daps(picture, size)
    if preprocess == "adm":
        picture = _crop_centre(_adm_resize(picture, size), size)
    elif preprocess == "box":
        picture = _crop_centre(picture.resize(_covering(picture, size)[::-1], Image.Resampling.BOX), size)
    return to_bytes(picture).float() / 127.5 - 1


def to_bytes(picture: Image.Image) -> Tensor:
    """The pixels of a grey or RGB picture, uint8 (C, H, W)."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _daps(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    x_01 = to_bytes(picture).float() / 255
    height, width = _covering(picture, size)
    if x_01.shape[1:] != (height, width):
        x_01 = F.interpolate(x_01[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (round((have - want) / 2) for have, want in zip((height, width), size, strict=True))
    return (x_01[:, top : top + size[0], left : left + size[1]] * 2 - 1).clamp(-1, 1)


def _adm_resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    while picture.height >= 2 * height and picture.width >= 2 * width:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(height / picture.height, width / picture.width)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def _covering(picture: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (H, W) of the picture's aspect ratio that covers ``size``; the longer side is rounded down."""
    height, width = size
    if height * picture.width >= width * picture.height:
        return height, height * picture.width // picture.height
    return width * picture.height // picture.width, width


def _crop_centre(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    top, left = (picture.height - size[0]) // 2, (picture.width - size[1]) // 2
    return picture.crop((left, top, left + size[1], top + size[0]))
