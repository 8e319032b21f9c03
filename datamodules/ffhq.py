"""Flickr-Faces-HQ with the evaluation sets of the papers."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from datamodules.named_pictures import NamedPictures


class Preset(NamedTuple):
    """Numbers that a paper evaluates, and those that are kept out of a training with it."""

    evaluated: range
    held_out: range


PRESETS = {
    "dps": Preset(range(1000), range(1000)),  # the prior of DPS was trained without the first thousand
    "daps": Preset(range(100), range(1000)),
    "diffstategrad": Preset(range(60000, 60100), range(60000, 70000)),  # in NVIDIA's validation part
    "diffpir": Preset(range(69007, 70000, 10), range(60000, 70000)),
}


class FFHQ(NamedPictures):
    """Flickr-Faces-HQ (Karras et al., CVPR 2019): pictures named by their number, 00000.png to 69999.png.

    The pixel prior of DPS was trained without 00000 to 00999, latent priors most likely without 60000 to 69999:
    ``dps`` (all of the former) and ``daps`` (00000 to 00099) suit pixel priors, ``diffstategrad`` (60000 to 60099) and
    ``diffpir`` (69007, 69017, ... 69997) latent ones. Which of them EquiReg used is not published. ``fit`` leaves the
    whole held-out part of the subset aside.

    Args:
        root: folder with the pictures, flat or in NVIDIA's subfolders; 256x256, or larger with ``preprocess: box``.
        subset: dps, daps, diffstategrad, diffpir, or a text file with one name per line.
        image_size: side of the images.
        allow_missing: restore the pictures of the subset that are there instead of refusing an incomplete one.
        options: see ``PictureFolder``.

    Raises:
        ValueError: if the subset is unknown or incomplete, and as ``PictureFolder``.
    """

    pattern = re.compile(r"(?:img)?(\d+)")  # img: NVIDIA's dataset_tool

    def __init__(
        self,
        root: str,
        subset: str = "daps",
        image_size: int | None = 256,
        allow_missing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(root, subset, allow_missing, image_size=image_size, **options)
        preset = PRESETS.get(subset)
        self._listed = preset.evaluated if preset else self.read_list(subset, list(PRESETS))
        self._held_out = preset.held_out if preset else self._listed

    def listed(self) -> Sequence[int | str]:
        return self._listed

    def held_out(self) -> Sequence[int | str]:
        return self._held_out
