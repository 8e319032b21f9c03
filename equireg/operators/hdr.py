"""High dynamic range: restoring what an over-exposed picture has lost."""

from torch import Tensor

from equireg.operators.base import Operator


class HighDynamicRange(Operator):
    """A(x) = clip(scale x, -1, 1): dark and bright parts saturate (DAPS, DiffStateGrad).

    Args:
        scale: how much the contrast is raised.
        sigma_y: standard deviation of the Gaussian noise; it is added after the clipping.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if ``scale`` is not above 1, where nothing saturates.
    """

    def __init__(self, scale: float = 2.0, sigma_y: float = 0.05, poisson_rate: float | None = None) -> None:
        super().__init__(sigma_y, poisson_rate)
        if not scale > 1:
            raise ValueError(f"scale={scale} must be above 1: otherwise nothing saturates")
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x).clamp(-1, 1)

    def baseline(self, y: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """y / scale, which inverts A wherever it does not saturate."""
        return y / self.scale
