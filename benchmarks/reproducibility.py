"""How far the same samples lie apart between batch sizes, process counts and repetitions, and after kill -9.

    python benchmarks/reproducibility.py [--path ../shared/data/faces64.h5]

Restores eight faces with 50 DPS steps (Equi-DPS, random inpainting): at batch 1, 3 and 8, twice at batch 3, with two
processes at batch 1, and in a run that is killed three times at random moments and started again. Prints the largest
absolute difference of a pixel ([-1, 1]) to the run at batch 1, and what the killed run left behind. The prior evaluates
image by image (``--batched``: whole batches) and every process has one thread.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # else the number of threads depends on the number of processes
FILES = (
    "data/faces64.yaml",
    "sampler/faces64/dps_random_inpainting.yaml",
    "prior/faces64.yaml",
    "task/faces64/random_inpainting.yaml",
    "equireg/faces64/dps_random_inpainting.yaml",
)


def command(options: argparse.Namespace, folder: Path, name: str, *extra: str) -> list[str]:
    files = [part for file in FILES for part in ("-c", f"configs/{file}")]
    fixed = [f"--data.path={options.path}", f"--data.limit={options.count}", f"--model.num_steps={options.num_steps}"]
    if not options.batched:
        fixed.append("--model.prior.init_args.image_by_image=true")
    fixed += [f"--root={folder}", f"--name={name}", "--trainer.accelerator=cpu"]
    return [sys.executable, "cli.py", "predict", *files, *fixed, *(extra or ("--trainer.devices=1",))]


def run(arguments: list[str]) -> None:
    subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def predictions(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.load(file) for file in sorted((folder / "predictions").glob("*.npy"))}


def difference(a: Path, b: Path) -> float:
    ours, theirs = predictions(a), predictions(b)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{a} and {b} hold different samples")
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def killed_run(options: argparse.Namespace, folder: Path, seconds: float) -> tuple[list[int], int]:
    """Kills a run three times, finishes it; returns finished samples after each kill and how often one was redone."""
    generator = random.Random(0)
    arguments = command(options, folder, "killed", "--trainer.devices=1", "--data.batch_size=1")
    finished, written = [], {}
    redone = 0
    for _ in range(3):
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(seconds * generator.uniform(0.3, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows = {file.name: file.stat().st_mtime_ns for file in (folder / "killed/rows").glob("*.json")}
        redone += sum(rows[name] != stamp for name, stamp in written.items())
        written = rows
        finished.append(len(rows))
    run(arguments)
    rows = {file.name: file.stat().st_mtime_ns for file in (folder / "killed/rows").glob("*.json")}
    redone += sum(rows[name] != stamp for name, stamp in written.items())
    return finished, redone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="../shared/data/faces64.h5")
    parser.add_argument("--num_steps", type=int, default=50)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--batched", action="store_true", help="let the network evaluate a batch as one, as by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        run(command(options, folder, "batch1", "--trainer.devices=1", "--data.batch_size=1"))
        seconds = time.perf_counter() - start
        for name, extra in {
            "batch3": ("--trainer.devices=1", "--data.batch_size=3"),
            "batch3_again": ("--trainer.devices=1", "--data.batch_size=3"),
            "batch8": ("--trainer.devices=1", "--data.batch_size=8"),
            "two_processes": ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1"),
        }.items():
            run(command(options, folder, name, *extra))
        for name in ("batch3", "batch8", "two_processes"):
            print(f"{name} against batch1: {difference(folder / name, folder / 'batch1'):.2e} (bound 1e-4)")
        print(f"batch3 twice: {difference(folder / 'batch3_again', folder / 'batch3'):.1g} (bound 0)")
        finished, redone = killed_run(options, folder, seconds)
        left = [file.name for file in (folder / "killed").rglob(".*")]
        print(f"killed after {finished} samples, then finished: {difference(folder / 'killed', folder / 'batch1'):.1g}")
        print(f"finished samples computed again: {redone}; partial files left: {left or 'none'}")


if __name__ == "__main__":
    main()
