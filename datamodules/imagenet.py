"""ImageNet with the evaluation sets of the papers."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.named_pictures import NamedPictures
from datamodules.pictures import Preprocess

VALIDATION_SIZE = 50_000
DAPS = range(49000, 49100)


class ImageNet(NamedPictures):
    """The ILSVRC 2012 validation set (Russakovsky et al., IJCV 2015), ILSVRC2012_val_00000001.JPEG to 00050000.

    Args:
        root: folder with the pictures, flat or in class folders; to train, the folder of the training pictures.
        subset: daps (00049000 to 00049099), mcg (the first 1000 whose sides are at least 256; Chung et al., MCG,
            NeurIPS 2022), or a text file with one name per line (as DDRM and DiffPIR publish).
        image_size: side of the images.
        preprocess: daps, or adm as in the training of the ADM prior; they differ by 0.01 in the mean.
        allow_missing: restore the pictures of the subset that are there instead of refusing an incomplete one.
        options: see ``PictureFolder``.

    Raises:
        ValueError: if the subset is unknown or incomplete, and as ``PictureFolder``.
    """

    pattern = re.compile(r"(?:ILSVRC2012_val_)?(\d+)")

    def __init__(
        self,
        root: str,
        subset: str = "daps",
        image_size: int | None = 256,
        preprocess: Preprocess = "daps",
        allow_missing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(root, subset, allow_missing, image_size=image_size, preprocess=preprocess, **options)
        self._listed: Sequence[int | str] | None = None
        if subset == "daps":
            self._listed = DAPS
        elif subset != "mcg":
            self._listed = self.read_list(subset, ("daps", "mcg"))

    def listed(self) -> Sequence[int | str]:
        return self._mcg if self._listed is None else self._listed

    @cached_property
    def _mcg(self) -> list[int]:
        """The first 1000 numbers but for pictures that are too small; missing ones count, so that they are reported."""
        numbers = (
            i for i in range(1, VALIDATION_SIZE + 1) if i not in self.by_key() or not _is_small(self.by_key()[i])
        )
        return [number for number, _ in zip(numbers, range(1000), strict=False)]


def _is_small(file: Path) -> bool:
    """Whether a side is below 256; unknown, hence no, for a damaged file, which is reported later."""
    try:
        with Image.open(file) as picture:
            return min(picture.size) < 256
    except OSError:
        return False
