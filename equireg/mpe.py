"""Manifold-preferential equivariant (MPE) functions: equivariant on the data, less so off it."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from equireg.autoencoder import Autoencoder
from equireg.fno import FNO
from equireg.pde.equations import PDE, SOLUTION, Normalizer


class MPE(nn.Module, ABC):
    """A frozen function f from images (or latents) to feature maps (B, c, h, w).

    Attributes:
        space: "pixel" when f takes images, "latent" when it takes a latent prior's latents, "field" when it takes
            normalised fields of an equation.
        maps_to_itself: whether f(x) lives in x's own space, which EquiCon needs.
    """

    space: str = "pixel"
    maps_to_itself: bool = False

    def bind(self, prior: nn.Module) -> None:
        """Takes what it needs from the sampler's prior; called when the regulariser is attached.

        Raises:
            ValueError: if f takes latents and the prior has none.
        """

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when f cannot take inputs of this (C, H, W)."""

    def check_equation(self, pde: str | None) -> None:
        """Raises ValueError when f knows another equation than the data's, which is None for images."""

    def known(self, decoded: Tensor) -> Tensor | None:
        """f(z) where it follows from the image that z decodes to; None where it has to be computed."""
        return None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""


class Encoder(MPE):
    """The encoder of an autoencoder trained with the group as augmentation, without sampling or quantisation.

    Args:
        autoencoder: loaded on its own; its parameters are frozen.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        self.autoencoder.check_shape(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.features(x)


class RoundTrip(Encoder):
    """Decoder after encoder: f maps images to images, so EquiCon can use it."""

    maps_to_itself = True

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder(x)


class Features(MPE):
    """Feature maps of any module.

    Args:
        module: the network; frozen and set to evaluation.
        method: method that returns the maps (B, c, h, w), before any pooling.
        mean, std: per-channel normalisation that the network was trained with, on [0, 1] images; without them the
            network sees [-1, 1].

    Raises:
        ValueError: if the method does not exist, only one of mean and std is given, or a std is not positive.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str = "forward",
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(module, method):
            raise ValueError(f"method={method!r}: {type(module).__name__} has no such method")
        if (mean is None) != (std is None):
            raise ValueError("mean and std belong together; give both or none")
        if std is not None and not all(s > 0 for s in std):
            raise ValueError(f"std={std} must be positive")
        self.module = module.eval().requires_grad_(False)
        self.method = method
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if value is None else torch.tensor(value).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is not None:
            x = ((x + 1) / 2 - self.mean) / self.std
        features = getattr(self.module, self.method)(x)
        if features.ndim != 4:
            raise ValueError(
                f"method={self.method!r} returns {features.ndim} axes; a group acts on feature maps (B, c, h, w)"
            )
        return features


class NeuralOperator(MPE):
    """An FNO from the solution u of an equation to its input a: f(x) is the normalised a of a field's channel u.

    Trained on true pairs alone, it has learned the symmetries of the equation where there is data, and nowhere else.
    It takes normalised fields x = (a, u) (B, 2, N, N) and returns (B, 1, N, N); a field of u alone is taken as well.
    When the sampler's prior normalises by other statistics than the FNO, fields are converted.

    Args:
        weights: a file of ``FNOModule``.
        pde: the equation that it must have been trained on; any when left out, the prior's is checked in any case.

    Raises:
        FileNotFoundError: if the weights are not there.
        ValueError: if they are damaged or of another equation, or map a to u.
    """

    space = "field"

    def __init__(self, weights: str, pde: PDE | None = None) -> None:
        super().__init__()
        self.fno = FNO(weights, pde).eval().requires_grad_(False)
        if self.fno.direction != "inverse":
            raise ValueError(f"weights={weights!r} map a to u; the regulariser needs an FNO from u to a")
        self._units: list[Normalizer] = []  # a list: it stays the prior's submodule, not this one's

    @classmethod
    def of(cls, fno: FNO) -> Self:
        """Around an FNO that is there."""
        function = cls.__new__(cls)
        MPE.__init__(function)
        function.fno, function._units = fno.eval().requires_grad_(False), []
        return function

    def bind(self, prior: nn.Module) -> None:
        pde = getattr(prior, "pde", None)
        if pde is not None:  # priors around somebody's own network need not tell
            self.fno.check_equation(pde)
        units = getattr(prior, "normalizer", self.fno.normalizer)
        same = all(torch.allclose(getattr(units, n), getattr(self.fno.normalizer, n)) for n in ("mean", "std"))
        self._units = [] if same else [units]

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        self.fno.check_shape(shape)

    def check_equation(self, pde: str | None) -> None:
        self.fno.check_equation(pde)

    def forward(self, x: Tensor) -> Tensor:
        u = x[:, -1:]
        for units in self._units:
            u = self.fno.normalizer.normalize(units.denormalize(u, SOLUTION), SOLUTION)
        return self.fno(u)


class _PriorFunction(MPE):
    """A function that is the sampler's own network, bound when it is attached and never loaded twice."""

    def __init__(self) -> None:
        super().__init__()
        self._prior: list[nn.Module] = []  # a list: the prior stays the sampler's submodule, not this one's

    def bind(self, prior: nn.Module) -> None:
        if not (hasattr(prior, "encode") and hasattr(prior, "decode")):
            raise ValueError(f"{type(self).__name__} needs a latent prior; {type(prior).__name__} works on pixels")
        self._prior = [prior]

    @property
    def prior(self) -> nn.Module:
        return self._prior[0]


class PriorEncoder(_PriorFunction):
    """The encoder of the sampler's latent prior, on images."""

    def forward(self, x: Tensor) -> Tensor:
        return self.prior.encode(x)


class PriorDecoder(_PriorFunction):
    """The decoder of the sampler's latent prior, on latents (Equi-PSLD)."""

    space = "latent"

    def known(self, decoded: Tensor) -> Tensor:
        return decoded

    def forward(self, z: Tensor) -> Tensor:
        return self.prior.decode(z)


class PriorRoundTrip(_PriorFunction):
    """Encoder after decoder of the sampler's latent prior, on latents: latents to latents (EquiCon)."""

    space = "latent"
    maps_to_itself = True

    def forward(self, z: Tensor) -> Tensor:
        return self.prior.encode(self.prior.decode(z))
