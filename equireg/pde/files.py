"""Files of fields: the HDF5 layout of this library, and readers of the published data sets.

``{helmholtz|ns}_{train|val|test}_{size}.h5`` holds ``/a`` and ``/u``, float32 [N, H, W] in physical units, one field
per chunk, and attributes that say what they are.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy.io import loadmat, whosmat

from equireg.pde.equations import EQUATIONS, PDE, Normalizer, get_equation

BLOCK = 64
"""Pairs that are converted at a time."""

OFFICIAL_KEYS: dict[PDE, tuple[str, str]] = {"helmholtz": ("f_data", "psi_data"), "navier_stokes": ("a", "u")}
"""Names of a and u in the .mat files of DiffusionPDE."""


@dataclass(frozen=True)
class FieldAttributes:
    """What a file of fields says about itself.

    Attributes:
        pde: name of the equation.
        grid: "endpoint" or "periodic", see ``Equation``.
        size: points per side.
        count: number of pairs.
        split: train, val or test.
        mean, std: of the channels (a, u), in physical units; what networks normalise by.
        seed: that the fields were drawn from; -1 for imported ones.
        source: where they come from, for people.
        constants: of the equation and its random field, by name.
    """

    pde: PDE
    grid: str
    size: int
    count: int
    split: str
    mean: tuple[float, float]
    std: tuple[float, float]
    seed: int
    source: str
    constants: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Everything on one level, as JSON values."""
        flat = asdict(self)
        flat |= flat.pop("constants") | {"mean": list(self.mean), "std": list(self.std)}
        return flat


def field_path(folder: str | Path, pde: str, split: str, size: int) -> Path:
    """The file of a split."""
    return Path(folder) / f"{get_equation(pde).prefix}_{split}_{size}.h5"


def write_fields(path: Path, blocks: Iterable[np.ndarray], attributes: FieldAttributes) -> None:
    """Writes blocks of pairs (n, 2, H, W) as one file, which appears only when it is complete.

    Raises:
        ValueError: if the blocks do not hold ``attributes.count`` pairs.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shape = (attributes.count, attributes.size, attributes.size)
    try:
        with h5py.File(partial, "w") as file:
            data = [file.create_dataset(name, shape, "float32", chunks=(1, *shape[1:])) for name in ("a", "u")]
            start = 0
            for block in blocks:
                for channel, fields in enumerate(data):
                    fields[start : start + len(block)] = block[:, channel]
                start += len(block)
            if start != attributes.count:
                raise ValueError(f"{path} needs {attributes.count} pairs, got {start}")
            for name, value in attributes.flat().items():
                file.attrs[name] = value
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_attributes(path: str | Path) -> FieldAttributes:
    """What a file of fields says about itself.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is truncated, not HDF5, or of another layout.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with h5py.File(path, "r") as file:
            return _checked_attributes(file, path)
    except OSError as error:
        raise ValueError(f"{path} is truncated or not an HDF5 file ({error})") from error


def read_pairs(path: str | Path, which: slice | Sequence[int] | int = slice(None)) -> np.ndarray:
    """Pairs (n, 2, H, W) of a file, float32, in physical units; one pair (2, H, W) when ``which`` is a number.

    Raises:
        ValueError: if the data are damaged.
    """
    try:
        with h5py.File(path, "r") as file:
            return np.stack([file[name][which] for name in ("a", "u")], axis=0 if isinstance(which, int) else 1)
    except OSError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def import_fields(
    sources: Sequence[str | Path], folder: str | Path, pde: PDE, split: str, size: int, overwrite: bool = False
) -> Path:
    """Converts published data into the file of a split.

    Every ``r``-th point is kept when the published grid is ``r`` times finer, as in the published code. On the grid of
    the Helmholtz equation, which has points at both ends, that moves reflected fields by a cell: for a symmetric set
    generate it at its own size.

    Args:
        sources: .mat files of DiffusionPDE (MATLAB 5 or 7.3), folders or files of DiffusionPDE-normalized, or files of
            this library, in order.
        folder: of the file to write.
        pde: name of the equation.
        split: train, val or test.
        size: points per side of the file to write.
        overwrite: replace an existing file.

    Returns:
        The file.

    Raises:
        FileExistsError: if the file is there and ``overwrite`` is false.
        FileNotFoundError: if a source is missing.
        ImportError: if a source needs pyarrow, which is not installed.
        ValueError: if a source is damaged, of another equation or layout, or its size is no multiple of ``size``.
    """
    equation = get_equation(pde)
    path = field_path(folder, pde, split, size)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there; --overwrite replaces it")
    opened = [_open_source(Path(source), pde) for source in sources]
    for source, (_, shape, _) in zip(sources, opened, strict=True):
        if shape[0] != shape[1] or shape[0] % size:
            raise ValueError(f"{source} holds fields of {shape[0]}x{shape[1]}, not a multiple of size={size}")
    path.parent.mkdir(parents=True, exist_ok=True)
    attributes = FieldAttributes(
        pde=pde,
        grid=equation.grid,
        size=size,
        count=sum(count for count, _, _ in opened),
        split=split,
        mean=equation.mean,
        std=equation.std,
        seed=-1,
        source=", ".join(Path(source).name for source in sources),
        constants={"points_between": opened[0][1][0] // size} if opened[0][1][0] != size else {},
    )
    blocks = (block[:, :, :: shape[0] // size, :: shape[1] // size] for _, shape, read in opened for block in read())
    write_fields(path, blocks, attributes)
    return path


Source = tuple[int, tuple[int, int], Callable[[], Iterator[np.ndarray]]]
"""Number of pairs, their (H, W), and what yields them in physical units, (n, 2, H, W)."""


def _open_source(path: Path, pde: PDE) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"source={str(path)!r} does not exist")
    if path.is_dir() or path.suffix == ".arrow":
        return _open_arrow(path, pde)
    if path.suffix == ".h5":
        there = read_attributes(path)
        if there.pde != pde:
            raise ValueError(f"source={str(path)!r} holds fields of {there.pde}, not {pde}")
        return there.count, (there.size, there.size), lambda: _blocks(there.count, lambda i: read_pairs(path, i))
    if path.suffix != ".mat":
        raise ValueError(f"source={str(path)!r} must be a .mat or .h5 file, an .arrow file or a folder with such files")
    return _open_hdf5_mat(path, pde) if h5py.is_hdf5(path) else _open_mat5(path, pde)


def _open_hdf5_mat(path: Path, pde: PDE) -> Source:
    """MATLAB 7.3: HDF5 with the axes in reverse order, so fields are [W, H, N], or [time, W, H, N]."""
    try:
        with h5py.File(path, "r") as file:
            shapes = {name: file[name].shape for name in OFFICIAL_KEYS[pde] if isinstance(file.get(name), h5py.Dataset)}
            present = list(file)
    except OSError as error:
        raise ValueError(f"source={str(path)!r} is truncated or damaged ({error})") from error
    count, height, width = _official_shape(path, pde, {k: shape[::-1] for k, shape in shapes.items()}, present)

    def read() -> Iterator[np.ndarray]:
        try:
            with h5py.File(path, "r") as file:
                fields = [file[name] for name in OFFICIAL_KEYS[pde]]
                yield from _blocks(
                    count,
                    lambda i: np.stack([(f[..., i] if f.ndim == 3 else f[-1, ..., i]).T for f in fields], axis=1),
                )
        except OSError as error:
            raise ValueError(f"source={str(path)!r} is damaged ({error})") from error

    return count, (height, width), read


def _open_mat5(path: Path, pde: PDE) -> Source:
    with _told_as_mat5(path):
        shapes = {name: shape for name, shape, _ in whosmat(path)}
    own = {name: shapes[name] for name in OFFICIAL_KEYS[pde] if name in shapes}
    count, height, width = _official_shape(path, pde, own, list(shapes))

    def read() -> Iterator[np.ndarray]:
        with _told_as_mat5(path):
            arrays = loadmat(path, variable_names=OFFICIAL_KEYS[pde])
        fields = [arrays[name] for name in OFFICIAL_KEYS[pde]]
        last = [f if f.ndim == 3 else f[..., -1] for f in fields]  # of ten times
        yield from _blocks(count, lambda i: np.stack([f[i] for f in last], axis=1))

    return count, (height, width), read


@contextmanager
def _told_as_mat5(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # readers raise nearly anything on damaged files
        raise ValueError(f"source={str(path)!r} is truncated or not a MATLAB file ({error})") from error


def _official_shape(
    path: Path, pde: PDE, shapes: dict[str, tuple[int, ...]], present: Sequence[str]
) -> tuple[int, int, int]:
    """(N, H, W) of the two arrays [N, H, W] of a .mat file; the solution may have a last axis of times."""
    a, u = OFFICIAL_KEYS[pde]
    if a not in shapes or u not in shapes:
        others = [e.name for e in EQUATIONS.values() if set(OFFICIAL_KEYS[e.name]) <= set(present)]
        hint = f"; these are fields of {others[0]}" if others else ""
        raise ValueError(
            f"source={str(path)!r} must hold {a} and {u}, it has {', '.join(sorted(present)) or 'nothing'}{hint}"
        )
    if len(shapes[a]) != 3 or len(shapes[u]) not in (3, 4) or shapes[u][:3] != shapes[a] or 0 in shapes[u]:
        raise ValueError(
            f"source={str(path)!r} must hold {a} [N, H, W] and {u} [N, H, W] or [N, H, W, time], got "
            f"{list(shapes[a])} and {list(shapes[u])}"
        )
    return shapes[a]


def _open_arrow(path: Path, pde: PDE) -> Source:
    """jcy20/DiffusionPDE-normalized: Arrow files, column ``data`` [2, H, W], normalised as ``metadata.json`` says."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(f"source={str(path)!r} needs pyarrow: pip install equireg[arrow]") from error

    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.arrow")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"source={str(path)!r} is a folder without .arrow files")
    normalizer = _arrow_normalizer(folder / "metadata.json", pde)

    def tables() -> Iterator[Any]:
        for file in files:
            try:
                with pa.memory_map(str(file)) as mapped:
                    try:
                        reader = pa.ipc.open_stream(mapped)
                    except pa.ArrowInvalid:
                        mapped.seek(0)
                        reader = pa.ipc.open_file(mapped)
                        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                    else:
                        batches = iter(reader)
                    for batch in batches:
                        if "data" not in batch.schema.names:
                            names = ", ".join(batch.schema.names)
                            raise ValueError(f"source={str(file)!r} must have a column 'data', it has {names}")
                        yield batch.column("data")
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"source={str(file)!r} is truncated or not an Arrow file ({error})") from error

    counts = [len(column) for column in tables()]
    if not sum(counts):
        raise ValueError(f"source={str(path)!r} holds no fields")
    first = _arrow_array(next(column for column in tables() if len(column)), path)
    mean, std = (getattr(normalizer, name).numpy().astype(np.float64) for name in ("mean", "std"))

    def read() -> Iterator[np.ndarray]:
        for column in tables():
            for start in range(0, len(column), BLOCK):
                yield _arrow_array(column[start : start + BLOCK], path) * std / 0.5 + mean

    return sum(counts), first.shape[2:], read


def _arrow_array(column: Any, path: Path) -> np.ndarray:
    """Nested lists of numbers as one array (n, 2, H, W)."""
    storage = getattr(column, "storage", column)  # extension types of the package datasets
    shape: list[int] = [len(storage)]
    while hasattr(storage, "flatten") and storage.type.num_fields == 1:
        inner = storage.flatten()
        shape.append(len(inner) // max(1, len(storage)))
        storage = inner
    values = storage.to_numpy(zero_copy_only=False)
    if len(shape) != 4 or shape[1] != 2 or values.size != np.prod(shape):
        raise ValueError(f"source={str(path)!r}: the column 'data' must hold fields [2, H, W], got {shape[1:]}")
    return values.reshape(shape)


def _arrow_normalizer(path: Path, pde: PDE) -> Normalizer:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        stats = metadata["stats"]
        name = str(metadata["name"]).lower().replace("-", "_")
        normalizer = Normalizer(stats["mean"], stats["std"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; it holds the mean and std of the normalised fields") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be JSON with name and stats with mean and std of two channels ({error})"
        ) from error
    other = next(e for e in EQUATIONS.values() if e.name != pde)
    if other.name in name or name.startswith(other.prefix):
        raise ValueError(f"{path} is about {metadata['name']!r}, not {pde}")
    return normalizer


def _blocks(count: int, read: Callable[[slice], np.ndarray]) -> Iterator[np.ndarray]:
    for start in range(0, count, BLOCK):
        yield read(slice(start, min(start + BLOCK, count)))


def _checked_attributes(file: h5py.File, path: Path) -> FieldAttributes:
    for name in ("a", "u"):
        fields = file.get(name)
        if not isinstance(fields, h5py.Dataset):
            raise ValueError(f"{path} has no data set {name!r}; it has {', '.join(file) or 'nothing'}")
        if fields.ndim != 3 or fields.dtype != "float32" or 0 in fields.shape:
            raise ValueError(f"{path}: {name} must be float32 [N, H, W], got {fields.dtype} {list(fields.shape)}")
    flat = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in file.attrs.items()}
    known = [name for name in FieldAttributes.__dataclass_fields__ if name != "constants"]
    missing = [name for name in known if name not in flat]
    if missing:
        raise ValueError(f"{path} lacks the attribute {missing[0]!r}; it was not written by this library")
    described = {name: flat.pop(name) for name in known}
    described |= {name: tuple(described[name]) for name in ("mean", "std")}
    shape = (described["count"], described["size"], described["size"])
    for name in ("a", "u"):
        if file[name].shape != shape:
            raise ValueError(f"{path}: {name} must be {list(shape)} by its attributes, got {list(file[name].shape)}")
    get_equation(described["pde"])
    return FieldAttributes(**described, constants=flat)
