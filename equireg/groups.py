"""Transformation groups: elements, their action T_g on images and S_g on feature maps, inverses, random elements."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from equireg.noise import Noise


@dataclass(frozen=True)
class Element:
    """A symmetry of the square: ``quarter_turns`` counter-clockwise, after a flip of the last axis when ``flip``."""

    name: str
    quarter_turns: int = 0
    flip: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Acts on the last two axes."""
        if self.flip:
            x = x.flip(-1)
        return x.rot90(self.quarter_turns, (-2, -1)) if self.quarter_turns else x


@dataclass(frozen=True)
class Group:
    """A finite group acting on the last two axes of images (T_g) and of their feature maps (S_g).

    Elements are numbered; 0 is the identity. The same pixel motion acts on images and features, so S_g = T_g.

    Args:
        name: name in configurations.
        elements: all elements.
        pool: numbers that ``draw`` picks from, all but the identity when left out.
    """

    name: str
    elements: tuple[Element, ...]
    pool: tuple[int, ...] = ()
    inverses: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", self.pool or tuple(range(1, len(self.elements))))
        probe = torch.arange(9.0).view(3, 3)
        object.__setattr__(
            self,
            "inverses",
            tuple(
                next(j for j, b in enumerate(self.elements) if torch.equal(b(a(probe)), probe)) for a in self.elements
            ),
        )

    @property
    def swaps_axes(self) -> bool:
        """Whether an element that can be drawn exchanges height and width, so that images must be square."""
        return any(self.elements[i].quarter_turns % 2 for i in self.pool)

    def draw(self, noise: Noise, batch_size: int, device: torch.device) -> Tensor:
        """One element per image (B,), from the image's own stream; nothing is drawn from a pool of one."""
        if len(self.pool) == 1:
            return torch.full((batch_size,), self.pool[0], device=device)
        return torch.tensor(self.pool, device=device)[noise.randint(len(self.pool), device)]

    def transform(self, x: Tensor, g: Tensor) -> Tensor:
        """T_g x: element g[i] acts on x[i]; x is (B, C, H, W), g is (B,)."""
        numbers = g.tolist()
        if len(set(numbers)) == 1:
            return self.elements[numbers[0]](x)
        return torch.stack([self.elements[number](image) for number, image in zip(numbers, x, strict=True)])

    def transform_features(self, features: Tensor, g: Tensor) -> Tensor:
        """S_g f: the same motion on feature maps (B, c, h, w)."""
        return self.transform(features, g)

    def inverse(self, g: Tensor) -> Tensor:
        """Numbers of the inverse elements (B,)."""
        return torch.tensor(self.inverses, device=g.device)[g]


IDENTITY = Element("identity")
_HFLIP = Element("hflip", 0, True)
_ROT90, _ROT180, _ROT270 = (Element(f"rot{90 * n}", n) for n in (1, 2, 3))
_VFLIP = Element("vflip", 2, True)

GROUPS = {
    group.name: group
    for group in (
        Group("hflip", (IDENTITY, _HFLIP)),
        Group("vflip", (IDENTITY, _VFLIP)),
        Group("rot180", (IDENTITY, _ROT180)),
        Group("rot90", (IDENTITY, _ROT90, _ROT180, _ROT270), pool=(1, 3)),  # the authors' library draws quarter turns
        Group("rot90_full", (IDENTITY, _ROT90, _ROT180, _ROT270)),
        Group(
            "d4",
            (
                IDENTITY,
                _ROT90,
                _ROT180,
                _ROT270,
                _HFLIP,
                Element("transpose", 1, True),
                _VFLIP,
                Element("antitranspose", 3, True),
            ),
        ),
    )
}


def get_group(name: str) -> Group:
    """The group of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in GROUPS:
        raise ValueError(f"group={name!r} is unknown; available: {', '.join(sorted(GROUPS))}")
    return GROUPS[name]
