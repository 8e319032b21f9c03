"""The physics of the library deepinv (https://deepinv.github.io) as operators; needs the extra ``deepinv``."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from equireg.operators.base import LinearOperator, Operator
from equireg.operators.conjugate_gradients import conjugate_gradients

try:
    import deepinv.physics
    from deepinv.physics import DecomposablePhysics, LinearPhysics, Physics, ZeroNoise
except ImportError as error:
    raise ImportError("this operator needs the library deepinv: pip install 'equireg[deepinv]'") from error

ADJOINT_TOLERANCE = 1e-3
"""Largest |<A x, y> - <x, A^T y>| / ||A x|| of standard normal x and y; interpolated adjoints miss it tenfold."""

BASELINE_ITERATIONS = 100


class DeepInv(Operator):
    """y = physics.A(x) + sigma_y n for any ``deepinv.physics.Physics``, differentiated by autograd.

    A sees our images in [-1, 1]. Data of a physics that was applied to images in [0, 1] become y of this operator by
    y = 2 y' - A(1) when A is linear. The physics is the same for all images.

    Args:
        physics: the forward model, without noise of its own: an object, or the name of a class of ``deepinv.physics``.
        arguments: of that class; plain values, so that a run's configuration holds them.
        sigma_y: standard deviation of the Gaussian noise, in units of A(x).
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: if there is no such physics, its arguments are wrong, or it brings a noise model.
    """

    has_baseline = False

    def __init__(
        self,
        physics: str | Physics,
        arguments: dict[str, Any] | None = None,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(sigma_y, poisson_rate)
        if isinstance(physics, str):
            physics = make_physics(physics, arguments or {})
        elif arguments is not None:
            raise ValueError("arguments belong to a physics that is given by its name")
        if not isinstance(physics.noise_model, ZeroNoise):
            raise ValueError(
                f"physics brings its own noise ({type(physics.noise_model).__name__}); leave noise_model out, sigma_y "
                "is the noise here"
            )
        self.physics = physics.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.physics.sensor(self.physics.A(x))

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        self._measure(torch.zeros(1, *shape))

    def y_shape(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(self._measure(torch.zeros(1, *shape)).shape[1:])

    def fingerprint(self, row: int) -> str:
        digest = hashlib.sha256(super().fingerprint(row).encode())
        for part_name, part in self.physics.named_modules():
            digest.update(f"{part_name}:{type(part).__name__};".encode())
            for name, value in sorted(vars(part).items()):
                if isinstance(value, int | float | str | bool | tuple | None) and not name.startswith("_"):
                    digest.update(f"{name}={value!r};".encode())
        for name, value in sorted(self.physics.named_buffers()):
            if name.rsplit(".", 1)[-1] == "operator_norm":
                continue  # estimated from a random start, so that its last digits vary; the rest implies it
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def _measure(self, x: Tensor) -> Tensor:
        """A(x), with what is wrong with images of this shape told in one sentence."""
        device = next((buffer.device for buffer in self.physics.buffers()), torch.device("cpu"))
        kind, shape = type(self.physics).__name__, "x".join(map(str, x.shape[1:]))
        try:
            y = self(x.to(device))
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
            raise ValueError(f"physics {kind} cannot measure images of {shape}: {error}") from error
        if not isinstance(y, Tensor) or y.is_complex():
            raise ValueError(f"physics {kind} measures {type(y).__name__}s that are not real tensors")
        return y


class LinearDeepInv(DeepInv, LinearOperator):
    """A ``deepinv.physics.LinearPhysics`` with its adjoint, and its pseudo-inverse where it knows its singular values.

    Args:
        physics: the forward model, linear and without noise of its own: an object, or the name of a class.
        arguments: of that class.
        sigma_y: standard deviation of the Gaussian noise, in units of A(x).
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Raises:
        ValueError: as ``DeepInv``, or if the physics is not linear.
    """

    has_baseline = True

    def __init__(
        self,
        physics: str | LinearPhysics,
        arguments: dict[str, Any] | None = None,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(physics, arguments, sigma_y, poisson_rate)
        if not isinstance(self.physics, LinearPhysics):
            raise ValueError(f"physics {type(self.physics).__name__} is not linear; DeepInv takes it")

    def forward(self, x: Tensor) -> Tensor:
        return self.physics.A(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.physics.A_adjoint(y)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when images of this (C, H, W) cannot be measured, or ``A_adjoint`` is no adjoint."""
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        measured = self._measure(x)
        y = torch.randn(measured.shape, generator=torch.Generator().manual_seed(1)).to(measured)
        back = self.adjoint(y)
        mismatch = ((measured * y).sum() - (x.to(back) * back).sum()).abs() / measured.norm()
        if mismatch > ADJOINT_TOLERANCE:
            raise ValueError(
                f"A_adjoint of physics {type(self.physics).__name__} is not the adjoint of A (relative error "
                f"{mismatch:.1g}); DeepInv, which differentiates A, does not need it"
            )

    def pinv(self, y: Tensor, ridge: float = 0.0) -> Tensor:
        """A^T (A A^T + ridge I)^-1 y: in closed form for a ``DecomposablePhysics``, else as ``LinearOperator``."""
        if not isinstance(self.physics, DecomposablePhysics):
            return super().pinv(y, ridge)
        return self.physics.prox_l2(None, y, 1 / ridge) if ridge > 0 else self.physics.A_dagger(y)

    def baseline(self, y: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The posterior mean for images of independent standard normal pixels, by 100 conjugate gradient steps."""
        ridge = max(self.sigma_y, 1e-2) ** 2
        x, _ = conjugate_gradients(
            lambda x: self.adjoint(self(x)) + ridge * x, self.adjoint(y), max_iterations=BASELINE_ITERATIONS
        )
        return x


def make_physics(name: str, arguments: dict[str, Any]) -> Physics:
    """The class ``name`` of ``deepinv.physics`` with its arguments.

    Raises:
        ValueError: if there is no such class or it refuses the arguments.
    """
    kind = getattr(deepinv.physics, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Physics)):
        known = sorted(n for n, k in vars(deepinv.physics).items() if isinstance(k, type) and issubclass(k, Physics))
        raise ValueError(f"physics={name!r} is unknown; available: {', '.join(known)}")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"physics {name} refuses arguments={arguments}: {error}") from error
