"""Transformation groups: elements, their action T_g on images and S_g on feature maps, inverses, random elements."""

import math
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

    @property
    def swaps_axes(self) -> bool:
        """Whether height and width are exchanged."""
        return bool(self.quarter_turns % 2)

    @property
    def side_divisor(self) -> int:
        """Sides must be multiples of this."""
        return 1


@dataclass(frozen=True)
class TorusElement:
    """A signed isometry of periodic fields: (T w)[i, j] = sign w[p, q], indices modulo N.

    (p, q) = (i, j), or (j, i) with ``swap``, times -1 with ``negate``, plus ``shift`` in eighths of the side. A negated
    index is (-i) mod N, about a grid point, where ``torch.flip`` would also move the field by one.
    """

    name: str
    sign: int = 1
    negate: bool = False
    swap: bool = False
    shift: tuple[int, int] = (0, 0)

    def __call__(self, w: Tensor) -> Tensor:
        """Acts on the last two axes.

        Raises:
            ValueError: if the shift is not a whole number of points.
        """
        sides = w.shape[-2:]
        if any(side % self.side_divisor for side in sides):
            raise ValueError(
                f"element {self.name} shifts by parts of the side, which must be a multiple of {self.side_divisor}, "
                f"not {sides[0]}x{sides[1]}"
            )
        by = [eighths * side // 8 for eighths, side in zip(self.shift, sides, strict=True)]
        if self.negate:
            w = w.flip((-2, -1)).roll((by[0] + 1, by[1] + 1), (-2, -1))
        else:
            w = w.roll((-by[0], -by[1]), (-2, -1))
        w = w.mT if self.swap else w
        return -w if self.sign < 0 else w

    @property
    def swaps_axes(self) -> bool:
        """Whether height and width are exchanged."""
        return self.swap

    @property
    def side_divisor(self) -> int:
        """Sides must be multiples of this."""
        return 8 // math.gcd(8, *self.shift)


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
    elements: tuple[Element | TorusElement, ...]
    pool: tuple[int, ...] = ()
    inverses: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", self.pool or tuple(range(1, len(self.elements))))
        side = max(3, *(element.side_divisor for element in self.elements))
        probe = torch.arange(side**2).view(side, side)
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
        return any(self.elements[i].swaps_axes for i in self.pool)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when the elements that can be drawn do not act on images of this (C, H, W)."""
        _, height, width = shape
        if self.swaps_axes and height != width:
            raise ValueError(f"group={self.name!r} turns images, which must be square, not {height}x{width}")
        divisor = math.lcm(*(self.elements[i].side_divisor for i in self.pool))
        if height % divisor or width % divisor:
            raise ValueError(
                f"group={self.name!r} shifts fields by parts of their side, which must be a multiple of {divisor}, "
                f"not {height}x{width}"
            )

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

_D4 = (
    IDENTITY,
    _ROT90,
    _ROT180,
    _ROT270,
    _HFLIP,
    Element("transpose", 1, True),
    _VFLIP,
    Element("antitranspose", 3, True),
)

_NAVIER_STOKES = (
    IDENTITY,
    TorusElement("antireflection", sign=-1, negate=True, swap=True, shift=(-1, -1)),
    TorusElement("rot180_shift", negate=True, shift=(1, 1)),
    TorusElement("reflection_shift", sign=-1, swap=True, shift=(2, 2)),
    TorusElement("shift", shift=(4, 4)),
    TorusElement("antireflection_shift", sign=-1, negate=True, swap=True, shift=(3, 3)),
    TorusElement("rot180_shift_back", negate=True, shift=(-3, -3)),
    TorusElement("reflection_shift_back", sign=-1, swap=True, shift=(-2, -2)),
)
"""True symmetries of the forced Navier-Stokes equation of ``equireg.pde``: vorticity changes its sign under
reflections, and the forcing, a function of x_1 + x_2, fixes axes and shifts. The relative error of T_g u(a) = u(T_g a)
is 1e-15; that of a plain flip is 0.5 to 0.6. The first and the second generate the others, like the symmetries of a
square.
"""

_NAVIER_STOKES_TORUS = tuple(
    TorusElement(f"{e.name}_{k}", e.sign, e.negate, e.swap, ((e.shift[0] + k) % 8, (e.shift[1] - k) % 8))
    for e in (TorusElement("shift"), *_NAVIER_STOKES[1:4])
    for k in range(8)
)
"""The same and shifts along the anti-diagonal, on which the forcing is constant, by eighths of the side."""

GROUPS = {
    group.name: group
    for group in (
        Group("hflip", (IDENTITY, _HFLIP)),
        Group("vflip", (IDENTITY, _VFLIP)),
        Group("rot180", (IDENTITY, _ROT180)),
        Group("rot90", (IDENTITY, _ROT90, _ROT180, _ROT270), pool=(1, 3)),  # the authors' library draws quarter turns
        Group("rot90_full", (IDENTITY, _ROT90, _ROT180, _ROT270)),
        Group("d4", _D4),
        # of the equations: a reflection along an axis is what the paper names, exact for Helmholtz alone
        Group("flip", (IDENTITY, _HFLIP)),
        Group("helmholtz_d4", _D4),
        Group("navier_stokes_exact", _NAVIER_STOKES, pool=(1,)),  # the element that detects noise best
        Group("navier_stokes_exact_full", _NAVIER_STOKES),
        Group("navier_stokes_torus", _NAVIER_STOKES_TORUS),
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
