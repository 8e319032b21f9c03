"""What a DPS step costs beside the network: processor time of a run over that of the network's passes, minus 1.

    python benchmarks/overhead.py

One thread, a 64x64 U-Net of 3.3 M parameters with random weights, random inpainting, 20 steps; the smallest of several
repetitions per batch size, for other work on the machine only ever adds time.
"""

import argparse
import time

import torch

import equireg  # noqa: F401  its guard must run before diffusers is imported
from equireg.operators import RandomInpainting
from equireg.priors import VPPrior
from lightning_modules import DPS

NETWORK = {
    "sample_size": 64,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [32, 64, 64, 128],
    "down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * 3,
    "attention_head_dim": 32,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
}


class TimedNetwork(torch.nn.Module):
    """Adds up the processor time between the network's input and output, and between their gradients."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seconds = 0.0

    def _stamp(self, sign: int) -> None:
        self.seconds += sign * time.process_time()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = x.view_as(x)  # a node of its own, so that its gradient is the network's alone
        x.register_hook(lambda gradient: self._stamp(1))
        self._stamp(-1)
        output = self.network(x, t)
        self._stamp(1)
        output.register_hook(lambda gradient: self._stamp(-1))
        return output


def overhead(batch_size: int, num_steps: int, repetitions: int) -> float:
    """The smallest overhead of several runs, as a fraction of the network's time."""
    prior = VPPrior("random", network=NETWORK)
    module = DPS(prior, RandomInpainting(), num_steps=num_steps)
    timed = TimedNetwork(prior.network)
    prior.network = timed
    operator = module.operator.realize((1, 64, 64), list(range(batch_size)))
    y = operator(torch.zeros(batch_size, 1, 64, 64))
    readings = []
    for repetition in range(repetitions + 1):
        timed.seconds = 0.0
        start = time.process_time()
        module(y, list(range(batch_size)), operator)
        total = time.process_time() - start
        if repetition:  # the first run warms up
            readings.append(total / timed.seconds - 1)
    return min(readings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for batch_size, bound in ((1, 0.025), (4, 0.015)):
        value = overhead(batch_size, options.num_steps, options.repetitions)
        print(f"batch {batch_size}: overhead {100 * value:.2f} % of the network's time (bound {100 * bound:g} %)")


if __name__ == "__main__":
    main()
