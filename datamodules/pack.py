"""Packs a folder of pictures into the HDF5 file that ``Packed`` reads."""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.base import Split, split_of
from datamodules.pictures import Preprocess, list_files, prepare, read_picture

SPLITS: tuple[Split, ...] = ("train", "val", "test")
FILTERS = {"daps": "bilinear, antialiased", "adm": "Pillow BOX, then BICUBIC", "box": "Pillow BOX", "none": "none"}
BLOCK = 256
"""Pictures that are prepared before they are written together."""


def pack(
    input: str,
    output: str,
    size: int,
    preprocess: Preprocess = "adm",
    channels: Literal[1, 3] = 3,
    val_percent: int = 5,
    test_percent: int = 0,
    source: str = "",
    licence: str = "",
    overwrite: bool = False,
) -> dict[str, int]:
    """Writes all pictures below a folder into one HDF5 file with the groups train, val and test.

    Each group has ``images`` uint8 [N, C, size, size] and ``names``. A picture's split follows from a hash of its name.
    Pictures that cannot be read are reported and left out. The file appears only when it is complete.

    Args:
        input: folder of pictures, searched recursively.
        output: the file to write.
        size: side of the images; with ``preprocess='none'`` the side that all pictures must have.
        preprocess: how pictures are brought to size: daps, adm, box or none.
        channels: 3, or 1 for grey.
        val_percent: percentage of the pictures that goes to val.
        test_percent: percentage that goes to test.
        source: where the pictures come from, kept in the file.
        licence: their licence, kept in the file.
        overwrite: replace an existing file.

    Returns:
        The number of pictures per split, and of those left out as ``unreadable``.

    Raises:
        FileExistsError: if ``output`` exists and ``overwrite`` is false.
        FileNotFoundError: if ``input`` or the folder of ``output`` is missing.
        ValueError: if an argument is out of range, no picture can be read, or one that is not resized has another size.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    if preprocess not in FILTERS:
        raise ValueError(f"preprocess={preprocess!r} must be one of {', '.join(FILTERS)}")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels} must be 1 or 3")
    if min(val_percent, test_percent) < 0 or val_percent + test_percent > 100:
        raise ValueError(
            f"val_percent={val_percent} and test_percent={test_percent} must be percentages, 100 together at most"
        )
    target = Path(output)
    if target.exists() and not overwrite:
        raise FileExistsError(f"output={output!r} exists; overwrite=true replaces it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output={output!r}: the folder {str(target.parent)!r} does not exist")
    files = list_files(input, "input")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        counts = _write(partial, files, (channels, size, size), preprocess, (val_percent, test_percent))
        if not any(counts[split] for split in SPLITS):
            raise ValueError(f"input={input!r}: none of {len(files)} pictures can be read")
        with h5py.File(partial, "r+") as file:
            file.attrs["preprocess"] = preprocess
            file.attrs["filter"] = FILTERS[preprocess]
            file.attrs["source"] = source or Path(input).name
            file.attrs["licence"] = licence
            file.attrs["version"] = f"Pillow {version('pillow')}, torch {version('torch')}"
            file.attrs["count"] = sum(counts[split] for split in SPLITS)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    if counts["unreadable"]:
        rank_zero_warn(
            f"input={input!r}: {counts['unreadable']} of {len(files)} pictures cannot be read and are left out"
        )
    return counts


def pack_command(args: list[str]) -> int:
    """``cli.py data pack``: the command line of ``pack``."""
    parser = ArgumentParser(prog="cli.py data pack", description=pack.__doc__.splitlines()[0])
    parser.add_function_arguments(pack)
    options = parser.parse_args(args)
    counts = pack(**options.as_dict())
    print(f"{options.output}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    return 0


def _write(
    path: Path,
    files: Sequence[Path],
    shape: tuple[int, int, int],
    preprocess: Preprocess,
    percents: tuple[int, int],
) -> dict[str, int]:
    counts = dict.fromkeys((*SPLITS, "unreadable"), 0)
    with h5py.File(path, "w") as file:
        for split in SPLITS:
            members = [picture for picture in files if split_of(picture.stem, *percents) == split]
            # small images share chunks, to be compressed and read at once; large ones are read one by one
            options = {"chunks": (1, *shape)} if shape[1] >= 128 else {"chunks": (BLOCK, *shape), "compression": "gzip"}
            images = file.create_dataset(
                f"{split}/images", (0, *shape), "uint8", maxshape=(None, *shape), shuffle=shape[1] < 128, **options
            )
            names: list[str] = []
            for pixels, block_names in _blocks(members, shape, preprocess):
                images.resize(len(images) + len(pixels), axis=0)
                images[-len(pixels) :] = pixels
                names += block_names
            file[split].create_dataset("names", data=names, dtype=h5py.string_dtype())
            file[split].attrs["count"] = counts[split] = len(names)
            counts["unreadable"] += len(members) - len(names)
    return counts


def _blocks(
    files: Sequence[Path], shape: tuple[int, int, int], preprocess: Preprocess
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Pixels (n, C, H, W) and names of the readable pictures, at most ``BLOCK`` at a time."""
    for start in range(0, len(files), BLOCK):
        pixels, names = [], []
        for file in files[start : start + BLOCK]:
            try:
                picture = read_picture(file, shape[0])
            except Exception as error:  # decoders raise nearly anything on damaged files
                rank_zero_warn(f"{str(file)!r} cannot be read ({error})")
                continue
            x = prepare(picture, shape[1:], preprocess)
            if x.shape != shape:
                raise ValueError(
                    f"{str(file)!r} is {x.shape[1]}x{x.shape[2]}, but with preprocess='none' size={shape[1]}"
                )
            pixels.append(((x + 1) * 127.5).round().byte().numpy())
            names.append(file.stem)
        if names:
            yield np.stack(pixels), names
