"""Finds the golden files: arrays recorded from the published code, which ours has to reproduce.

They lie in the directory named by the environment variable EQUIREG_GOLDEN, by default ../shared/golden from the
repository's root. Where the directory is missing the tests that need it are skipped.
"""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from equireg.priors import Step

ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get("EQUIREG_GOLDEN") or ROOT.parent / "shared" / "golden")


def golden_files(pattern: str) -> list[Path]:
    """The golden files whose name matches the glob ``pattern``, sorted."""
    return sorted(GOLDEN.glob(pattern))


def parametrize_golden(*patterns: str) -> pytest.MarkDecorator:
    """One test per golden file, passed as the argument ``golden`` and named by its stem; skipped without files."""
    files = [file for pattern in patterns for file in golden_files(pattern)]
    cases = [pytest.param(file, id=file.stem) for file in files]
    absent = pytest.param(None, id="absent", marks=pytest.mark.skip(f"no {' or '.join(patterns)} in {GOLDEN}"))
    return pytest.mark.parametrize("golden", cases or [absent])


class GoldenArrays:
    """The arrays of one golden file; floating-point ones come as float32 tensors with their own tolerance."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        """The array as a float32 tensor."""
        return torch.from_numpy(self.arrays[name].astype(np.float32))

    def image(self, name: str) -> Tensor:
        """An 8-bit picture (C, H, W) as an image (1, C, H, W) in [-1, 1]."""
        return self.tensor(name)[None] / 127.5 - 1

    def check(self, name: str, actual: Tensor, tolerance: float = 1e-6) -> None:
        """Asserts that ``actual`` equals the array, within 1e-3 where it is stored in half precision."""
        if self.arrays[name].dtype == np.float16:
            tolerance = 1e-3
        expected = torch.from_numpy(self.arrays[name].astype(np.float64)).reshape(actual.shape)
        torch.testing.assert_close(
            actual.double(), expected, rtol=0, atol=tolerance, msg=lambda text: f"array '{name}': {text}"
        )


class ReplayedDraws:
    """Noise that was recorded, handed out in the order of the draws."""

    def __init__(self, draws: Iterable[Tensor | np.ndarray]) -> None:
        self.draws = [torch.as_tensor(draw) for draw in draws]

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        draw = self.draws.pop(0)
        assert draw.numel() == like.shape[0] * np.prod(shape)
        return draw.reshape(-1, *shape)


def share(x0_hats: Sequence[Tensor] | np.ndarray, steps: Sequence[Step]) -> np.ndarray:
    """sqrt(alpha_bar_t) x0_hat of every step: at high noise the last bits of x_t are 1e-5 of x0_hat itself."""
    return np.stack([math.sqrt(step.alpha_bar) * np.asarray(x0) for step, x0 in zip(steps, x0_hats, strict=True)])
