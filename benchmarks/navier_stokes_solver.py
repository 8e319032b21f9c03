"""What two fields per FFT and a second process save in generating Navier-Stokes data.

    python benchmarks/navier_stokes_solver.py

First the solver against the published scheme written down literally, complex FFTs of the whole batch, on one thread:
they take turns, and the smallest reading of each counts, for other work on the machine only ever adds time. The ratio
of the largest batch is that of generating data in one call each; part of it comes from integrating in blocks that stay
in the cache, which the literal form gets as well when it is called with small batches: the ratio of the fastest. Then
``equireg.pde.generate`` with one and with two processes; that needs two idle cores. Also the relative difference of the
results in float64.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from equireg.pde.generate import NavierStokesLaw, generate
from equireg.pde.navier_stokes import NavierStokes, default_forcing
from equireg.pde.random_fields import PeriodicField


def literal(w_0: Tensor, steps: int, dt: float, viscosity: float, forcing: Tensor) -> Tensor:
    """The final vorticity (B, N, N) by the scheme of Li et al. (ICLR 2021) as published, on the whole spectrum."""
    n = w_0.shape[-1]
    k = torch.cat([torch.arange(0, n // 2), torch.arange(-n // 2, 0)]).to(w_0)
    k_1, k_2 = k[:, None].expand(n, n), k.expand(n, n)
    laplacian = 4 * math.pi**2 * (k_1**2 + k_2**2)
    laplacian[0, 0] = 1
    kept = ((k_1.abs() <= 2 / 3 * (n // 2)) & (k_2.abs() <= 2 / 3 * (n // 2))).to(w_0)
    w_hat, f_hat = torch.fft.fft2(w_0), torch.fft.fft2(forcing.to(w_0))
    for _ in range(steps):
        psi_hat = w_hat / laplacian
        v_1 = torch.fft.ifft2(2j * math.pi * k_2 * psi_hat).real
        v_2 = torch.fft.ifft2(-2j * math.pi * k_1 * psi_hat).real
        w_1 = torch.fft.ifft2(2j * math.pi * k_1 * w_hat).real
        w_2 = torch.fft.ifft2(2j * math.pi * k_2 * w_hat).real
        convection = kept * torch.fft.fft2(v_1 * w_1 + v_2 * w_2)
        diffusion = 0.5 * dt * viscosity * laplacian
        w_hat = (-dt * convection + dt * f_hat + (1 - diffusion) * w_hat) / (1 + diffusion)
    return torch.fft.ifft2(w_hat).real


def seconds_per_sample(run: Callable[[], Tensor], samples: int, steps: int) -> float:
    """Of a thousand steps."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / samples / steps * 1000


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="points per side")
    parser.add_argument("--steps", type=int, default=50, help="time steps of a reading")
    parser.add_argument("--readings", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--pairs", type=int, default=128, help="generated with one and with two processes; 0: not")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, dt, viscosity, steps = options.size, 1e-3, 1e-3, options.steps
    forcing = default_forcing(n)
    print(f"{n}x{n}, dt={dt}, seconds per sample of 1000 steps, one thread")
    for dtype in (torch.float32, torch.float64):
        solver, best = NavierStokes(n, viscosity, dt, forcing), {}
        for _ in range(options.readings):
            for batch in options.batches:
                noise = torch.randn(batch, n, n, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
                w_0 = PeriodicField().from_normals(noise)
                forms = {
                    "complex, literal": partial(literal, w_0, steps, dt, viscosity, forcing),
                    "pairs of fields": partial(solver, w_0, steps * dt),
                }
                for name, run in forms.items():
                    seconds = seconds_per_sample(run, batch, steps)
                    best[name, batch] = min(seconds, best.get((name, batch), math.inf))
        fastest = {name: min(s for (form, _), s in best.items() if form == name) for name in forms}
        for name in forms:
            listed = ", ".join(f"{best[name, batch]:.3f} (batch {batch})" for batch in options.batches)
            print(f"  {str(dtype).removeprefix('torch.')} {name:17} {listed}")
        largest = {name: best[name, max(options.batches)] for name in forms}
        ratios = [times["complex, literal"] / times["pairs of fields"] for times in (largest, fastest)]
        print(f"  ratio of batch {max(options.batches)} {ratios[0]:.2f}, of the fastest {ratios[1]:.2f}")
    literal_w, own_w = (run().double() for run in forms.values())
    print(f"  relative difference in float64 {(literal_w - own_w).norm() / literal_w.norm():.1e}")
    if not options.pairs:
        return
    law, seconds = NavierStokesLaw(n), {}
    for workers in (1, 2, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            generate(law, folder, "train", options.pairs, workers=workers)
            seconds[workers] = min(time.perf_counter() - start, seconds.get(workers, math.inf))
    print(f"{options.pairs} pairs: {seconds[1]:.1f} s with one process, {seconds[2]:.1f} s with two, ", end="")
    print(f"ratio {seconds[1] / seconds[2]:.2f}")


if __name__ == "__main__":
    main()
