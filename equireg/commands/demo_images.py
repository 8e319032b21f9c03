"""The demonstration's first part: a photograph under four tasks, restored by DPS and by Equi-DPS."""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage.data import astronaut

from equireg.commands.demo_part import Part, Runs, mean_over_draws, panels
from equireg.runs import read_run

TASKS = ("super_resolution", "motion_deblur", "random_inpainting", "box_inpainting")
SAMPLERS = {"DPS": "measure", "Equi-DPS": "dps_{task}"}
"""Rows of the table and their regularisers; that of DPS only measures."""
FACE = (170, 70, 285, 185)
"""Left, top, right and bottom of the face in scikit-image's photograph of Eileen Collins (NASA, public domain)."""
SIDE = 64


def restore_images(part: Part, pictures: Path, limit: int) -> str:
    """Runs the part on the first ``limit`` pictures of a folder; what there is to see, for people."""
    runs: Runs = {}
    for task in TASKS:
        title = task.replace("_", " ")
        for sampler, regulariser in SAMPLERS.items():
            runs[title, sampler] = part.predict(
                title=f"{title}, {sampler}",
                name=f"{task}/{sampler.lower()}",
                configs=(
                    "data/image_folder",
                    f"sampler/faces64/dps_{task}",
                    "prior/faces64",
                    f"task/faces64/{task}",
                    f"equireg/faces64/{regulariser.format(task=task)}",
                ),
                data=(f"--data.root={pictures}", f"--data.limit={limit}"),
            )
    part.tabulate(runs, ["psnr", "ssim", "data_misfit", "equivariance_error"], part.name)
    figure = part.folder / "demo.png"
    _draw(runs, figure)
    return f"""
The picture:      {figure}
TensorBoard:      .venv/bin/tensorboard --logdir {part.root}
Your own faces:   make demo IMAGES=folder_of_pictures   (cropped to {SIDE}x{SIDE} grey)
Your own problem: README.md, "Restore your own pictures\""""


def write_photograph(folder: Path) -> Path:
    """Writes the face of the photograph, square and grey, and returns its folder."""
    pictures = folder / "astronaut"
    pictures.mkdir(parents=True, exist_ok=True)
    face = Image.fromarray(astronaut()).convert("L").crop(FACE).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    face.save(pictures / "astronaut.png")
    return pictures


def _draw(runs: Runs, path: Path) -> None:
    """Tasks in rows; truth, measurement and every sampler's first draw in columns, with the mean PSNR of its draws."""
    columns = ("truth", "measurement", *SAMPLERS)
    tasks = list(dict.fromkeys(task for task, _ in runs))
    figure, axes = panels(columns, tasks, size=(2.1, 2.15))
    for row, task in zip(axes, tasks, strict=True):
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
            if column in SAMPLERS:
                axis.set_xlabel(f"{mean_over_draws(runs[task, column], 'psnr', first.index):.2f} dB over the draws")
    figure.savefig(path, dpi=110)
