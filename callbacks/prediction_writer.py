"""Writes what a run restores, sample by sample, so that a stopped run goes on where it was."""

import csv
import io
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from equireg.metrics import psnr, relative_l2, ssim
from equireg.operators import Operator
from equireg.perceptual import LPIPS, DistributionDistance, LPIPSNet, check_backbone, check_installed
from equireg.pictures import encode_png, field_pictures, to_uint8
from equireg.runs import atomic_write
from equireg.summary import provenance, summarize

Metric = Literal["psnr", "ssim", "lpips", "fid", "kid", "relative_l2"]

IMAGE_METRICS = ("psnr", "ssim")
FIELD_METRICS = ("relative_l2",)
DISTRIBUTION_METRICS = ("fid", "kid")
COLUMNS = (
    "seconds",
    "network_evaluations",
    "network_backwards",
    "data_misfit",
    "equivariance_error",
    "equivariance_error_before",
    "measurement",
)
SUBFOLDERS = (".", "predictions", "measurements", "rows", "inspect")
IMAGES_AT_ONCE = 16
HINT = "what is finished stays there, and the same command goes on from it"


class PredictionWriter(Callback):
    """Writes restorations, measurements and metrics into the run's folder; the same command again does what is missing.

    ``predictions/<index>_<name>.png`` and ``.npy`` (float32, (C, H, W), [-1, 1]; fields in physical units, pictured in
    colours up to three standard deviations), ``measurements/<...>.npz`` (y and the operator's parameters of this image)
    and ``rows/<...>.json`` appear sample by sample, each completely or not at all.
    A sample is finished when its row, which is written last, and its predictions are there. At the end rank zero makes
    ``metrics.csv`` and ``summary.json`` of all rows. With several posterior draws file names end in ``_draw<k>``.

    Args:
        metrics: what to measure against the truth; psnr and ssim for images and relative_l2 for fields when left out.
            fid and kid take the first draw of every measurement; the relative_l2 of fields is that of the channel that
            the task asks for. Where there is no truth (given measurements) there are none.
        save_png: 8-bit pictures of the restorations.
        save_npy: the restorations themselves; fid and kid are computed from them.
        save_measurements: what was measured.
        lpips_net: network of lpips.
        allow_download: let torch.hub download missing weights of lpips, fid and kid.

    Raises:
        ValueError: if the metrics or the files do not fit each other or the images.
        FileNotFoundError: if the weights of a metric are missing, before the first network evaluation.
        OSError: if the folder cannot be written.
        RuntimeError: at the end, after everything was written, if a sample diverged or is missing.
    """

    def __init__(
        self,
        metrics: Sequence[Metric] | None = None,
        save_png: bool = True,
        save_npy: bool = True,
        save_measurements: bool = True,
        lpips_net: LPIPSNet = "vgg",
        allow_download: bool = False,
    ) -> None:
        known = get_args(Metric)
        for metric in metrics or ():
            if metric not in known:
                raise ValueError(f"metrics: {metric!r} is unknown; available: {', '.join(known)}")
        self.asked = metrics
        self.metrics = tuple(dict.fromkeys(metrics or ()))
        if not save_npy and set(self.metrics) & set(DISTRIBUTION_METRICS):
            raise ValueError("fid and kid are computed from the saved restorations: they need save_npy=true")
        if not (save_png or save_npy):
            raise ValueError("save_png and save_npy are both false: the run would leave no restoration")
        self.save_png = save_png
        self.save_npy = save_npy
        self.save_measurements = save_measurements
        self.lpips_net: LPIPSNet = lpips_net
        self.allow_download = allow_download
        self.folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = None
        if stage != "predict" or trainer.fast_dev_run or not hasattr(pl_module, "listeners"):
            return
        self.start = time.perf_counter()
        self.folder = Path(trainer.log_dir)  # a collective: every rank has to ask
        self.keys = trainer.datamodule.samples().keys()
        self.summary: dict[str, Any] | None = None
        self.is_merged = False
        self.written = 0
        self.found: set[tuple[int, int]] = set()
        self.diverged: list[tuple[int, int, str]] = []
        self.field_range = field_range(trainer.datamodule)
        if self.asked is None:
            self.metrics = IMAGE_METRICS if self.field_range is None else FIELD_METRICS
        self._prepare_metrics(trainer, pl_module)
        finished = self._prepare_folder() if trainer.is_global_zero else None
        self.found = set(trainer.strategy.broadcast(finished)).intersection(self.keys)  # one list for all ranks
        trainer.datamodule.exclude(self.found)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is not None and "lpips" in self.per_image:
            self.per_image["lpips"].to(pl_module.device)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.folder is None:
            return
        x0, y, operator = outputs["x0"].float(), outputs["y"], outputs["operator"]
        scores = {name: measure(x0, batch["x"]).tolist() for name, measure in self.per_image.items()}
        finite = x0.isfinite().flatten(1).all(1).tolist()
        for i, key in enumerate(zip(batch["index"].tolist(), batch["draw"].tolist(), batch["name"], strict=True)):
            if not finite[i]:
                self.diverged.append(key)
                continue
            row = dict(zip(("index", "draw", "name"), key, strict=True))
            row |= {name: values[i] for name, values in scores.items()} | outputs["records"][i]
            self._write_sample(self._stem(trainer, row), x0[i], measurement_of(y, operator, i), row)
            self.written += 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.folder is None or self.is_merged or not trainer.is_global_zero:
            return
        if self.written or self.found:
            print(f"{self.folder}: stopped; {HINT}", flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.folder is None:
            return
        summary = self.merge(trainer)
        if summary is None:
            return
        print(self._closing_message(trainer, summary), flush=True)
        counts = summary["counts"]
        if counts["diverged"]:
            names = ", ".join(f"{index:05d} {name} (draw {draw})" for index, draw, name in counts["diverged"])
            raise RuntimeError(
                f"{len(counts['diverged'])} of {len(self.keys)} samples diverged, they were not written: {names}"
            )
        if counts["missing"] and not is_shortened(trainer):
            names = ", ".join(f"{index:05d} (draw {draw})" for index, draw in counts["missing"])
            raise RuntimeError(f"{self.folder} lacks {len(counts['missing'])} of {len(self.keys)} samples: {names}")

    def merge(self, trainer: Trainer) -> dict[str, Any] | None:
        """Writes ``metrics.csv`` and ``summary.json`` when every process is done; all processes have to call it.

        Returns:
            The contents of ``summary.json`` on rank zero, None on the others; computed by the first call.
        """
        if self.is_merged:
            return self.summary
        reports = all_ranks({"written": self.written, "diverged": self.diverged})  # waits for the slowest as well
        self.is_merged = True
        if not trainer.is_global_zero:
            return None
        table = self._finished_rows()
        rows = [table[key] for key in sorted(self.keys) if key in table]
        self._add_missing_metrics(trainer, rows)
        write_into(self.folder, "metrics.csv", self._csv(rows))
        diverged = sorted(key for report in reports for key in report["diverged"])
        absent = set(self.keys) - set(table) - {key[:2] for key in diverged}
        unreadable = trainer.datamodule.unreadable
        self.summary = {
            "metrics": summarize(rows) | self._distribution_metrics(trainer, rows),
            "counts": {
                "expected": len(self.keys) + len(unreadable) * trainer.datamodule.draws,
                "written": sum(report["written"] for report in reports),
                "found_finished": len(self.found),
                "unreadable": unreadable,
                "diverged": diverged,
                "missing": sorted(absent),
            },
            **provenance(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "seconds": time.perf_counter() - self.start,
        }
        write_into(self.folder, "summary.json", json.dumps(self.summary, indent=2) + "\n")
        return self.summary

    def _prepare_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds what measures, and tries it on images of this shape, before anything is restored."""
        shape = trainer.datamodule.image_shape
        are_fields = self.field_range is not None
        for metric in self.metrics:
            if are_fields and metric not in FIELD_METRICS:
                raise ValueError(f"metrics: {metric!r} is for images; for fields there is {', '.join(FIELD_METRICS)}")
        if self.save_png and shape[0] not in (1, 3) and not are_fields:
            raise ValueError(f"save_png=true: images of {shape[0]} channels are no pictures; set save_png=false")
        self.per_image: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        self.distribution: DistributionDistance | None = None
        self.has_truth = "x" in trainer.datamodule.samples()[0]
        if not self.has_truth:
            return
        distribution = [metric for metric in self.metrics if metric in DISTRIBUTION_METRICS]
        if distribution and len({index for index, _ in self.keys}) < 2:
            raise ValueError(f"{' and '.join(distribution)} need at least 2 images")
        for metric in self.metrics:
            if metric in ("lpips", *DISTRIBUTION_METRICS):
                check_installed(metric)
                if not self.allow_download:
                    check_backbone(metric, self.lpips_net if metric == "lpips" else "inception")
        if trainer.local_rank != 0:  # one process per machine downloads, the others find the files
            trainer.strategy.barrier("metrics")
        makers = {
            "psnr": lambda: psnr,
            "ssim": lambda: ssim,
            "lpips": lambda: LPIPS(self.lpips_net),
            "relative_l2": lambda: partial(relative_l2_of, pl_module.operator.recovered) if are_fields else relative_l2,
        }
        self.per_image = {metric: makers[metric]() for metric in self.metrics if metric in makers}
        if distribution and trainer.is_global_zero:
            self.distribution = DistributionDistance(distribution)
        if trainer.local_rank == 0:
            trainer.strategy.barrier("metrics")
        zeros = torch.zeros(1, *shape)
        for metric, measure in self.per_image.items():
            try:
                measure(zeros, zeros)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"metric {metric!r} cannot be computed of images {tuple(shape)}: {error}") from error

    def _prepare_folder(self) -> list[tuple[int, int]]:
        """Tries to write, removes what a killed run left half written, and finds what is finished."""
        try:
            atomic_write(self.folder / ".writable", b"")
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise OSError(error.errno, f"the folder {self.folder} cannot be written ({error.strerror})") from error
        for subfolder in SUBFOLDERS:
            for stray in (self.folder / subfolder).glob(".*.tmp"):
                stray.unlink(missing_ok=True)
        return sorted(self._finished_rows())

    def _finished_rows(self) -> dict[tuple[int, int], dict[str, Any]]:
        """The rows of finished samples by (index, draw)."""
        suffixes = [".png"] * self.save_png + [".npy"] * self.save_npy
        rows = {}
        for file in sorted((self.folder / "rows").glob("*.json")):
            try:
                row = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                continue  # damaged, so not finished: the sample is restored again
            if all((self.folder / "predictions" / (file.stem + suffix)).is_file() for suffix in suffixes):
                rows[row["index"], row["draw"]] = row
        return rows

    def _write_sample(self, stem: str, x0: Tensor, measurement: dict[str, np.ndarray], row: dict[str, Any]) -> None:
        if self.save_png:
            picture = x0 if self.field_range is None else field_pictures(x0[None], self.field_range)[0]
            write_into(self.folder, f"predictions/{stem}.png", encode_png(to_uint8(picture)))
        if self.save_npy:
            buffer = io.BytesIO()
            np.save(buffer, x0.cpu().numpy())
            write_into(self.folder, f"predictions/{stem}.npy", buffer.getvalue())
        if self.save_measurements:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **measurement)
            write_into(self.folder, f"measurements/{stem}.npz", buffer.getvalue())
        # last: it says that the sample is finished
        write_into(self.folder, f"rows/{stem}.json", json.dumps(row) + "\n")

    def _csv(self, rows: Sequence[dict[str, Any]]) -> str:
        names = ["index", "draw", "name", *self.per_image, *COLUMNS, *(name for row in rows for name in row)]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(dict.fromkeys(names)), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def _add_missing_metrics(self, trainer: Trainer, rows: Sequence[dict[str, Any]]) -> None:
        """Measures the saved restorations of an earlier run that was asked for fewer metrics."""
        lacking = [row for row in rows if not self.per_image.keys() <= row.keys()]
        if not lacking or not self.save_npy:
            return
        device = trainer.strategy.root_device
        if "lpips" in self.per_image:
            self.per_image["lpips"].to(device)
        values: dict[str, list[float]] = {metric: [] for metric in self.per_image}
        for x_hat, x in self._pairs(trainer, lacking):
            for metric, measure in self.per_image.items():
                values[metric] += measure(x_hat.to(device), x.to(device)).tolist()
        for i, row in enumerate(lacking):
            row |= {metric: row.get(metric, values[metric][i]) for metric in values}
            write_into(self.folder, f"rows/{self._stem(trainer, row)}.json", json.dumps(row) + "\n")

    def _distribution_metrics(self, trainer: Trainer, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """FID and KID of the first draws; None where fewer than two are left."""
        chosen = [row for row in rows if row["draw"] == 0]
        if self.distribution is None:
            return {}
        values: dict[str, float | None] = dict.fromkeys(self.distribution.metrics)
        if len(chosen) > 1:
            values = self.distribution(self._pairs(trainer, chosen), trainer.strategy.root_device)
        return {name: {"mean": value, "n": len(chosen)} for name, value in values.items()}

    def _pairs(self, trainer: Trainer, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Restorations and truths, read back in batches."""
        samples = trainer.datamodule.samples()
        positions = {key: position for position, key in enumerate(self.keys)}
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            x_hat, x = [], []
            for row in rows[start : start + IMAGES_AT_ONCE]:
                x_hat.append(torch.from_numpy(np.load(self.folder / "predictions" / f"{self._stem(trainer, row)}.npy")))
                x.append(samples[positions[row["index"], row["draw"]]]["x"])
            yield torch.stack(x_hat), torch.stack(x)

    def _stem(self, trainer: Trainer, row: dict[str, Any]) -> str:
        return sample_stem(row["index"], row["draw"], row["name"], trainer.datamodule.draws)

    def _closing_message(self, trainer: Trainer, summary: dict[str, Any]) -> str:
        counts = summary["counts"]
        lines = [f"{self.folder}: {counts['written']} samples restored now, {counts['found_finished']} found finished"]
        for what in ("unreadable", "diverged", "missing"):
            if counts[what]:
                lines[0] += f", {len(counts[what])} {what}"
        if not self.has_truth and self.metrics:
            lines.append(f"  without a truth there is no {', '.join(self.metrics)}")
        for name in (*self.metrics, "data_misfit", "equivariance_error"):
            lines += _line(name, summary["metrics"].get(name, {}))
        lines += [f"  left out: {name} ({reason})" for name, reason in counts["unreadable"].items()]
        root = trainer.logger.save_dir if isinstance(trainer.logger, TensorBoardLogger) else self.folder
        return "\n".join([*lines, f"tensorboard --logdir {shlex.quote(str(root))}"])


def field_range(datamodule: LightningDataModule) -> Tensor | None:
    """Three standard deviations of the channels of fields (2, 1, 1), in physical units; None for images."""
    normalizer = getattr(datamodule, "normalizer", None)
    return None if normalizer is None else 3 * normalizer.std


def relative_l2_of(channel: int, x_hat: Tensor, x: Tensor) -> Tensor:
    """``relative_l2`` of one channel."""
    return relative_l2(x_hat[:, channel], x[:, channel])


def write_into(folder: Path, path: str, content: bytes | str) -> None:
    """Writes a file of a run, completely or not at all.

    Raises:
        OSError: if that fails, a full disk for example; the message names the folder.
    """
    try:
        atomic_write(folder / path, content)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path} into {folder} ({error.strerror}); {HINT}") from error


def sample_stem(index: int, draw: int, name: str, draws: int) -> str:
    """The name without suffix of a sample's files."""
    plain = re.sub(r"[^\w.-]+", "-", name)[:100]
    return f"{index:05d}_{plain}" + (f"_draw{draw}" if draws > 1 else "")


def measurement_of(y: Tensor, operator: Operator, i: int) -> dict[str, np.ndarray]:
    """What was measured of image ``i`` of a batch: y, and the operator's parameters by name."""
    parameters = {name: getattr(operator, name)[i].cpu().numpy() for name in operator.parameter_names}
    return {"y": y[i].float().cpu().numpy()} | parameters


def all_ranks(value: Any) -> list[Any]:
    """The value of every rank, in rank order; a collective, so every rank has to call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_shortened(trainer: Trainer) -> bool:
    """Whether the run was asked for a part of the samples only."""
    limit = trainer.limit_predict_batches
    return isinstance(limit, int) or limit < 1.0


def _line(name: str, statistics: dict[str, Any]) -> list[str]:
    if statistics.get("mean") is None:
        return []
    interval = statistics.get("interval_95")
    bounds = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
    return [f"  {name} {statistics['mean']:.4g}{bounds} over {statistics['n']} measurements"]
