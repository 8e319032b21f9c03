"""What one backward pass of all guidance terms saves: a step of Equi-FunDPS with merged and with separate gradients.

    python benchmarks/merged_backward.py

Three terms (sensors, residual, equivariance), a 64x64 U-Net of 4.1 M parameters and an FNO of 0.6 M, both with random
weights, all noise levels below 1 where every term counts, one thread. The two forms take turns and the smallest reading
of each counts, for other work on the machine only ever adds time. Also the largest difference of the results, relative
to the field's standard deviation.
"""

import argparse
import time

import torch

import equireg  # noqa: F401  its guard must run before diffusers is imported

# isort: split
from equireg.fno import FNO
from equireg.mpe import NeuralOperator
from equireg.operators import Sensors
from equireg.pde.generate import HelmholtzLaw
from equireg.priors import EDMPrior
from equireg.regularizer import Regularizer, WeightSchedule
from lightning_modules import FunDPS

NETWORK = {
    "side": 64,
    "space_to_depth": 2,
    "config": {
        "layers_per_block": 1,
        "block_out_channels": [64, 96, 128],
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "attention_head_dim": 32,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift",
    },
}
OPERATOR = {"n_modes": [16, 16], "hidden_channels": 32, "n_layers": 4}


def sampler(prior: EDMPrior, fno: FNO, num_steps: int, merge_losses: bool) -> FunDPS:
    """Equi-FunDPS on noise levels from 0.9 down."""
    module = FunDPS(
        prior,
        Sensors("inverse", count=125),
        num_steps,
        weight=100.0,
        residual_weight=1.0,
        sigma_max=0.9,
        merge_losses=merge_losses,
    )
    module.attach(Regularizer(NeuralOperator.of(fno), "flip", WeightSchedule(10.0, scale="none"), reduction="rms"))
    return module


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="steps of one reading; the last one is not guided")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prior = EDMPrior("random", "helmholtz", "FieldUNet", NETWORK)
    torch.nn.init.normal_(prior.network.unet.conv_out.weight, std=0.02)
    fno = FNO("random", "helmholtz", network=OPERATOR).eval().requires_grad_(False)
    indices = list(range(options.batch_size))
    fields = HelmholtzLaw(64).sample(indices, 0, "test")
    forms = {merge: sampler(prior, fno, options.steps, merge) for merge in (True, False)}
    operator = forms[True].operator.realize((2, 64, 64), indices)
    y = operator(fields)
    seconds: dict[bool, float] = {}
    results: dict[bool, torch.Tensor] = {}
    for _ in range(options.repetitions):
        for merge, module in forms.items():
            start = time.process_time()
            results[merge] = module(y, indices, operator)
            taken = (time.process_time() - start) / options.steps
            seconds[merge] = min(seconds.get(merge, taken), taken)
    scale = results[True].std((0, 2, 3), keepdim=True)
    difference = ((results[True] - results[False]) / scale).abs().max().item()
    print(f"batch {options.batch_size}, processor seconds per step: {seconds[True]:.3f} with one backward pass,")
    print(f"{seconds[False]:.3f} with three, ratio {seconds[True] / seconds[False]:.2f}")
    print(f"largest difference of the results {difference:.1e}")


if __name__ == "__main__":
    main()
