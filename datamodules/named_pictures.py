"""Data sets whose evaluated pictures are named in a published list."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.base import Split
from datamodules.picture_folder import PictureFolder
from datamodules.pictures import PICTURE_SUFFIXES

LISTED = re.compile(rf"(?P<path>.*)({'|'.join(map(re.escape, sorted(PICTURE_SUFFIXES)))})(\s+\d+)?", re.IGNORECASE)
"""A line of a list of pictures, which may end with a class label."""


class NamedPictures(PictureFolder, ABC):
    """A folder whose test images are picked by their numbers or names, in the order of the published list.

    ``index`` is the position in that list, whichever of its pictures are there. The listed pictures are kept out of
    ``train`` and ``val``.
    """

    pattern: re.Pattern[str]
    """Matches the stem of a numbered picture; its group is the number."""

    def __init__(self, root: str, subset: str, allow_missing: bool = False, **options: Any) -> None:
        super().__init__(root, **options)
        self.subset = subset
        self.allow_missing = allow_missing
        self._by_key: dict[int | str, Path] | None = None

    @abstractmethod
    def listed(self) -> Sequence[int | str]:
        """Numbers or names of the test images, in order."""

    def held_out(self) -> Sequence[int | str]:
        """Numbers or names that are kept out of a training."""
        return self.listed()

    def select(self, split: Split, limit: int | None = None) -> list[tuple[int, Path]]:
        if split != "test":
            held_out = {self.by_key()[key] for key in self.held_out() if key in self.by_key()}
            return self.hash_split(split, held_out)[:limit]
        keys = list(self.listed())[:limit]
        self.report_missing([key for key in keys if key not in self.by_key()], len(keys))
        return [(i, self.by_key()[key]) for i, key in enumerate(keys) if key in self.by_key()]

    def report_missing(self, missing: Sequence[int | str], total: int) -> None:
        """Raises or, when allowed, warns about pictures that are not in the folder."""
        if not missing:
            return
        message = f"root={self.root!r} lacks {len(missing)} of {total} pictures of subset={self.subset!r}"
        example = f"{missing[0]:05d}" if isinstance(missing[0], int) else missing[0]
        if not self.allow_missing or len(missing) == total:
            raise ValueError(f"{message}, the first is {example!r}; allow_missing=true restores those that are there")
        rank_zero_warn(f"{message}, the first is {example!r}: results are not comparable with published ones")

    def key(self, name: str) -> int | str:
        """The number in the stem of a picture's name, or the stem where it is not numbered."""
        numbered = self.pattern.fullmatch(name)
        return int(numbered[1]) if numbered else name

    def by_key(self) -> dict[int | str, Path]:
        """The pictures of the folder by number or name.

        Raises:
            ValueError: if two have the same.
        """
        if self._by_key is None:
            found: dict[int | str, Path] = {}
            for file in self.files():
                key = self.key(file.stem)
                if key in found:
                    raise ValueError(f"root={self.root!r} holds picture {key!r} twice: {found[key]} and {file}")
                found[key] = file
            self._by_key = found
        return self._by_key

    def read_list(self, path: str, presets: Sequence[str]) -> list[int | str]:
        """Numbers or names in a list file: one per line, with or without folder, suffix and class label.

        Raises:
            ValueError: if there is no such file, or it lists nothing, or a picture twice.
        """
        if not Path(path).is_file():
            raise ValueError(f"subset={path!r} is neither a list file nor one of {', '.join(presets)}")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        keys = []
        for line in lines:
            if line and not line.startswith("#"):
                suffixed = LISTED.fullmatch(line)
                keys.append(self.key(Path(suffixed["path"] if suffixed else line).name))
        if not keys:
            raise ValueError(f"subset={path!r} lists no pictures")
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ValueError(f"subset={path!r} lists {twice!r} twice")
        return keys
