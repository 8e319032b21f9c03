"""Pairs of fields from nothing but a seed: the law of the input, the solver, and the files they end up in."""

import fcntl
import io
import json
import multiprocessing
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from equireg.noise import SampleNoise, Stream, hash_seed
from equireg.pde.equations import EQUATIONS, PDE, Equation
from equireg.pde.files import FieldAttributes, field_path, read_attributes, read_pairs, write_fields
from equireg.pde.helmholtz import WAVENUMBER, Helmholtz
from equireg.pde.navier_stokes import DT, HORIZON, VISCOSITY, NavierStokes
from equireg.pde.random_fields import NeumannField, PeriodicField, RandomField
from equireg.runs import atomic_write

Split = Literal["train", "val", "test"]
Precision = Literal["float32", "float64"]

SPLITS: tuple[Split, ...] = get_args(Split)
PART = 16
"""Pairs that are solved together and written at once; a stopped generation repeats no more than this per process."""
PILOT = 64
"""Pairs whose statistics normalise the fields of an equation with other constants than the published ones."""


class FieldLaw(ABC):
    """Draws pairs x = (a, u): a from its random field, u by the solver.

    Args:
        size: points per side.
        precision: of the solver; files hold float32.
    """

    equation: Equation
    field: RandomField

    def __init__(self, size: int, precision: Precision = "float64") -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision={precision!r} must be one of {', '.join(get_args(Precision))}")
        self.size = size
        self.precision: Precision = precision

    @abstractmethod
    def solve(self, a: Tensor) -> Tensor:
        """u (..., N, N) for inputs a (..., N, N), on their device and in their dtype."""

    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """What determines the law, for the attributes of files."""

    @property
    @abstractmethod
    def is_published(self) -> bool:
        """Whether all physical constants are those of the published data."""

    def sample(self, indices: Sequence[int], seed: int, split: Split, device: str = "cpu") -> Tensor:
        """Pairs (B, 2, N, N), float32, in physical units; a pair depends on seed, split and its own index alone."""
        like = torch.empty(0, dtype=getattr(torch, self.precision), device=device)
        noise = SampleNoise(indices, hash_seed(seed, SPLITS.index(split)), Stream.DATA)
        a = self.field.draw(noise, (self.size, self.size), like)
        return torch.stack([a, self.solve(a)], dim=1).float().cpu()

    def statistics(self, seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Mean and standard deviation of the channels: the published ones, or those of the first training pairs."""
        if self.is_published:
            return self.equation.mean, self.equation.std
        x = self.sample(range(PILOT), seed, "train").double().transpose(0, 1).flatten(1)
        return tuple(x.mean(1).tolist()), tuple(x.std(1).tolist())


class NavierStokesLaw(FieldLaw):
    """Initial and final vorticity of the forced flow (Li et al., ICLR 2021).

    Args:
        size: points per side, even.
        viscosity: nu.
        horizon: time of the final field.
        dt: time step; the published data have 1e-4.
        alpha, tau: of the initial field, see ``PeriodicField``.
        precision: of the solver.
    """

    equation = EQUATIONS["navier_stokes"]

    def __init__(
        self,
        size: int = 64,
        viscosity: float = VISCOSITY,
        horizon: float = HORIZON,
        dt: float = DT,
        alpha: float = 2.5,
        tau: float = 7.0,
        precision: Precision = "float64",
    ) -> None:
        super().__init__(size, precision)
        self.field = PeriodicField(alpha, tau)
        self.solver = NavierStokes(size, viscosity, dt)
        self.solver.steps(horizon)  # refuses what is out of range
        self.horizon = horizon

    def solve(self, a: Tensor) -> Tensor:
        return self.solver(a, self.horizon)

    def constants(self) -> dict[str, Any]:
        return {
            "nu": self.solver.viscosity,
            "T": self.horizon,
            "dt": self.solver.dt,
            "forcing": "0.1 (sin 2 pi (x1 + x2) + cos 2 pi (x1 + x2))",
            "alpha": self.field.alpha,
            "tau": self.field.tau,
        }

    @property
    def is_published(self) -> bool:
        physics = self.solver.viscosity, self.horizon, self.field.alpha, self.field.tau
        return physics == (VISCOSITY, HORIZON, 2.5, 7.0)


class HelmholtzLaw(FieldLaw):
    """Source and solution of the Helmholtz equation (Huang et al., DiffusionPDE, NeurIPS 2024).

    Args:
        size: points per side.
        wavenumber: k.
        alpha, tau: of the source, see ``NeumannField``.
        precision: of the solver.
    """

    equation = EQUATIONS["helmholtz"]

    def __init__(
        self,
        size: int = 64,
        wavenumber: float = WAVENUMBER,
        alpha: float = 2.0,
        tau: float = 3.0,
        precision: Precision = "float64",
    ) -> None:
        super().__init__(size, precision)
        self.field = NeumannField(alpha, tau)
        self.solver = Helmholtz(size, wavenumber)

    def solve(self, a: Tensor) -> Tensor:
        return self.solver(a)

    def constants(self) -> dict[str, Any]:
        return {"k": self.solver.wavenumber, "alpha": self.field.alpha, "tau": self.field.tau}

    @property
    def is_published(self) -> bool:
        return (self.solver.wavenumber, self.field.alpha, self.field.tau) == (WAVENUMBER, 2.0, 3.0)


LAWS: dict[PDE, type[FieldLaw]] = {"helmholtz": HelmholtzLaw, "navier_stokes": NavierStokesLaw}
ARGUMENTS = {"k": "wavenumber", "nu": "viscosity", "T": "horizon", "dt": "dt", "alpha": "alpha", "tau": "tau"}
"""What the constants in a file are called in the constructors."""


def law_of(pde: PDE, size: int, constants: Mapping[str, Any]) -> FieldLaw:
    """The law of the fields in a file; constants that it does not name are the published ones."""
    given = {argument: constants[name] for name, argument in ARGUMENTS.items() if name in constants}
    return LAWS[pde](size, **given)


def generate(
    law: FieldLaw,
    folder: str | Path,
    split: Split,
    count: int,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
    overwrite: bool = False,
) -> Path:
    """Writes ``count`` pairs of a split into their file, which appears only when it is complete.

    The file is the same, byte by byte, however many processes make it and however often it was interrupted: what is
    solved lies in a hidden folder beside it until then, and the same call goes on from there. A file that is there
    with these settings is left alone, one with fewer pairs is extended; several processes may ask for the same one.

    Args:
        law: what to draw.
        folder: of the file, which is named by equation, split and size.
        split: the splits of one seed are independent of each other.
        count: number of pairs; a smaller set is the beginning of a larger one.
        seed: of all fields.
        workers: processes, of one thread each; a GPU is used by one.
        device: "cpu", "cuda", ...
        overwrite: replace a file with other settings.

    Returns:
        The file.

    Raises:
        FileExistsError: if the file is there with other settings and ``overwrite`` is false.
        ValueError: if an argument is out of range.
    """
    if count < 1:
        raise ValueError(f"{split}={count} must be at least 1")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    path = field_path(folder, law.equation.name, split, law.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        attributes = _attributes(law, split, count, seed)
        parts = path.parent / f".{path.stem}.parts"
        shorter = 0
        if path.is_file() and not overwrite:
            there = read_attributes(path)
            different = _different(there, attributes)
            if not different:
                return path
            if there.count > count or _different(replace(there, count=count), attributes):
                raise FileExistsError(f"{path} is there with other settings ({different}); --overwrite replaces it")
            shorter = there.count
        _prepare(parts, attributes)
        for start in range(0, shorter - PART + 1, PART):
            if not (parts / _part_name(start)).is_file():
                _write_part(parts / _part_name(start), read_pairs(path, slice(start, start + PART)))
        _solve_missing(law, parts, split, count, seed, workers, device)
        write_fields(path, (np.load(parts / _part_name(start)) for start in range(0, count, PART)), attributes)
        shutil.rmtree(parts)
    return path


def _attributes(law: FieldLaw, split: Split, count: int, seed: int) -> FieldAttributes:
    mean, std = law.statistics(seed)
    return FieldAttributes(
        pde=law.equation.name,
        grid=law.equation.grid,
        size=law.size,
        count=count,
        split=split,
        mean=mean,
        std=std,
        seed=seed,
        source="generated by EquiReg",
        constants={**law.constants(), "precision": law.precision},
    )


def _different(there: FieldAttributes, asked: FieldAttributes) -> str:
    """The first settings in which two files differ."""
    old, new = (attributes.flat() for attributes in (there, asked))
    found = [
        f"{name}={old.get(name)!r} there, {new.get(name)!r} asked"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return "; ".join(found[:3])


def _prepare(parts: Path, attributes: FieldAttributes) -> None:
    """Makes the folder of parts, or empties one that was left by a generation with other settings."""
    record, settings = parts / "settings.json", json.dumps(attributes.flat() | {"count": None}, sort_keys=True)
    if parts.is_dir() and not (record.is_file() and record.read_text() == settings):
        shutil.rmtree(parts)
    atomic_write(record, settings)


def _solve_missing(law: FieldLaw, parts: Path, split: Split, count: int, seed: int, workers: int, device: str) -> None:
    jobs = []
    for start in range(0, count, PART):
        indices = range(start, min(start + PART, count))
        if _pairs_in(parts / _part_name(start)) != len(indices):
            jobs.append((law, parts / _part_name(start), indices, seed, split, device))
    done = count - sum(len(job[2]) for job in jobs)
    title = f"{law.equation.title}, {split}, {law.size}x{law.size}"
    with tqdm(total=count, initial=done, desc=title, unit=" pairs", disable=None if count > PART else True) as bar:
        for solved in _run(jobs, 1 if device != "cpu" else min(workers, max(1, len(jobs)))):
            bar.update(solved)


def _run(jobs: list[tuple], workers: int) -> Iterator[int]:
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the worker processes; more do not help on fields of this size
        try:
            yield from map(_solve_part, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap_unordered(_solve_part, jobs)


def _solve_part(job: tuple[FieldLaw, Path, range, int, Split, str]) -> int:
    law, path, indices, seed, split, device = job
    x = law.sample(indices, seed, split, device)
    if not x.isfinite().all():
        raise ValueError(
            f"{split} pairs {indices.start} to {indices.stop - 1} are not finite; the equation has blown up"
        )
    _write_part(path, x.numpy())
    return len(indices)


def _write_part(path: Path, x: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, x)
    atomic_write(path, buffer.getvalue())


def _part_name(start: int) -> str:
    return f"{start:07d}.npy"


def _pairs_in(path: Path) -> int:
    """Number of pairs of a part, 0 when it is not there; the last part of a smaller set is short."""
    return len(np.load(path, mmap_mode="r")) if path.is_file() else 0


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Only one process at a time makes a file; the others wait, and find it."""
    with open(path.parent / f".{path.stem}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.unlink(file.name)
