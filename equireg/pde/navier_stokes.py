"""Pseudo-spectral solver of the forced two-dimensional Navier-Stokes equation in vorticity form, on the torus."""

import math

import torch
from torch import Tensor

VISCOSITY = 1e-3
HORIZON = 1.0
DT = 1e-3
"""The published data have 1e-4; 1e-3 changes the result by 4e-4, relative, and costs a tenth."""

CACHED_POINTS = 2**15
"""Points of the fields that are integrated together on a CPU."""


class NavierStokes:
    """dw/dt + v . grad w = nu Laplace w + q on [0, 1)^2, v = (d psi/dx_2, -d psi/dx_1), -Laplace psi = w.

    The scheme of Li et al. (ICLR 2021): explicit Euler for convection and forcing, Crank-Nicolson for diffusion,
        w_hat <- ((1 - dt nu L / 2) w_hat + dt (q_hat - M N_hat)) / (1 + dt nu L / 2),  L = 4 pi^2 |k|^2, L(0, 0) = 1,
    with the convection N = v . grad w formed on the grid and cut off by M at 2/3 of the highest wavenumber. Two real
    fields are integrated as the real and the imaginary part of one; where the published code, with a transform for
    each, takes real parts, derivatives are 0 at the Nyquist wavenumber here. The results agree to rounding errors.

    Axis -2 of a field is x_1 and axis -1 is x_2, at the points i / N.

    Args:
        size: N, even.
        viscosity: nu.
        dt: time step.
        forcing: q (N, N); 0.1 (sin 2 pi (x_1 + x_2) + cos 2 pi (x_1 + x_2)) when left out, zeros for none.

    Raises:
        ValueError: if an argument is out of range.

    A step of two fields costs five complex FFTs.
    """

    def __init__(self, size: int, viscosity: float = VISCOSITY, dt: float = DT, forcing: Tensor | None = None) -> None:
        if size < 4 or size % 2:
            raise ValueError(f"size={size} must be even and at least 4: the spectrum needs its Nyquist wavenumber")
        if not (viscosity >= 0 and math.isfinite(viscosity)):
            raise ValueError(f"viscosity={viscosity} must not be negative")
        if not (dt > 0 and math.isfinite(dt)):
            raise ValueError(f"dt={dt} must be positive")
        forcing = default_forcing(size) if forcing is None else forcing
        if tuple(forcing.shape) != (size, size):
            raise ValueError(f"forcing of shape {tuple(forcing.shape)} must be ({size}, {size})")
        self.size = size
        self.viscosity = viscosity
        self.dt = dt
        self.forcing = forcing.double()

    def steps(self, horizon: float) -> int:
        """Number of steps up to ``horizon``: horizon / dt, rounded up unless it is whole but for rounding errors.

        Raises:
            ValueError: if the horizon is not positive.
        """
        if not (horizon > 0 and math.isfinite(horizon)):
            raise ValueError(f"horizon={horizon} must be positive")
        exact = horizon / self.dt
        return max(1, round(exact) if abs(exact - round(exact)) < 1e-6 * exact else math.ceil(exact))

    @torch.no_grad()
    def __call__(self, w_0: Tensor, horizon: float = HORIZON) -> Tensor:
        """The vorticity at ``horizon``, see ``records``; the same shape as ``w_0``."""
        return self.records(w_0, horizon, 1)[..., 0]

    @torch.no_grad()
    def records(self, w_0: Tensor, horizon: float = HORIZON, count: int = 10) -> Tensor:
        """The vorticity (..., N, N, count) after every floor(steps / count) steps, on ``w_0``'s device, in its dtype.

        A field that is not finite is NaN at all times, and leaves the others as they are.

        Args:
            w_0: initial vorticity (..., N, N), float32 or float64, of mean 0 like that of every flow on a torus.
            horizon: T.
            count: number of records; the last one is at T when it divides the number of steps.

        Raises:
            ValueError: if shape or dtype of the field, the horizon or the count do not fit, or if the result of a
                finite field is not finite because dt is too large.
        """
        if w_0.ndim < 2 or tuple(w_0.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"fields of shape {tuple(w_0.shape)} must end in ({self.size}, {self.size})")
        if w_0.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"fields must be float32 or float64, got {w_0.dtype}")
        steps = self.steps(horizon)
        if not 1 <= count <= steps:
            raise ValueError(f"count={count} must be from 1 to {steps}, the number of steps")
        fields = w_0.reshape(-1, self.size, self.size)
        finite = fields.isfinite().all(-1).all(-1)
        records = fields.new_full((*fields.shape, count), math.nan)
        if finite.any():  # MKL refuses an empty batch
            records[finite] = self._integrate(fields[finite], steps, count)
        if not records[finite].isfinite().all():
            raise ValueError(f"dt={self.dt} is too large: the solution is not finite at the horizon {horizon}")
        return records.reshape(*w_0.shape, count)

    def _integrate(self, fields: Tensor, steps: int, count: int) -> Tensor:
        """Records (B, N, N, count) of fields (B, N, N)."""
        number = len(fields)
        if number % 2:
            fields = torch.cat([fields, torch.zeros_like(fields[:1])])
        # an inverse FFT to real fields takes as long as one to complex fields, if not longer
        pairs = torch.complex(fields[0::2], fields[1::2])
        multipliers = self._multipliers(pairs)
        # on a CPU small blocks stay in its cache, where they are up to twice as fast
        block = max(1, CACHED_POINTS // self.size**2) if fields.device.type == "cpu" else max(1, len(pairs))
        records = torch.cat([self._integrate_pairs(part, steps, count, *multipliers) for part in pairs.split(block)])
        return torch.view_as_real(records).movedim(-1, 1).flatten(0, 1)[:number]

    @staticmethod
    def _integrate_pairs(
        w_0: Tensor, steps: int, count: int, derivatives: Tensor, decay: Tensor, gain: Tensor, source: Tensor
    ) -> Tensor:
        """Records (B, N, N, count) of complex fields (B, N, N), whose real and imaginary parts are two flows."""
        w_hat = torch.fft.fft2(w_0)
        products = w_hat.new_empty(4, *w_hat.shape)
        recorded = []
        for step in range(1, steps + 1):
            torch.mul(derivatives, w_hat, out=products)
            v_1, v_2, w_1, w_2 = torch.view_as_real(torch.fft.ifft2(products))
            convection = torch.fft.fft2(torch.view_as_complex(v_1.mul_(w_1).addcmul_(v_2, w_2)))
            w_hat.mul_(decay).add_(source).addcmul_(gain, convection)
            if step % (steps // count) == 0 and len(recorded) < count:
                recorded.append(torch.fft.ifft2(w_hat))
        return torch.stack(recorded, dim=-1)

    def _multipliers(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Multipliers of w_hat for v_1, v_2, dw/dx_1, dw/dx_2, and the step w_hat <- decay w_hat + source + gain N_hat.

        On the device and in the complex dtype of ``like``; computed in float64, where 1 - dt nu L / 2 does not round
        to 1.
        """
        n = self.size
        wavenumbers = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
        k_1, k_2 = torch.meshgrid(wavenumbers, wavenumbers, indexing="ij")
        laplacian = 4 * math.pi**2 * (k_1**2 + k_2**2)
        laplacian[0, 0] = 1
        d_1, d_2 = (2j * math.pi * torch.where(k.abs() == n / 2, 0, k) for k in (k_1, k_2))
        derivatives = torch.stack([d_2 / laplacian, -d_1 / laplacian, d_1, d_2])
        diffusion = 0.5 * self.dt * self.viscosity * laplacian
        kept = (k_1.abs() <= n / 3) & (k_2.abs() <= n / 3)
        gain = -self.dt * kept.double() / (1 + diffusion)
        both = 1 + 1j  # the forcing acts on either field of a pair
        source = both * self.dt * torch.fft.fft2(self.forcing.cpu()) / (1 + diffusion)
        return (
            derivatives[:, None].to(like),
            ((1 - diffusion) / (1 + diffusion)).to(like.real),
            gain.to(like),  # addcmul takes one dtype
            source.to(like),
        )


def default_forcing(size: int) -> Tensor:
    """q = 0.1 (sin 2 pi (x_1 + x_2) + cos 2 pi (x_1 + x_2)) (N, N), float64."""
    x = torch.arange(size, dtype=torch.float64) / size
    phase = 2 * math.pi * (x[:, None] + x)
    return 0.1 * (phase.sin() + phase.cos())
