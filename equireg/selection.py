"""Which of several restorations of one measurement is kept."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from equireg.operators import Operator

Criterion = Literal["misfit", "oracle_psnr"]


@dataclass(frozen=True)
class Selection:
    """Restores every measurement ``runs`` times, independently, and keeps one restoration per image.

    Args:
        runs: how many restorations.
        criterion: ``misfit`` keeps the smallest ||y - A x_hat||, which needs no truth; ``oracle_psnr`` the one nearest
            to the true image, as published tables of phase retrieval do.

    Raises:
        ValueError: if ``runs`` is below one.
    """

    runs: int = 4
    criterion: Criterion = "misfit"

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise ValueError(f"runs={self.runs} must be at least 1")

    def cost(self, x0: Tensor, y: Tensor, operator: Operator, truth: Tensor | None) -> Tensor:
        """How bad every restoration (B,) is; infinite where it diverged."""
        distance = y - operator(x0) if self.criterion == "misfit" else truth.clamp(-1, 1) - x0.clamp(-1, 1)
        return distance.flatten(1).norm(dim=1).nan_to_num(nan=float("inf"))
