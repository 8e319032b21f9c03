"""Operators that act on rows and columns separately: A x = M_H x M_W^T."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from equireg.operators.base import LinearOperator
from equireg.operators.svd import KroneckerSVD, factorise, outer_singular_values, sandwich

SMALLEST_INVERTIBLE = 1e-3
"""Relative size of the smallest singular value below which ``pinv`` refuses to divide by it without a ridge."""


class SeparableOperator(LinearOperator):
    """A x = M_H x M_W^T per channel, with a closed-form adjoint, pseudo-inverse and SVD.

    Two products with dense matrices take less time than sliding a window, and leave the border rule to the matrix.
    """

    @abstractmethod
    def matrix(self, n: int) -> Tensor:
        """M_n (m, n) in float64 on the CPU; the same object at every call, as what follows from it is remembered."""

    def with_parameters(self, parameters: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Self:
        self.check_shape(shape)
        return super().with_parameters(parameters, shape)

    def image_size(self, y: Tensor) -> tuple[int, int]:
        """(H, W) of the images that measurements ``y`` were made from."""
        return tuple(y.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.matrix(n) for n in x.shape[-2:])
        return sandwich(rows, x, columns)

    def adjoint(self, y: Tensor) -> Tensor:
        rows, columns = (self.matrix(n) for n in self.image_size(y))
        return sandwich(rows, y, columns, transpose=True)

    def pinv(self, y: Tensor, ridge: float = 0.0) -> Tensor:
        """A^T (A A^T + ridge I)^-1 y, from the SVD.

        Raises:
            ValueError: if ``ridge`` is negative, or zero while singular values below 1e-3 of the largest exist.
        """
        rows, columns = (factorise(self.matrix(n)) for n in self.image_size(y))
        values, present = outer_singular_values(rows, columns)
        smallest, largest = values[present].min(), values.max()
        if ridge < 0 or (ridge == 0 and smallest < SMALLEST_INVERTIBLE * largest):
            raise ValueError(
                f"ridge={ridge} must be positive: the singular values of {type(self).__name__} on "
                f"{len(values)}x{values.shape[1]} images go from {largest:.2g} down to {smallest:.2g}"
            )
        svd = KroneckerSVD((y.shape[1], *values.shape), rows, columns)
        s = svd.singular_values
        gain = torch.where(svd.present, s / (s.square() + ridge).clamp(min=torch.finfo(s.dtype).tiny), 0)
        return svd.V(gain.to(y) * svd.Ut(y))

    def svd(self, shape: tuple[int, int, int], threshold: float = 0.0) -> KroneckerSVD:
        """The SVD for images of ``shape``, computed in float64.

        Args:
            shape: (C, H, W).
            threshold: singular values of M_H and M_W below it are dropped, as if nothing had been measured there.
        """
        return KroneckerSVD(shape, *(factorise(self.matrix(n)) for n in shape[1:]), threshold)
