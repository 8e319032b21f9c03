"""Projection of a gradient onto the leading singular vectors of a diffusion state."""

from typing import Literal

import torch
from torch import Tensor

RankRule = Literal["official", "per_channel_mean"]


class StateProjection:
    """Keeps the part of a gradient that the low-rank structure of a state spans (DiffStateGrad, ICLR 2025).

    Every channel S = U diag(s) V^T of the state gives G <- U_r U_r^T G V_r V_r^T, with one rank r per image.

    Args:
        variance: tau, the share of the squared singular values that the first r hold.
        period: projects in every period-th iteration, the first one included; 0 never projects.
        rank_rule: how r follows from tau, see ``rank``.
        everything: projects the whole gradient of a step, also that of terms that do not measure (PSLD's gluing).

    Raises:
        ValueError: if ``variance`` is outside (0, 1] or ``period`` is negative.
    """

    def __init__(
        self, variance: float = 0.99, period: int = 1, rank_rule: RankRule = "official", everything: bool = False
    ) -> None:
        if not 0 < variance <= 1:
            raise ValueError(f"variance={variance} must be above 0 and at most 1")
        if period < 0:
            raise ValueError(f"period={period} must not be negative")
        self.variance = variance
        self.period = period
        self.rank_rule: RankRule = rank_rule
        self.everything = everything
        self._last: tuple[Tensor, int, tuple[Tensor, Tensor, Tensor]] | None = None

    def __call__(self, gradient: Tensor, state: Tensor, iteration: int) -> Tensor:
        """The projected gradient (B, C, H, W).

        Args:
            gradient: what is projected.
            state: the diffusion state, of the same shape; one decomposition serves as long as it is the same tensor.
            iteration: number of the step or of the iteration of an inner loop.
        """
        if self.period == 0 or iteration % self.period:
            return gradient
        left, right, rank = self._decompose(state)
        kept = torch.arange(left.shape[-1], device=rank.device) < rank.view(-1, 1, 1, 1)
        left, right = left * kept, right * kept.mT
        return left @ (left.mT @ gradient @ right.mT) @ right

    @torch.no_grad()
    def _decompose(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._last is None or self._last[0] is not state or self._last[1] != state._version:
            finite = torch.where(state.isfinite(), state, 0)  # one diverged image would stop the whole batch
            left, values, right = torch.linalg.svd(finite, full_matrices=False)
            self._last = (state, state._version, (left, right, rank(values, self.variance, self.rank_rule)))
        return self._last[2]


def rank(singular_values: Tensor, variance: float, rule: RankRule = "official") -> Tensor:
    """The rank r per image (B,) that holds the share ``variance`` of the energy of a state.

    ``official`` is what the published code computes: the channels' values are put one after the other, the length of
    the beginning that holds the share is divided by three. It is at least about two thirds of the full rank for three
    channels. ``per_channel_mean`` is what its text describes: the mean over the channels of their own ranks.

    Args:
        singular_values: (B, C, K), descending.
        variance: the share, in (0, 1].
        rule: "official" or "per_channel_mean".
    """
    energy = singular_values.square()
    channels, full = energy.shape[1:]
    if rule == "official":
        r = _reaching(energy.flatten(1), variance) // min(channels, 3)  # three, whatever C: 3 is written in the code
    else:
        r = _reaching(energy, variance).double().mean(1).floor().long()
    return r.clamp(1, full)  # rank zero would remove the measurement


def _reaching(energy: Tensor, share: float) -> Tensor:
    """The least number of leading values of the last axis whose sum is at least ``share`` of the total."""
    cumulated = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    return ((cumulated < share).sum(-1) + 1).clamp(max=energy.shape[-1])
