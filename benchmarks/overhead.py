"""What a DPS step costs beside the network: processor time of a run over that of the network's passes, minus 1.

    python benchmarks/overhead.py

One thread, a 64x64 U-Net of 3.3 M parameters with random weights, random inpainting, 20 steps; the smallest of several
repetitions per batch size, for other work on the machine only ever adds time. The bare loop is the same algorithm in
ten lines: autograd spends time on the network's own graph before the first and after the last of its gradients (the
order of its nodes, their release), and below that no sampler comes.
"""

import argparse
import math
import time
from collections.abc import Callable

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


def readings(batch_size: int, num_steps: int, repetitions: int) -> tuple[float, float]:
    """The smallest overheads of several runs, as fractions of the network's time: DPS, and the bare loop."""
    prior = VPPrior("random", network=NETWORK)
    module = DPS(prior, RandomInpainting(), num_steps=num_steps)
    timed = TimedNetwork(prior.network)
    prior.network = timed
    indices = list(range(batch_size))
    operator = module.operator.realize((1, 64, 64), indices)
    y = operator(torch.zeros(batch_size, 1, 64, 64))

    def bare_loop() -> None:
        x_t = torch.randn(batch_size, 1, 64, 64)
        for step in module.steps:
            x_t.requires_grad_()
            eps = timed(x_t, torch.full((batch_size,), step.t))
            x0_hat = (math.sqrt(1 / step.alpha_bar) * x_t - math.sqrt(1 / step.alpha_bar - 1) * eps).clamp(-1, 1)
            loss = (y - operator(x0_hat)).flatten(1).norm(dim=1)
            (gradient,) = torch.autograd.grad(loss.sum(), x_t)
            with torch.no_grad():
                x_t = step.c_x0 * x0_hat + step.c_xt * x_t + 0.1 * torch.randn_like(x_t) - gradient

    dps = smallest_reading(timed, lambda: module(y, indices, operator), repetitions)
    return dps, smallest_reading(timed, bare_loop, repetitions)


def smallest_reading(timed: TimedNetwork, run: Callable[[], object], repetitions: int) -> float:
    """Processor time of ``run`` over the network's inside it, minus 1."""
    found = []
    for repetition in range(repetitions + 1):
        timed.seconds = 0.0
        start = time.process_time()
        run()
        total = time.process_time() - start
        if repetition:  # the first run warms up
            found.append(total / timed.seconds - 1)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for batch_size, bound in ((1, 0.025), (4, 0.015)):
        dps, bare = readings(batch_size, options.num_steps, options.repetitions)
        print(
            f"batch {batch_size}: overhead {100 * dps:.2f} % of the network's time (bound {100 * bound:g} %), "
            f"bare loop {100 * bare:.2f} %"
        )


if __name__ == "__main__":
    main()
