"""Fourier neural operators from one field of an equation to the other: neuralop's network, with units and a card."""

from pathlib import Path
from typing import Any, Literal, Self

import neuralop
import torch
from torch import Tensor, nn

from equireg.pde.equations import INPUT, PDE, SOLUTION, Normalizer, get_equation
from equireg.weights import RANDOM, load_state, load_weights, save_weights, settle

Direction = Literal["inverse", "forward"]

CHANNELS: dict[Direction, tuple[int, int]] = {"inverse": (SOLUTION, INPUT), "forward": (INPUT, SOLUTION)}
"""Source and target channel of a direction."""


class PlainFNO(neuralop.models.FNO, name="PlainFNO"):
    """neuralop's FNO, whose state holds nothing but tensors.

    neuralop adds a dictionary of classes to it, which neither strict nor weights-only loading of a checkpoint survives.
    """

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Parameters and buffers by name."""
        state = super().state_dict(*args, **options)
        state.pop("_metadata", None)
        return state


class FNO(nn.Module):
    """neuralop's FNO (Li et al., ICLR 2021) from one normalised field to the other, in float32.

    Its grid embedding feeds the coordinates in, so it is not equivariant by construction: what it knows of the
    equation's symmetries it has learned, on the data it was trained on.

    Args:
        weights: a .safetensors file of this library, or "random" for untrained weights, which need ``network``.
        pde: the equation it is trained on; with a file, the equation it must have been trained on.
        direction: ``inverse`` maps the solution u to the input a, ``forward`` a to u.
        network: arguments of ``neuralop.models.FNO`` but its channels: n_modes, hidden_channels, n_layers, ...
        mean, std: of the channels (a, u) in physical units, x_norm = (x - mean) 0.5 / std.

    Arguments left at None take the value of the weights file, else: ``inverse``, the published constants of ``pde``.

    Raises:
        FileNotFoundError: if the weights are not there.
        ValueError: if they are damaged, of another architecture or of another equation, or an argument is missing.
    """

    kind = "fno"

    def __init__(
        self,
        weights: str,
        pde: PDE | None = None,
        direction: Direction | None = None,
        network: dict[str, Any] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__()
        described, state = ({}, None) if weights == RANDOM else load_weights(weights, self.kind)
        if state is not None and pde is not None and pde != described["pde"]:
            raise ValueError(f"weights={weights!r} were trained on {described['pde']}, not on {pde}")
        asked = {"pde": pde, "direction": direction, "network": network, "mean": mean, "std": std}
        asked = settle(asked, described, weights)
        for name in ("pde", "network"):
            if asked[name] is None:
                raise ValueError(f"weights='random' needs {name}")
        equation = get_equation(asked["pde"])
        self.pde: PDE = equation.name
        self.direction: Direction = asked["direction"] or "inverse"
        if self.direction not in CHANNELS:
            raise ValueError(f"direction={self.direction!r} must be 'inverse' or 'forward'")
        self.settings = dict(asked["network"])
        self.normalizer = Normalizer(asked["mean"] or equation.mean, asked["std"] or equation.std)
        self.is_untrained = state is None
        try:
            self.network = PlainFNO(**self.settings, in_channels=1, out_channels=1)
        except TypeError as error:
            raise ValueError(f"network: {error}") from error
        if state is not None:
            load_state(self.network, state, weights)

    @property
    def source(self) -> int:
        """Channel of x = (a, u) that it maps."""
        return CHANNELS[self.direction][0]

    @property
    def target(self) -> int:
        """Channel that it maps to."""
        return CHANNELS[self.direction][1]

    @property
    def description(self) -> dict[str, Any]:
        """What ``save`` writes beside the weights."""
        own = {"kind": self.kind, "pde": self.pde, "direction": self.direction, "network": self.settings}
        return own | self.normalizer.settings()

    def check_equation(self, pde: str | None) -> None:
        """Raises ValueError when data or a prior are of another equation, or of none."""
        if pde != self.pde:
            raise ValueError(f"the FNO is one of {self.pde}, the fields are {f'of {pde}' if pde else 'of no equation'}")

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when the operator cannot take fields of this (C, H, W)."""
        channels, *sides = shape
        if channels != 2:
            raise ValueError(f"an FNO takes fields of two channels (a, u), not images of {channels}")
        for name, side, modes in zip(("height", "width"), sides, self.settings["n_modes"], strict=True):
            if side < modes:
                raise ValueError(f"an FNO of n_modes={self.settings['n_modes']} needs a {name} of {modes}, got {side}")

    def forward(self, field: Tensor) -> Tensor:
        """The target field (B, 1, H, W) of source fields (B, 1, H, W), both normalised; in the source's dtype."""
        with torch.autocast(field.device.type, enabled=False):  # complex weights do not survive it
            return self.network(field.float()).to(field.dtype)

    def map(self, field: Tensor) -> Tensor:
        """``forward`` in physical units."""
        output = self(self.normalizer.normalize(field, self.source))
        return self.normalizer.denormalize(output, self.target)

    def save(self, path: str | Path, half: bool = True) -> None:
        """Writes a file that ``FNO(weights=path)`` reads."""
        save_weights(path, self.network.state_dict(), self.description, half)

    def adopt(self, normalizer: Normalizer) -> Self:
        """Takes the units of a data set, before a training."""
        self.normalizer.load_state_dict(normalizer.state_dict())
        return self
