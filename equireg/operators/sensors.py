"""Sensors at points of one channel of a field x = (a, u): the measurements of the equations' problems."""

import math
from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from equireg.operators.base import LinearOperator

Task = Literal["forward", "inverse", "both"]

OBSERVED: dict[Task, tuple[int, ...]] = {"forward": (0,), "inverse": (1,), "both": (0, 1)}
"""Channels that carry sensors."""

RECOVERED: dict[Task, int] = {"forward": 1, "inverse": 0, "both": 0}
"""The channel that a task asks for."""


class Sensors(LinearOperator):
    """Reads fields x = (a, u) at points: y = x[positions] + sigma_y n.

    The interface for samplers: ``operator(x)`` of x (B, 2, N, N) in physical units are the values y (B, m), also
    physical; ``operator.positions`` (B, m) are distinct places in one flattened field, channel N^2 + row N + column;
    ``operator.mask`` (B, 2, N, N) is one at the sensors, ``operator.count`` (B, 2) their number per channel, and
    ``operator.adjoint(y)`` a field with y at the sensors and zero elsewhere. ``operator.observed`` and
    ``operator.recovered`` tell the channels.

    Args:
        task: ``forward`` has sensors on the input a and asks for the solution u, ``inverse`` the other way round;
            ``both`` has sensors on both.
        count: sensors per observed channel, or their fraction of the grid points when below 1. The papers have 500 of
            128 x 128, which are 125 of 64 x 64.
        shared: the same positions for all fields of the run instead of new ones for each.
        shared_seed: seed of those positions, below 2**32.
        sigma_y: standard deviation of the measurement noise, in physical units; the papers measure without noise.

    Raises:
        ValueError: if an argument is out of range.
    """

    parameter_names = ("positions",)

    def __init__(
        self,
        task: Task = "inverse",
        count: int | float = 500,
        shared: bool = False,
        shared_seed: int = 0,
        sigma_y: float = 0.0,
    ) -> None:
        super().__init__(sigma_y)
        if task not in OBSERVED:
            raise ValueError(f"task={task!r} must be one of {', '.join(OBSERVED)}")
        if not 0 < count < math.inf or (count >= 1 and count != int(count)):
            raise ValueError(f"count={count} must be a number of sensors, or a fraction between 0 and 1")
        if not 0 <= shared_seed < 2**32:
            raise ValueError(f"shared_seed={shared_seed} must be between 0 and 2**32 - 1")
        self.task: Task = task
        self.count_or_fraction = count
        self.shared = shared
        self.shared_seed = shared_seed

    @property
    def observed(self) -> tuple[int, ...]:
        """Channels with sensors."""
        return OBSERVED[self.task]

    @property
    def recovered(self) -> int:
        """The channel that is asked for."""
        return RECOVERED[self.task]

    def sensors_per_channel(self, points: int) -> int:
        """Number of sensors on each observed channel of a grid with this many points."""
        asked = self.count_or_fraction
        return int(asked * points) if asked < 1 else int(asked)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        if shape[0] != 2:
            raise ValueError(f"Sensors measure fields of two channels (a, u), not images of {shape[0]}")
        points = shape[1] * shape[2]
        if not 1 <= self.sensors_per_channel(points) <= points:
            raise ValueError(
                f"count={self.count_or_fraction} makes {self.sensors_per_channel(points)} sensors on a grid of "
                f"{shape[1]}x{shape[2]}; there must be between 1 and {points}"
            )

    def y_shape(self, shape: tuple[int, int, int]) -> tuple[int]:
        """(m,): the values of one field."""
        return (len(self.observed) * self.sensors_per_channel(shape[1] * shape[2]),)

    def draw(self, shape: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
        """Positions without replacement, channel by channel, from numpy's legacy generator as in the published code."""
        rng = np.random.RandomState(self.shared_seed if self.shared else seed)
        points = shape[1] * shape[2]
        count = self.sensors_per_channel(points)
        positions = [channel * points + rng.choice(points, count, replace=False) for channel in self.observed]
        return {"positions": torch.from_numpy(np.concatenate(positions))}

    def with_parameters(self, parameters: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Self:
        """This operator with given positions (B, m).

        Raises:
            ValueError: if there are none, one lies outside the grid or on a channel that the task does not observe, or
                two are equal.
        """
        definite = super().with_parameters(parameters, shape)
        positions = definite.positions
        if positions.ndim != 2 or positions.dtype.is_floating_point or positions.dtype == torch.bool:
            kind = f"{positions.dtype} {tuple(positions.shape)}"
            raise ValueError(f"positions must be integers (batch, sensors), got {kind}")
        if positions.shape[1] == 0:
            raise ValueError("positions are empty: there must be at least one sensor")
        channels, height, width = shape
        outside = positions[(positions < 0) | (positions >= channels * height * width)]
        if len(outside):
            raise ValueError(
                f"positions: {outside[0]} lies outside a field of {channels}x{height}x{width}; allowed are 0 to "
                f"{channels * height * width - 1}"
            )
        in_order = positions.sort(dim=1).values
        repeated = in_order[:, 1:][in_order.diff(dim=1) == 0]
        if len(repeated):
            channel, row, column = np.unravel_index(int(repeated[0]), shape)
            raise ValueError(
                f"positions repeat row {row}, column {column} of channel {channel}; sensors must be distinct"
            )
        channel = torch.div(positions, height * width, rounding_mode="floor")
        foreign = channel[~torch.isin(channel, torch.tensor(self.observed, device=channel.device))]
        if len(foreign):
            raise ValueError(
                f"positions: task={self.task!r} has no sensors on channel {foreign[0]}, only on "
                f"{' and '.join(map(str, self.observed))}"
            )
        definite.positions = positions.long()
        return definite

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).gather(1, self.positions)

    def adjoint(self, y: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        flat = y.new_zeros(len(y), channels * height * width).scatter(1, self.positions, y)
        return flat.unflatten(1, (channels, height, width))

    def pinv(self, y: Tensor, ridge: float = 0.0) -> Tensor:
        """A^T y / (1 + ridge): the rows of A are orthonormal.

        Raises:
            ValueError: if ``ridge`` is negative.
        """
        if ridge < 0:
            raise ValueError(f"ridge={ridge} must not be negative")
        return self.adjoint(y) / (1 + ridge)

    @property
    def mask(self) -> Tensor:
        """(B, 2, N, N): one at the sensors, zero elsewhere."""
        return self.adjoint(torch.ones(self.positions.shape, device=self.positions.device))

    @property
    def count(self) -> Tensor:
        """Sensors per field and channel (B, 2)."""
        return self.mask.sum((2, 3))
