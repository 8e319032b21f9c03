"""Singular value decompositions A x = U S V^T x of linear operators, in coefficient space."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class OperatorSVD(ABC):
    """A x = U S V^T x with coefficients (B, D), D = C H W, of images and measurements alike.

    Coefficient j of V^T x, coefficient j of U^T y and ``singular_values[:, j]`` belong together. A y that is smaller
    than x has no value at some coefficients. These are not ``present``: nothing of them is measured, ``Ut`` writes
    zeros there and ``U`` ignores them.

    Args:
        shape: (C, H, W) of one image.
        singular_values: (1, D), or (B, D) when they differ from image to image; zeros where not present.
        present: which coefficients are measured, same shape.
    """

    def __init__(self, shape: tuple[int, int, int], singular_values: Tensor, present: Tensor) -> None:
        self.shape = tuple(shape)
        self.singular_values = singular_values
        self.present = present

    @abstractmethod
    def Vt(self, x: Tensor) -> Tensor:
        """Coefficients V^T x (B, D) of images x (B, C, H, W)."""

    @abstractmethod
    def V(self, coefficients: Tensor) -> Tensor:
        """Images V v (B, C, H, W) with the coefficients v (B, D)."""

    @abstractmethod
    def Ut(self, y: Tensor) -> Tensor:
        """Coefficients U^T y (B, D) of measurements y."""

    @abstractmethod
    def U(self, coefficients: Tensor) -> Tensor:
        """Measurements U u with the coefficients u (B, D)."""


class MaskSVD(OperatorSVD):
    """The decomposition of x -> mask * x, which is diagonal in pixels: U and V are the identity."""

    def __init__(self, shape: tuple[int, int, int], mask: Tensor) -> None:
        self.mask = mask
        kept = mask.expand(-1, shape[0], -1, -1).flatten(1)
        super().__init__(shape, singular_values=kept, present=kept.bool())

    def Vt(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def V(self, coefficients: Tensor) -> Tensor:
        return coefficients.view(-1, *self.shape)

    def Ut(self, y: Tensor) -> Tensor:
        return (self.mask * y).flatten(1)

    def U(self, coefficients: Tensor) -> Tensor:
        return self.mask * coefficients.view(-1, *self.shape)


class Factors(NamedTuple):
    """A full decomposition of one matrix (m, n): U (m, m), the singular values (min(m, n),), V (n, n)."""

    U: Tensor
    s: Tensor
    V: Tensor


class KroneckerSVD(OperatorSVD):
    """The decomposition of x -> M_H x M_W^T per channel, from those of the two matrices.

    The singular values are float64 and live on the CPU; the other methods compute in their argument's dtype and device.

    Args:
        shape: (C, H, W) of one image.
        rows, columns: decompositions of M_H (h, H) and M_W (w, W), with h <= H and w <= W.
        threshold: coefficients with a singular value of M_H or M_W below it count as not present.
    """

    def __init__(self, shape: tuple[int, int, int], rows: Factors, columns: Factors, threshold: float = 0.0) -> None:
        self.rows, self.columns = rows, columns
        values, present = outer_singular_values(rows, columns)
        large = [F.pad(s >= threshold, (0, len(V) - len(s))) for _, s, V in (rows, columns)]
        present = present & torch.outer(*large)
        channels = (shape[0], -1, -1)
        super().__init__(
            shape,
            singular_values=(values * present).expand(channels).reshape(1, -1),
            present=present.expand(channels).reshape(1, -1),
        )

    def Vt(self, x: Tensor) -> Tensor:
        return sandwich(self.rows.V, x, self.columns.V, transpose=True).flatten(1)

    def V(self, coefficients: Tensor) -> Tensor:
        return sandwich(self.rows.V, coefficients.view(-1, *self.shape), self.columns.V)

    def Ut(self, y: Tensor) -> Tensor:
        grid = sandwich(self.rows.U, y, self.columns.U, transpose=True)
        missing = [n - m for n, m in zip(self.shape[1:], grid.shape[-2:], strict=True)]
        return F.pad(grid, (0, missing[1], 0, missing[0])).flatten(1)

    def U(self, coefficients: Tensor) -> Tensor:
        grid = coefficients.view(-1, *self.shape)[..., : len(self.rows.U), : len(self.columns.U)]
        return sandwich(self.rows.U, grid, self.columns.U)


def outer_singular_values(rows: Factors, columns: Factors) -> tuple[Tensor, Tensor]:
    """Singular values s_i s_j (H, W) of M_H x M_W^T, and where they exist: i and j below the sizes of y."""
    s_rows, s_columns = (F.pad(s, (0, len(V) - len(s))) for _, s, V in (rows, columns))
    present = torch.zeros(len(s_rows), len(s_columns), dtype=torch.bool)
    present[: len(rows.s), : len(columns.s)] = True
    return torch.outer(s_rows, s_columns), present


@lru_cache(maxsize=64)
def factorise(matrix: Tensor) -> Factors:
    """The full decomposition of a float64 matrix, remembered per tensor object: pass one that is never changed."""
    with torch.inference_mode(False):  # the memory outlives the mode it was made in, and autograd refuses such tensors
        U, s, Vh = torch.linalg.svd(matrix)
        return Factors(U, s, Vh.mT.contiguous())


def sandwich(left: Tensor, x: Tensor, right: Tensor, transpose: bool = False) -> Tensor:
    """left x right^T per channel, or left^T x right, in the dtype of ``x`` even under autocast."""
    left, right = (_cast(matrix, x.dtype, x.device) for matrix in (left, right))
    with torch.autocast(x.device.type, enabled=False):
        return left.mT @ x @ right if transpose else left @ x @ right.mT


@lru_cache(maxsize=128)
def _cast(matrix: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return matrix.to(device, dtype)
