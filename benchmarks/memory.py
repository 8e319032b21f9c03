"""Memory of samplers with the bundled priors, 64x64.

    python benchmarks/memory.py [--batch 8]

Latent samplers: batch 8 against eight times batch 1, and a trajectory four times as long. Pixel samplers: a batch of 16
with the network's autograd graph (DPS) and without (DDRM, DiffPIR). Every measurement is a process of its own (Linux):
its peak resident memory while sampling, less what it held before.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import equireg  # noqa: F401  its guard must run before lightning is imported
from equireg.autoencoder import Autoencoder
from equireg.operators import Operator, SuperResolution
from equireg.priors import LatentPrior, VPPrior
from lightning_modules import DDRM, DPS, PSLD, DiffPIR, LatentDAPS, PosteriorSampler, ReSample

LATENT: dict[str, Callable[[LatentPrior, Operator, int], PosteriorSampler]] = {
    "LatentDAPS": lambda prior, operator, length: LatentDAPS(prior, operator, num_steps=5 * length, mcmc_steps=10),
    "PSLD": lambda prior, operator, length: PSLD(prior, operator, num_steps=20 * length),
    "ReSample": lambda prior, operator, length: ReSample(
        prior, operator, num_steps=20 * length, every=4, pixel_iterations=10, latent_iterations=10
    ),
}
"""Each with a trajectory of ``length`` times its shortest."""

PIXEL: dict[str, Callable[[VPPrior, Operator, int], PosteriorSampler]] = {
    "DPS": lambda prior, operator, length: DPS(prior, operator, num_steps=5 * length),
    "DDRM": lambda prior, operator, length: DDRM(prior, operator, num_steps=5 * length),
    "DiffPIR": lambda prior, operator, length: DiffPIR(prior, operator, num_steps=5 * length),
}
"""DPS differentiates the network; the others build no autograd graph."""

ASSETS = "equireg/assets"
BOUND = 1.2
PIXEL_BATCH = 16


def resident(field: str) -> float:
    """A line of /proc/self/status in MB: VmRSS is held now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def growth(name: str, batch: int, length: int) -> float:
    """Peak memory of sampling a batch, less what the process held before, in MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name in PIXEL:
        module = PIXEL[name](VPPrior(f"{ASSETS}/faces64_prior.safetensors"), SuperResolution(4), length)
    else:
        autoencoder = Autoencoder(f"{ASSETS}/faces64_autoencoder.safetensors")
        prior = LatentPrior(VPPrior(f"{ASSETS}/faces64_latent_prior.safetensors"), autoencoder)
        module = LATENT[name](prior, SuperResolution(4), length)
    operator = module.operator.realize((1, 64, 64), list(range(batch)))
    y = operator(torch.zeros(batch, 1, 64, 64))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    module(y, list(range(batch)), operator)
    return resident("VmHWM") - before


def measured_apart(*arguments: str | int) -> float:
    """``growth`` in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--measure", nargs=3, metavar=("SAMPLER", "BATCH", "LENGTH"), help="print one measurement only")
    options = parser.parse_args()
    if options.measure:
        name, batch, length = options.measure
        print(growth(name, int(batch), int(length)))
        return
    for name in LATENT:
        one, many, longer = (measured_apart(name, *rest) for rest in ((1, 1), (options.batch, 1), (options.batch, 4)))
        ratio = many / (options.batch * one)
        print(f"{name}: batch 1 {one:.0f} MB, batch {options.batch} {many:.0f} MB, ratio {ratio:.2f} (bound {BOUND})")
        print(f"{name}: a trajectory four times as long at batch {options.batch} {longer:.0f} MB")
    for name in PIXEL:
        print(f"{name}: batch {PIXEL_BATCH} {measured_apart(name, PIXEL_BATCH, 1):.0f} MB")


if __name__ == "__main__":
    main()
