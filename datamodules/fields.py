"""Pairs of input and solution fields of an equation, and sensor values that the user brings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset, Subset

from datamodules.base import ImageDataModule, Split, first
from equireg.operators import Sensors
from equireg.pde.equations import PDE, Normalizer
from equireg.pde.files import FieldAttributes, field_path, read_attributes, read_pairs
from equireg.pde.generate import LAWS, FieldLaw, generate, law_of

COLUMNS = ("row", "column", "value")
CHANNELS = {"a": 0, "u": 1}


class FieldDataModule(ImageDataModule):
    """Fields x = (a, u) (2, N, N) of one equation, float32, in physical units; networks normalise by ``normalizer``.

    The files are those of ``python cli.py generate``; a split whose file is not there is generated when it is first
    wanted. With mode ``simulate`` the run measures the fields with its ``Sensors``; with mode ``given`` the values and
    positions of the sensors are the user's, there is no truth, and the restored field is the result (files then only
    serve samplers that want statistics of the training split).

    Args:
        folder: of the files.
        size: points per side.
        mode: whether there are fields or measurements to restore.
        measurements: with mode ``given``, a file or a folder of files, one per field to restore: .csv with the columns
            row, column and value, and channel (a or u) where the task has sensors on both; or .npz with the arrays y
            and positions, as runs leave them in ``measurements/``.
        generate_train, generate_val, generate_test: pairs of a split that is not there; with 0 it is an error.
        generate_seed: of these fields.
        subset_seed: restore ``limit`` fields drawn with this seed instead of the first ones.
        cache_bytes: largest split that is read into memory; of larger ones each pair is read when it is wanted.
        options: see ``ImageDataModule``.

    Raises:
        FileNotFoundError: if a file is missing and is not to be generated.
        ValueError: if a file is truncated or of another layout, equation or size; if positions are outside the grid,
            repeated or none; and as ``ImageDataModule``.
    """

    pde: PDE

    def __init__(
        self,
        folder: str = "data/pde",
        size: int = 64,
        mode: Literal["simulate", "given"] = "simulate",
        measurements: str | None = None,
        generate_train: int = 1000,
        generate_val: int = 100,
        generate_test: int = 100,
        generate_seed: int = 0,
        subset_seed: int | None = None,
        cache_bytes: int = 2 * 1024**3,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if mode not in ("simulate", "given"):
            raise ValueError(f"mode={mode!r} must be 'simulate' or 'given'")
        if (mode == "given") != (measurements is not None):
            raise ValueError(f"measurements={measurements!r} and mode={mode!r}: mode='given' reads measurements")
        LAWS[self.pde](size)  # refuses a size that the solver cannot take
        counts = {"train": generate_train, "val": generate_val, "test": generate_test}
        for split, count in counts.items():
            if count < 0:
                raise ValueError(f"generate_{split}={count} must not be negative")
        if subset_seed is not None and self.limit is None:
            raise ValueError(f"subset_seed={subset_seed} draws a subset of limit fields; limit is missing")
        self.folder = folder
        self.size = size
        self.mode = mode
        self.measurements = measurements
        self.generate_counts = counts
        self.generate_seed = generate_seed
        self.subset_seed = subset_seed
        self.cache_bytes = cache_bytes
        self._fields: dict[Split, Fields] = {}
        self._predicted: Dataset | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (2, self.size, self.size)

    @property
    def normalizer(self) -> Normalizer:
        """Between physical units and those of networks: the statistics that the files name."""
        for fields in self._fields.values():
            return Normalizer(fields.attributes.mean, fields.attributes.std)
        return Normalizer.of(self.pde)

    @property
    def law(self) -> FieldLaw:
        """Random field and solver of the fields; with mode ``given`` the published ones."""
        constants = [fields.attributes.constants for fields in self._fields.values()]
        return law_of(self.pde, self.size, constants[0] if constants else {})

    def setup(self, stage: str) -> None:
        if self.mode == "given" and stage != "predict":
            raise ValueError(f"mode='given' has no fields, which {stage} needs; it is for predict")
        self.unreadable = {}
        if self.mode == "given":
            self._predicted = self._read_measurements()
        else:
            for split in self.splits(stage):
                self.dataset(split)
            if stage == "predict":
                self._predicted = self._choose_fields()
        self.check_model()

    def dataset(self, split: Split) -> Dataset:
        if split not in self._fields:
            fields = Fields(self._file(split), self.cache_bytes)
            self._check(fields)
            self._fields[split] = fields
        return self._fields[split]

    def predicted(self) -> Dataset:
        if self._predicted is None:
            raise RuntimeError("the fields to restore are known after setup('predict')")
        return self._predicted

    def check_model(self, parts: Sequence[str] = ("prior", "operator")) -> None:
        operator = self.model_part("operator")
        if operator is not None and not isinstance(operator, Sensors):
            raise ValueError(f"fields are measured by Sensors, not by {type(operator).__name__}")
        # an operator's check_shape is about positions it draws; the given ones are checked when they are read
        super().check_model(("prior",) if self.mode == "given" else parts)

    def _file(self, split: Split) -> Path:
        path, count = field_path(self.folder, self.pde, split, self.size), self.generate_counts[split]
        if path.is_file():
            return path
        if not count:
            raise FileNotFoundError(
                f"{path} does not exist; python cli.py generate {self.pde} --folder {self.folder} --size {self.size} "
                f"--{split} N makes it"
            )
        rank_zero_info(f"{path} does not exist: generating {count} pairs (generate_{split})")
        return generate(LAWS[self.pde](self.size), self.folder, split, count, self.generate_seed)

    def _check(self, fields: "Fields") -> None:
        """Refuses a file that does not fit this module or the files opened before."""
        there = fields.attributes
        for name, found, wanted in (("fields of", there.pde, self.pde), ("size", there.size, self.size)):
            if found != wanted:
                raise ValueError(f"{fields.path} holds {name} {found}, not {wanted}")
        for other in self._fields.values():
            if (other.attributes.mean, other.attributes.std) != (there.mean, there.std):
                raise ValueError(f"{fields.path} and {other.path} are normalised by different statistics")

    def _choose_fields(self) -> Dataset:
        """The fields to restore, without those that are not finite."""
        fields = self.dataset(self.predict_split)
        chosen: Dataset = first(fields, self.limit)
        if self.subset_seed is not None:
            order = torch.randperm(len(fields), generator=torch.Generator().manual_seed(self.subset_seed))
            chosen = Subset(fields, sorted(order[: self.limit].tolist()))
        finite = [i for i in range(len(chosen)) if chosen[i]["x"].isfinite().all()]
        if len(finite) == len(chosen):
            return chosen
        damaged = sorted(set(range(len(chosen))) - set(finite))
        self.unreadable = {chosen[i]["name"]: "the field is not finite" for i in damaged}
        rank_zero_warn(f"{fields.path}: {len(damaged)} of {len(chosen)} fields are not finite and are left out")
        if not finite:
            raise ValueError(f"{fields.path}: none of {len(chosen)} fields is finite")
        return Subset(chosen, finite)

    def _read_measurements(self) -> Dataset:
        operator = self.model_part("operator")
        files = _list_measurements(self.measurements)
        task = "inverse" if operator is None else operator.task
        read = [_read_sensors(file, self.image_shape, task) for file in files]
        for file, (_, positions) in zip(files, read, strict=True):
            try:
                (operator or Sensors(task)).with_parameters({"positions": positions[None]}, self.image_shape)
            except ValueError as error:
                raise ValueError(f"measurements: {str(file)!r} does not fit ({error})") from error
        counts = {len(y) for y, _ in read}
        if len(counts) > 1 and self.batch_size > 1:
            raise ValueError(
                f"measurements={self.measurements!r} have between {min(counts)} and {max(counts)} sensors: different "
                f"numbers need batch_size=1, not {self.batch_size}"
            )
        return first(SensorValues([file.stem for file in files], read), self.limit)


class Fields(Dataset):
    """The pairs of one file.

    Args:
        path: a file of ``equireg.pde.files``.
        cache_bytes: largest file that is read into memory.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is truncated or of another layout.
    """

    def __init__(self, path: str | Path, cache_bytes: int) -> None:
        self.path = Path(path)
        self.attributes: FieldAttributes = read_attributes(path)
        size = 2 * 4 * self.attributes.count * self.attributes.size**2
        self.x: Tensor | None = torch.from_numpy(read_pairs(path)) if size <= cache_bytes else None

    def __len__(self) -> int:
        return self.attributes.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        x = torch.from_numpy(read_pairs(self.path, i)) if self.x is None else self.x[i]
        return {"index": i, "name": f"{self.attributes.split}{i:05d}", "x": x}


class SensorValues(Dataset):
    """Measured values y (m,) with their ``positions`` (m,) in the flattened field.

    Args:
        names: one per measurement.
        values: y and positions of each.
    """

    def __init__(self, names: Sequence[str], values: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.names = names
        self.values = values

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        y, positions = self.values[i]
        return {"index": i, "name": self.names[i], "y": y, "parameters": {"positions": positions}}


def _list_measurements(path: str) -> list[Path]:
    given = Path(path)
    if not given.exists():
        raise FileNotFoundError(f"measurements={path!r} must be an existing file or folder")
    files = [given] if given.is_file() else sorted(f for f in given.iterdir() if f.suffix in (".csv", ".npz"))
    if not files or files[0].suffix not in (".csv", ".npz"):
        raise ValueError(f"measurements={path!r} must be a .csv or .npz file, or a folder with such files")
    return files


def _read_sensors(file: Path, shape: tuple[int, int, int], task: str) -> tuple[Tensor, Tensor]:
    """Values and positions of a measurement file."""
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                y, positions = arrays["y"], arrays["positions"]
        else:
            y, positions = _parse_csv(file.read_text(encoding="utf-8"), shape, task)
    except Exception as error:  # readers raise nearly anything on damaged files
        raise ValueError(f"measurements: {str(file)!r} cannot be read ({error})") from error
    if y.ndim != 1 or y.shape != positions.shape or y.dtype.kind != "f" or positions.dtype.kind not in "iu":
        raise ValueError(
            f"measurements: {str(file)!r} must hold as many values as positions, floats and integers, got "
            f"{y.dtype} {y.shape} and {positions.dtype} {positions.shape}"
        )
    if not np.isfinite(y).all():
        raise ValueError(f"measurements: {str(file)!r} holds values that are not finite")
    return torch.from_numpy(y.astype(np.float32)), torch.from_numpy(positions.astype(np.int64))


def _parse_csv(text: str, shape: tuple[int, int, int], task: str) -> tuple[np.ndarray, np.ndarray]:
    header, *lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()] or [[]]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ValueError(f"its first line must name the columns {', '.join(COLUMNS)}; {missing[0]!r} is missing")
    if task == "both" and "channel" not in header:
        raise ValueError("a task with sensors on both fields needs the column 'channel' with a or u")
    default = {"forward": "a", "inverse": "u"}.get(task, "")
    values, positions = [], []
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise ValueError(f"line {number} does not have the {len(header)} values of the header")
        cells = dict(zip(header, line, strict=True))
        row, column = int(cells["row"]), int(cells["column"])
        channel = cells.get("channel", default)
        if channel not in CHANNELS:
            raise ValueError(f"line {number}: channel={channel!r} must be a or u")
        if not (0 <= row < shape[1] and 0 <= column < shape[2]):
            raise ValueError(
                f"line {number}: row {row}, column {column} lies outside the grid of {shape[1]}x{shape[2]}"
            )
        values.append(float(cells["value"]))
        positions.append((CHANNELS[channel] * shape[1] + row) * shape[2] + column)
    return np.array(values, dtype=np.float64), np.array(positions, dtype=np.int64)
