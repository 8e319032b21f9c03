"""What EquiReg costs in a step of DPS: processor time with the penalty at every k-th step over that without, minus 1.

    python benchmarks/price.py

One thread, the bundled face prior and encoder, super-resolution, in float32 and bfloat16. The runs take turns and
the smallest time of each counts: other work on the machine only ever adds time.
"""

import argparse
import time

import torch

import equireg  # noqa: F401  its guard must run before diffusers is imported
from equireg.autoencoder import Autoencoder
from equireg.mpe import Encoder
from equireg.operators import SuperResolution
from equireg.priors import VPPrior
from equireg.regularizer import Regularizer, WeightSchedule
from lightning_modules import DPS

ASSETS = "equireg/assets"


def sampler(every: int | None, dtype: torch.dtype | None, num_steps: int) -> DPS:
    """DPS with the penalty at every k-th step; without for None."""
    prior = VPPrior(f"{ASSETS}/faces64_prior.safetensors")
    prior.autocast_dtype = dtype
    module = DPS(prior, SuperResolution(4), num_steps=num_steps)
    if every is not None:
        function = Encoder(Autoencoder(f"{ASSETS}/faces64_autoencoder.safetensors"))
        regularizer = Regularizer(function, "hflip", WeightSchedule(1.0, every=every))
        regularizer.autocast_dtype = dtype
        module.attach(regularizer)
    return module


def processor_time(module: DPS, batch_size: int) -> float:
    """Of one run, in seconds."""
    indices = list(range(batch_size))
    operator = module.operator.realize((1, 64, 64), indices)
    y = operator(torch.zeros(batch_size, 1, 64, 64))
    start = time.process_time()
    module(y, indices, operator)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (None, torch.bfloat16):
        modules = {every: sampler(every, dtype, options.num_steps) for every in (None, 1, 5, 10)}
        rounds = [
            {every: processor_time(module, options.batch) for every, module in modules.items()}
            for _ in range(options.repetitions + 1)
        ][1:]  # the first one warms up
        least = {every: min(times[every] for times in rounds) for every in modules}
        prices = ", ".join(
            f"every {every}: +{100 * (seconds / least[None] - 1):.0f} %"
            for every, seconds in least.items()
            if every is not None
        )
        print(f"{'float32' if dtype is None else 'bfloat16'}: {prices}", flush=True)


if __name__ == "__main__":
    main()
