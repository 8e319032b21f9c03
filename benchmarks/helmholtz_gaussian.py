"""What guidance alone loses: FunDPS on the exact Gaussian prior of the Helmholtz equation, against the posterior mean.

    python benchmarks/helmholtz_gaussian.py --output docs/helmholtz_gaussian.md

Source and solution are jointly Gaussian with a known covariance, so neither the prior nor its training can be to blame:
what separates FunDPS from the exact posterior mean is its guidance (and that it draws where the mean averages). The
table has the relative L2 of the source, the inverse problem, over steps and weights, weight = c sensors.
"""

import argparse
import time

import torch

import equireg  # noqa: F401  its guard must run before lightning is imported

# isort: split
from equireg.metrics import relative_l2
from equireg.operators import Sensors
from equireg.pde.generate import HelmholtzLaw
from equireg.pde.linear_mmse import HelmholtzFields
from equireg.priors.gaussian_field import GaussianFieldPrior
from equireg.runs import atomic_write
from lightning_modules import FunDPS


def error_of(x_hat: torch.Tensor, x: torch.Tensor) -> float:
    """Mean relative L2 of the source."""
    return relative_l2(x_hat[:, 0], x[:, 0].to(x_hat)).mean().item()


def main() -> None:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--sensors", type=int, default=31, help="of the solution; 31 of 32x32 are 3 %%")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--c", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--output", help="Markdown file to write")
    options = parser.parse_args()
    fields = HelmholtzFields(options.size)
    prior = GaussianFieldPrior(fields, "helmholtz")
    indices = list(range(options.samples))
    x = HelmholtzLaw(options.size).sample(indices, 0, "test")
    operator = Sensors("inverse", options.sensors).realize(tuple(x.shape[1:]), indices)
    y = operator(x)
    best = error_of(fields.estimate(y, operator.positions), x)
    start = time.perf_counter()
    rows = []
    for num_steps in options.steps:
        errors = []
        for c in options.c:
            weight = c * options.sensors
            module = FunDPS(prior, operator, num_steps, sensor_loss="l2", weight=weight, residual_weight=1.0)
            errors.append(error_of(module(y, indices, operator), x))
            print(f"{num_steps} steps, c = {c:g}: {errors[-1]:.4f} (exact posterior mean {best:.4f})", flush=True)
        rows.append(f"| {num_steps} | " + " | ".join(f"{error:.3f}" for error in errors) + " |")
    command = f"python benchmarks/helmholtz_gaussian.py --size {options.size} --sensors {options.sensors}"
    page = "\n".join(
        [
            "# FunDPS on the exact prior of the Helmholtz equation",
            "",
            f"```\n{command} --samples {options.samples}\n```",
            "",
            f"Relative L2 of the source from {options.sensors} sensors on the solution at {options.size}x{options.size},",
            f"mean over {options.samples} fields; weight = c × sensors, l2 sensor loss, residual weight 1. The exact",
            f"posterior mean has **{best:.3f}**.",
            "",
            "| steps | " + " | ".join(f"c = {c:g}" for c in options.c) + " |",
            "| --- |" + " --- |" * len(options.c),
            *rows,
            "",
        ]
    )
    print(page, f"({time.perf_counter() - start:.0f} s)")
    if options.output:
        atomic_write(options.output, page)


if __name__ == "__main__":
    main()
