"""``cli.py demo``: a photograph under four tasks, restored by DPS and by Equi-DPS; one table, one figure."""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage.data import astronaut

from equireg.commands.compare import compare
from equireg.runs import read_run

CONFIGS = Path(__file__).parents[2] / "configs"
TASKS = ("super_resolution", "motion_deblur", "random_inpainting", "box_inpainting")
SAMPLERS = {"DPS": "measure", "Equi-DPS": "dps_{task}"}
"""Rows of the table and their regularisers; that of DPS only measures."""
FACE = (170, 70, 285, 185)
"""Left, top, right and bottom of the face in scikit-image's photograph of Eileen Collins (NASA, public domain)."""
SIDE = 64


def demo(args: list[str], run: Callable[[list[str]], None]) -> int:
    """Runs the demonstration.

    Args:
        args: command line after ``demo``.
        run: performs one run of ``predict``.

    Raises:
        FileNotFoundError: if the configurations or the pictures are not there.
    """
    options = _parser().parse_args(args)
    if not CONFIGS.is_dir():
        raise FileNotFoundError(f"{CONFIGS} does not exist; the demonstration runs from a checkout of the repository")
    folder = Path(options.root) / "demo"
    pictures = Path(options.images) if options.images else _photograph(folder)
    names = {
        (task, sampler): f"demo/{pictures.name}/{task}/{sampler.lower()}" for task in TASKS for sampler in SAMPLERS
    }
    for (task, sampler), name in names.items():
        print(f"\n{task.replace('_', ' ')}, {sampler}", flush=True)
        run(
            [
                "predict",
                *("-c", str(CONFIGS / "data/image_folder.yaml")),
                *("-c", str(CONFIGS / f"sampler/faces64/dps_{task}.yaml")),
                *("-c", str(CONFIGS / "prior/faces64.yaml")),
                *("-c", str(CONFIGS / f"task/faces64/{task}.yaml")),
                *("-c", str(CONFIGS / f"equireg/faces64/{SAMPLERS[sampler].format(task=task)}.yaml")),
                *(f"--data.root={pictures}", f"--data.limit={options.limit}", f"--data.draws={options.draws}"),
                *(f"--data.batch_size={options.batch_size}", "--data.num_workers=0"),
                f"--model.num_steps={options.num_steps}",
                *(f"--root={options.root}", f"--name={name}"),
            ]
        )
    runs = {key: Path(options.root) / name for key, name in names.items()}
    comparison = compare(
        [str(path) for path in runs.values()],
        names=[sampler for _, sampler in runs],
        metrics=["psnr", "ssim", "data_misfit", "equivariance_error"],
        group=True,
        group_names=[task.replace("_", " ") for task in TASKS],
        title=f"{pictures.name}, {options.draws} draws of {options.num_steps} steps each",
    )
    comparison.print()
    comparison.write(folder / pictures.name / "table")
    figure = folder / pictures.name / "demo.png"
    _figure(runs, figure)
    print(
        f"""
The picture:      {figure}
TensorBoard:      .venv/bin/tensorboard --logdir {options.root}
Your own faces:   make demo IMAGES=folder_of_pictures   (cropped to {SIDE}x{SIDE} grey)
Your own problem: README.md, "Restore your own pictures\""""
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cli.py demo", description=__doc__.replace("``", ""))
    parser.add_argument("--images", default=None, metavar="FOLDER", help="pictures to degrade and restore")
    parser.add_argument("--root", default="runs", help="folder of all runs")
    parser.add_argument("--num_steps", type=int, default=100, help="diffusion steps")
    parser.add_argument("--draws", type=int, default=4, help="posterior draws per picture and task")
    parser.add_argument("--limit", type=int, default=4, help="at most this many pictures of the folder")
    parser.add_argument("--batch_size", type=int, default=4, help="draws restored together")
    return parser


def _photograph(folder: Path) -> Path:
    """Writes the face of the photograph, square and grey, and returns its folder."""
    pictures = folder / "input" / "astronaut"
    pictures.mkdir(parents=True, exist_ok=True)
    face = Image.fromarray(astronaut()).convert("L").crop(FACE).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    face.save(pictures / "astronaut.png")
    return pictures


def _figure(runs: dict[tuple[str, str], Path], path: Path) -> None:
    """Tasks in rows; truth, measurement and every sampler's first draw in columns, with the mean PSNR of its draws."""
    columns = ("truth", "measurement", *SAMPLERS)
    figure, axes = plt.subplots(len(TASKS), len(columns), figsize=(2.1 * len(columns), 2.15 * len(TASKS)))
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column)
    for row, task in zip(axes, TASKS, strict=True):
        first = read_run(runs[task, "DPS"]).rows[0]
        inspected = {
            sampler: np.load(next((runs[task, sampler] / "inspect").glob(f"{first.index:05d}_*.npz")))
            for sampler in SAMPLERS
        }
        shown = {column: inspected["DPS"][column] for column in ("truth", "measurement")}
        shown |= {sampler: arrays["restoration"] for sampler, arrays in inspected.items()}
        for axis, column in zip(row, columns, strict=True):
            picture = np.kron(shown[column][0], np.ones((4, 4), np.uint8))
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            if column in SAMPLERS:
                psnr = np.mean([r.metrics["psnr"] for r in read_run(runs[task, column]).rows if r.index == first.index])
                axis.set_xlabel(f"{psnr:.2f} dB over the draws")
        row[0].set_ylabel(task.replace("_", " "))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
