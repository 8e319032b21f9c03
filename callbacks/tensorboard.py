"""Pictures and curves of a run, in TensorBoard and as files."""

import inspect
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.prediction_writer import PredictionWriter, field_range, sample_stem, write_into
from equireg.metrics import data_misfit
from equireg.pictures import encode_png, field_pictures, from_uint8, picture_grid, to_uint8
from equireg.priors import Step

SNAPSHOTS = 8
COLUMNS = ("truth", "measurement", "restoration")
CURVES = ("data_misfit", "equivariance_error")
REGULARISERS = ("EquiReg", "StateGrad")


@dataclass
class Trajectory:
    """What is recorded of a batch: one entry per recorded step, of the inspected images.

    Attributes:
        rows: where the inspected images are in the batch.
        steps: numbers of the recorded steps.
        snapshots: denoised estimates (len(rows), C, H, W).
        curves: numbers (len(rows),) by name.
    """

    rows: list[int]
    steps: list[int] = field(default_factory=list)
    snapshots: list[Tensor] = field(default_factory=list)
    curves: dict[str, list[Tensor]] = field(default_factory=dict)


class TensorBoardInspector(Callback):
    """Shows how the first samples were restored, in TensorBoard and in the folder ``<run>/inspect``.

    ``grid.png`` has a row for every sample, truth, measurement and restoration; ``<index>_<name>.png`` the denoised
    estimates along its trajectory. TensorBoard gets both, the curves of the recorded steps (data misfit
    ||y - A x0_hat|| / (sigma sqrt(m)), and the relative equivariance error where a regulariser is attached), and the
    hyper-parameters beside the final metrics. Each process writes the files of its own samples, and at the end rank
    zero logs all that are there, those of an earlier run in the same folder included.

    List it before ``PredictionWriter``, whose error at the end of a run with diverged samples is the last thing that
    happens.

    Args:
        num_images: how many measurements are inspected, the first draw of each.
        every_steps: record every k-th step and the last one; about 8 steps when left out.
        curves: record the curves, at the cost of one evaluation of the operator and the MPE function per recorded step.

    Raises:
        ValueError: if ``num_images`` or ``every_steps`` is below 1.
    """

    def __init__(self, num_images: int = 8, every_steps: int | None = None, curves: bool = True) -> None:
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be at least 1")
        self.num_images = num_images
        self.every_steps = every_steps
        self.curves = curves
        self.run: Path | None = None
        self.trajectory: Trajectory | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run = None
        if stage != "predict" or trainer.fast_dev_run or not hasattr(pl_module, "listeners"):
            return
        self.run = Path(trainer.log_dir)  # a collective: every rank has to ask
        self.field_range = field_range(trainer.datamodule)
        keys = trainer.datamodule.samples().keys()
        self.keys = [key for key in keys if key[1] == 0][: self.num_images]
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self.is_own_logger = not loggers
        self.logger = loggers[0] if loggers else TensorBoardLogger(self.run, name="", version="")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run is not None:
            pl_module.listeners.append(self.on_step)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.run is None:
            return
        keys = zip(batch["index"].tolist(), batch["draw"].tolist(), strict=True)
        rows = [row for row, key in enumerate(keys) if key in self.keys]
        self.trajectory = Trajectory(rows) if rows else None

    @torch.no_grad()
    def on_step(self, sampler: LightningModule, step: Step, x0_hat: Tensor) -> None:
        """Listener of the sampler; what it records stays on the device until the batch is over."""
        record = self.trajectory
        if record is None or not self._is_recorded(step):
            return
        y, operator = sampler.problem.y, sampler.problem.operator
        images = x0_hat
        if sampler.space == "latent" and tuple(x0_hat.shape[1:]) != tuple(operator.image_shape):
            images = sampler.prior.decode(x0_hat)
        record.steps.append(step.k)
        record.snapshots.append(images[record.rows])
        if not self.curves:
            return
        misfit = data_misfit(y, operator(images), operator.noise_std(y))
        record.curves.setdefault("data_misfit", []).append(misfit[record.rows])
        penalty = sampler.penalty
        if penalty is not None and (penalty.function.space == "pixel" or images is not x0_hat):
            argument = images if penalty.function.space == "pixel" else x0_hat
            record.curves.setdefault("equivariance_error", []).append(penalty.error(argument[record.rows]))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        record, self.trajectory = self.trajectory, None
        if record is None:
            return
        if self.field_range is None:
            y = as_images(outputs["y"], tuple(outputs["x0"].shape[1:]))
        else:
            y = outputs["operator"].adjoint(outputs["y"])  # the values at their sensors
        columns = dict(zip(COLUMNS, (batch.get("x"), y, outputs["x0"]), strict=True))
        for i, row in enumerate(record.rows):
            key = batch["index"][row].item(), batch["draw"][row].item()
            stem = sample_stem(*key, batch["name"][row], trainer.datamodule.draws)
            shown = {name: images[row] for name, images in columns.items() if images is not None}
            arrays = {name: self._picture(image).numpy() for name, image in shown.items()}
            arrays |= {name: torch.stack(values)[:, i].float().cpu().numpy() for name, values in record.curves.items()}
            arrays |= {"key": np.array(key), "steps": np.array(record.steps, dtype=np.int64)}
            if record.snapshots:
                snapshots = torch.stack([self._picture(images[i]) for images in record.snapshots])
                arrays["snapshots"] = snapshots.numpy()
                self._write(f"{stem}.png", encode_png(side_by_side(snapshots, len(snapshots))))
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)
            self._write(f"{stem}.npz", buffer.getvalue())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.run is None:
            return
        trainer.strategy.barrier("inspected")  # until every rank has written its files
        writers = [callback for callback in trainer.callbacks if isinstance(callback, PredictionWriter)]
        summary = writers[0].merge(trainer) if writers else None
        if not trainer.is_global_zero:
            return
        self._log_pictures()
        if summary is not None:
            means = {name: statistics["mean"] for name, statistics in summary["metrics"].items()}
            metrics = {f"metrics/{name}": mean for name, mean in means.items() if mean is not None}
            self.logger.log_hyperparams(hyperparameters(self.run, trainer, pl_module), metrics)
        if self.is_own_logger:
            self.logger.finalize("success")  # Lightning finalises its own after this hook

    def _is_recorded(self, step: Step) -> bool:
        every = self.every_steps or -(-step.num_steps // SNAPSHOTS)
        return step.k % every == 0 or step.k == step.num_steps - 1

    def _picture(self, image: Tensor) -> Tensor:
        """8-bit values of an image, or of a field in colours."""
        if self.field_range is None:
            return to_picture(image)
        return to_uint8(field_pictures(image[None], self.field_range)[0]).cpu()

    def _detach(self, pl_module: LightningModule) -> None:
        self.trajectory = None
        if self.on_step in getattr(pl_module, "listeners", []):
            pl_module.listeners.remove(self.on_step)

    def _write(self, name: str, content: bytes) -> None:
        write_into(self.run, f"inspect/{name}", content)

    def _log_pictures(self) -> None:
        """Everything in ``<run>/inspect`` to TensorBoard, and the grid of all samples."""
        records = sorted(self._records(), key=lambda record: tuple(record[1]["key"]))
        if not records:
            return
        board = self.logger.experiment
        shown = [column for column in COLUMNS if all(column in arrays for _, arrays in records)]
        pictures = [torch.from_numpy(arrays[column]) for _, arrays in records for column in shown]
        grid = side_by_side(torch.stack(pictures), len(shown))
        self._write("grid.png", encode_png(grid))
        board.add_image(" - ".join(shown), grid, 0)
        for stem, arrays in records:
            if "snapshots" in arrays:
                snapshots = torch.from_numpy(arrays["snapshots"])
                board.add_image(f"trajectory/{stem}", side_by_side(snapshots, len(snapshots)), 0)
            for name in CURVES:
                if name in arrays:
                    for step, value in zip(arrays["steps"], arrays[name], strict=True):
                        board.add_scalar(f"{name}/{stem}", value, step)

    def _records(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """The inspected samples' files: stem and arrays."""
        for file in (self.run / "inspect").glob("*.npz"):
            with np.load(file) as stored:
                arrays = dict(stored)
            if tuple(arrays["key"].tolist()) in self.keys:
                yield file.stem, arrays


def as_images(y: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
    """Measurements brought to the ``shape`` (C, H, W) of images by nearest pixels; None when they are no images."""
    if y.ndim != 4 or y.shape[1] not in (1, shape[0]):
        return None
    return F.interpolate(y.float(), shape[1:], mode="nearest").expand(-1, shape[0], -1, -1)


def to_picture(image: Tensor) -> Tensor:
    """8-bit values of an image (C, H, W) in [-1, 1], black where it is NaN; other channels one below the other."""
    if len(image) not in (1, 3):
        image = image.flatten(0, 1)[None]
    return to_uint8(image.float().nan_to_num(nan=-1.0)).cpu()


def side_by_side(pictures: Tensor, columns: int) -> Tensor:
    """One picture of 8-bit pictures (N, C, H, W)."""
    return to_uint8(2 * picture_grid(from_uint8(pictures), columns) - 1)


def hyperparameters(run: Path, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Simple values that describe sampler, operator, regulariser and data, by dotted names.

    They come from the ``config.yaml`` that the command line leaves in the run's folder; where there is none, from the
    attributes that are named as the constructors' arguments.
    """
    if not (run / "config.yaml").is_file():
        parts = {"sampler": pl_module, "sampler.operator": pl_module.operator, "data": trainer.datamodule}
        return {name: value for prefix, part in parts.items() for name, value in _attributes(prefix, part)}
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    parts = {"sampler": config.get("model"), "data": config.get("data")}
    for callback in config.get("trainer", {}).get("callbacks") or []:
        kind = callback["class_path"].rsplit(".", 1)[-1]
        if kind in REGULARISERS:
            parts[kind] = callback
    return {name: value for prefix, part in parts.items() for name, value in _flatten(prefix, part)}


def _flatten(prefix: str, node: Any) -> Iterator[tuple[str, bool | int | float | str]]:
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield prefix, node["class_path"].rsplit(".", 1)[-1]
            node = node.get("init_args") or {}
        for name, value in node.items():
            yield from _flatten(f"{prefix}.{name}", value)
    elif isinstance(node, list):
        yield prefix, str(node)
    elif node is not None:
        yield prefix, node


def _attributes(prefix: str, part: Any) -> Iterator[tuple[str, bool | int | float | str]]:
    yield prefix, type(part).__name__
    for name in inspect.signature(type(part).__init__).parameters:
        if isinstance(getattr(part, name, None), bool | int | float | str):
            yield f"{prefix}.{name}", getattr(part, name)
