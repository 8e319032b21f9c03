"""What guidance alone loses: samplers on the exact prior of the Helmholtz equation, against the posterior mean.

    python benchmarks/helmholtz_gaussian.py --output docs/helmholtz_gaussian.md

Source and solution are jointly Gaussian with a known covariance, so neither the prior nor its training can be to blame
for what separates a sampler from the exact posterior mean: that is its guidance, and that it draws from the posterior
where the mean averages over it. The tables have the relative L2 of the source, the inverse problem, over steps, weights
and temperatures.
"""

import argparse
import shlex
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import equireg  # noqa: F401  its guard must run before lightning is imported

# isort: split
from equireg.metrics import relative_l2
from equireg.operators import Sensors
from equireg.pde.generate import HelmholtzLaw
from equireg.pde.linear_mmse import HelmholtzFields
from equireg.priors.gaussian_field import GaussianFieldPrior
from equireg.runs import atomic_write
from lightning_modules import FieldPiGDM, FieldSampler, FunDPS

INTRODUCTION = """\
# Samplers on the exact prior of the Helmholtz equation

```
{command}
```

Relative L2 of the source from {sensors} sensors on the solution at {size}x{size} (mean over {samples} fields, no
measurement noise). The prior is the exact law, so all error above that of the exact posterior mean, **{best:.3f}**, is
the sampler's: its guidance, and at temperature 1 the scatter of a draw (a perfect draw has √2 times the error of the
mean, **{draw:.3f}**). Temperature 0 starts the chain at 0 in place of noise.
"""


def main() -> None:
    """Prints the page, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--sensors", type=int, default=31, help="of the solution; 31 of 32x32 are 3 %%")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--c", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--output", help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fields = HelmholtzFields(options.size)
    prior = GaussianFieldPrior(fields, "helmholtz")
    indices = list(range(options.samples))
    x = HelmholtzLaw(options.size).sample(indices, 0, "test")
    operator = Sensors("inverse", options.sensors).realize(tuple(x.shape[1:]), indices)
    y = operator(x)

    def error(x_hat: Tensor) -> float:
        return relative_l2(x_hat[:, 0], x[:, 0].to(x_hat)).mean().item()

    def fundps(steps: int, c: float, temperature: float) -> FieldSampler:
        weight = c * options.sensors
        return FunDPS(prior, operator, steps, sensor_loss="l2", weight=weight, temperature=temperature)

    def table(title: str, columns: list[str], make: Callable[[int, int], FieldSampler]) -> list[str]:
        lines = [f"## {title}", "", "| steps | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        for steps in options.steps:
            errors = [error(make(steps, i)(y, indices, operator)) for i in range(len(columns))]
            lines.append(f"| {steps} | " + " | ".join(f"{e:.3f}" for e in errors) + " |")
            print(f"{title}: {lines[-1]}", flush=True)
        return [*lines, ""]

    best = error(fields.estimate(y, operator.positions))
    command = shlex.join(["python", "benchmarks/helmholtz_gaussian.py", *sys.argv[1:]])
    introduction = INTRODUCTION.format(
        command=command,
        size=options.size,
        sensors=options.sensors,
        samples=options.samples,
        best=best,
        draw=2**0.5 * best,
    )
    page = [*introduction.splitlines(), ""]
    weights = [f"c = {c:g}" for c in options.c]
    for temperature in (1.0, 0.0):
        title = f"FunDPS, weight = c × sensors, temperature {temperature:g}"
        page += table(title, weights, lambda steps, i, t=temperature: fundps(steps, options.c[i], t))
    title = "FieldPiGDM"
    page += table(
        title,
        ["temperature 1", "temperature 0"],
        lambda steps, i: FieldPiGDM(prior, operator, steps, temperature=1.0 - i),
    )
    print("\n".join(page))
    if options.output:
        atomic_write(options.output, "\n".join(page))


if __name__ == "__main__":
    main()
