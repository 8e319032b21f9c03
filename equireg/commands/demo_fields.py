"""The demonstration's second part: a flow's and a wave's unknown fields from 3 % sensors, by FunDPS and Equi-FunDPS."""

import shlex
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from equireg.commands.demo_part import Part, Runs, mean_over_draws, panels
from equireg.pde.equations import EQUATIONS, INPUT, PDE
from equireg.pde.files import field_path, read_pairs
from equireg.pictures import DIVERGING
from equireg.runs import read_run

FIELDS: dict[PDE, tuple[str, str]] = {
    "navier_stokes": ("vorticity at time 0", "vorticity at time 1"),
    "helmholtz": ("source", "solution"),
}
"""The unknown a and the observed u of each equation."""
SAMPLERS = {
    "FunDPS": ("fundps_inverse_placed", "measure"),
    "Equi-FunDPS": ("fundps_inverse_placed_exact", "fundps_inverse"),
}
"""Rows of the table, their samplers and regularisers; that of FunDPS only measures."""
SIDE = 64
COUNT = 2
"""Fields per equation; the first one is pictured."""
COLOURS = LinearSegmentedColormap.from_list("diverging", DIVERGING)


def restore_fields(part: Part) -> str:
    """Runs the part on fields that it generates; what there is to see, for people."""
    data = part.folder / "data"
    runs: Runs = {}
    for pde, (unknown, observed) in FIELDS.items():
        title = EQUATIONS[pde].title
        for sampler in SAMPLERS:
            runs[title, sampler] = part.predict(
                title=f"{title}, {unknown} from sensors on the {observed}, {sampler}",
                name=f"{pde}/{sampler.lower()}",
                configs=_configs(pde, f"{pde}{SIDE}", sampler),
                data=(f"--data.folder={data}", f"--data.generate_test={COUNT}", f"--data.limit={COUNT}"),
            )
    part.tabulate(runs, ["relative_l2", "data_misfit", "equivariance_error"], f"{COUNT} fields per equation")
    path = part.folder / "demo.png"
    draw(runs, data).savefig(path, dpi=110)
    return f"""
The fields:       {path}
TensorBoard:      .venv/bin/tensorboard --logdir {part.root}
Your own sensors: a table row,column,value (.csv) in physical units, in the place of this run's measurement
{_own_sensors(part.folder)}"""


def draw(runs: Runs, data: Path) -> Figure:
    """Equations in rows; truth, sensors, every sampler's first draw and its error in columns.

    Args:
        runs: finished runs of every equation and sampler.
        data: folder of the fields that they restored.
    """
    columns = ("truth", "sensors", *SAMPLERS, *(f"|error| of {sampler}" for sampler in SAMPLERS))
    rows = [f"{EQUATIONS[pde].title}\n{unknown}" for pde, (unknown, _) in FIELDS.items()]
    figure, axes = panels(columns, rows, size=(2.2, 2.5))
    for row, (pde, (_, observed)) in zip(axes, FIELDS.items(), strict=True):
        own = {sampler: runs[EQUATIONS[pde].title, sampler] for sampler in SAMPLERS}
        index = read_run(own["FunDPS"]).rows[0].index
        truth = read_pairs(field_path(data, pde, "test", SIDE), index)[INPUT]
        restored = {sampler: np.load(_first_file(run / "predictions", ".npy"))[INPUT] for sampler, run in own.items()}
        errors = {sampler: np.abs(a - truth) for sampler, a in restored.items()}
        panel = dict(zip(columns, row, strict=True))

        fields = {"cmap": COLOURS, "vmin": -np.abs(truth).max(), "vmax": np.abs(truth).max()}
        panel["truth"].imshow(truth, **fields)
        for sampler, a in restored.items():
            shown = panel[sampler].imshow(a, **fields)
            mean = mean_over_draws(own[sampler], "relative_l2", index)
            panel[sampler].set_xlabel(f"relative L2 {mean:.3f}\nover the draws")
        _colour_bar(shown)
        with np.load(_first_file(own["FunDPS"] / "measurements", ".npz")) as measured:
            draw_sensors(panel["sensors"], measured["positions"], measured["y"], observed)
        largest = max(error.max() for error in errors.values())
        for sampler, error in errors.items():
            shown = panel[f"|error| of {sampler}"].imshow(error, cmap="magma", vmin=0, vmax=largest)
        _colour_bar(shown)
    return figure


def _own_sensors(folder: Path) -> str:
    """The command that restores the first measurement of the part once more, given as a file."""
    pde, equation = "navier_stokes", f"navier_stokes{SIDE}"
    configs = _configs(pde, f"{equation}_given", "Equi-FunDPS")
    measurement = _first_file(folder / pde / "fundps/measurements", ".npz")
    lines = [
        *(f"-c configs/{config}.yaml" for config in configs),
        f"--data.measurements {shlex.quote(str(measurement))}",
    ]
    return " \\\n    ".join([".venv/bin/python cli.py predict", *lines])


def _configs(pde: PDE, data: str, sampler: str) -> tuple[str, ...]:
    settings, regulariser = SAMPLERS[sampler]
    return (
        f"data/{data}",
        f"sampler/{pde}{SIDE}/{settings}",
        f"prior/{pde}{SIDE}",
        f"task/fields{SIDE}/inverse",
        f"equireg/{pde}{SIDE}/{regulariser}",
    )


def draw_sensors(axis: Axes, positions: np.ndarray, values: np.ndarray, observed: str) -> None:
    """Values of u at ``positions`` in the flattened field, in their colours."""
    _, row, column = np.unravel_index(positions, (2, SIDE, SIDE))
    largest = np.abs(values).max()
    axis.scatter(column, row, 14, values, cmap=COLOURS, vmin=-largest, vmax=largest, edgecolors="0.5", linewidths=0.3)
    axis.set(aspect="equal", facecolor="0.93", xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5))
    axis.set_xlabel(f"{observed} at\n{len(values)} of {SIDE**2} points")


def _colour_bar(shown: AxesImage) -> None:
    """To the right of an image, as high as it is."""
    axis = shown.axes
    bar = axis.figure.colorbar(shown, cax=axis.inset_axes((1.04, 0, 0.06, 1)))
    bar.ax.tick_params(labelsize="small")


def _first_file(folder: Path, suffix: str) -> Path:
    """That of the first field's first draw."""
    return min(folder.glob(f"*{suffix}"))
