"""Files of fields: the same from a seed, resumed, read back, converted from published ones, refused when foreign."""

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import Tensor

import cli
from equireg.commands.generate import generate_command
from equireg.pde.files import import_fields, read_attributes, read_pairs
from equireg.pde.generate import LAWS, PART, HelmholtzLaw, NavierStokesLaw, generate


@pytest.fixture(scope="module")
def helmholtz_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs of 8x8."""
    return generate(HelmholtzLaw(8), tmp_path_factory.mktemp("fields"), "test", 40)


class Interrupted(HelmholtzLaw):
    """Stops at a pair that it is told, and remembers what it was asked for."""

    stop_at: int | None = None

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.asked: list[int] = []

    def sample(self, indices: Sequence[int], seed: int, split: str, device: str = "cpu") -> Tensor:
        self.asked += indices
        if self.stop_at in indices:
            raise KeyboardInterrupt
        return super().sample(indices, seed, split, device)


@pytest.mark.parametrize("pde", sorted(LAWS))
def test_the_file_does_not_depend_on_the_number_of_processes(pde: str, tmp_path: Path) -> None:
    law = LAWS[pde](8)
    files = [generate(law, tmp_path / str(n), "val", 2 * PART + 3, seed=5, workers=n) for n in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in (tmp_path / "1").iterdir()] == [files[0].name]


def test_an_interrupted_generation_goes_on_where_it_was(tmp_path: Path, helmholtz_file: Path) -> None:
    law = Interrupted(8)
    law.stop_at = PART
    with pytest.raises(KeyboardInterrupt):
        generate(law, tmp_path, "test", 40)
    assert not list(tmp_path.glob("*.h5"))
    law.stop_at, law.asked = None, []
    path = generate(law, tmp_path, "test", 40)
    assert law.asked == list(range(PART, 40))
    assert path.read_bytes() == helmholtz_file.read_bytes()


def test_parts_of_another_seed_are_not_taken_over(tmp_path: Path, helmholtz_file: Path) -> None:
    law = Interrupted(8)
    law.stop_at = PART
    with pytest.raises(KeyboardInterrupt):
        generate(law, tmp_path, "test", 40, seed=1)
    law.stop_at = None
    assert generate(law, tmp_path, "test", 40).read_bytes() == helmholtz_file.read_bytes()


def test_a_smaller_set_is_the_beginning_of_a_larger_one(tmp_path: Path, helmholtz_file: Path) -> None:
    generate(HelmholtzLaw(8), tmp_path, "test", PART + 2)
    law = Interrupted(8)
    path = generate(law, tmp_path, "test", 40)
    assert law.asked == list(range(PART, 40))
    assert path.read_bytes() == helmholtz_file.read_bytes()


def test_a_finished_file_is_left_alone_and_another_one_is_not_overwritten(helmholtz_file: Path) -> None:
    before = helmholtz_file.stat().st_mtime_ns
    folder = helmholtz_file.parent
    assert generate(HelmholtzLaw(8), folder, "test", 40) == helmholtz_file
    assert helmholtz_file.stat().st_mtime_ns == before
    for law, count, seed, what in (
        (HelmholtzLaw(8), 40, 1, "seed=0 there, 1 asked"),
        (HelmholtzLaw(8), 39, 0, "count=40 there, 39 asked"),
        (HelmholtzLaw(8, wavenumber=2.0), 40, 0, "k=1.0 there, 2.0 asked"),
    ):
        with pytest.raises(FileExistsError, match=what):
            generate(law, folder, "test", count, seed)


def test_splits_and_seeds_are_independent() -> None:
    law = NavierStokesLaw(8)
    fields = [law.sample([0, 1], seed, split) for seed in (0, 1) for split in ("train", "val", "test")]
    flat = torch.stack([x for pair in fields for x in pair]).flatten(1)
    assert len({tuple(x.tolist()) for x in flat}) == 12
    assert torch.equal(law.sample([1], 0, "train")[0], fields[0][1])


def test_files_hold_physical_units_and_say_what_they_are(helmholtz_file: Path) -> None:
    law = HelmholtzLaw(8)
    x = torch.from_numpy(read_pairs(helmholtz_file))
    torch.testing.assert_close(x, law.sample(range(40), 0, "test"))
    torch.testing.assert_close(law.solve(x[:, 0].double()).float(), x[:, 1])
    np.testing.assert_array_equal(read_pairs(helmholtz_file, 3), x[3])
    there = read_attributes(helmholtz_file)
    assert (there.pde, there.grid, there.size, there.count, there.split) == ("helmholtz", "endpoint", 8, 40, "test")
    assert there.constants["k"] == 1.0
    assert (there.mean, there.std) == (law.equation.mean, law.equation.std)
    with h5py.File(helmholtz_file) as file:
        assert file["u"].chunks == (1, 8, 8)
        assert file["u"].dtype == np.float32


def test_fields_of_other_constants_are_normalised_by_their_own_statistics(tmp_path: Path) -> None:
    law = HelmholtzLaw(8, wavenumber=3.0)
    there = read_attributes(generate(law, tmp_path, "test", 2))
    x = law.sample(range(64), 0, "train")
    assert there.std == pytest.approx(x.transpose(0, 1).flatten(1).std(1).tolist(), rel=1e-5)


def test_the_command_writes_all_splits_and_says_so(tmp_path: Path, capsys) -> None:
    options = ["--folder", str(tmp_path), "--size", "8", "--train", "3", "--test", "2", "--dt", "0.01"]
    assert cli.main(["generate", "navier_stokes", *options]) == 0
    printed = capsys.readouterr().out
    for split, count in (("train", 3), ("test", 2)):
        path = tmp_path / f"ns_{split}_8.h5"
        assert f"{path}: {count} pairs of 8x8" in printed
        assert read_attributes(path).constants["dt"] == 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "8"], "nothing to generate"),
        (["--size", "9", "--test", "1"], "size=9 must be even"),
        (["--size", "8", "--test", "1", "--workers", "0"], "workers=0 must be at least 1"),
        (["--size", "8", "--test", "1", "--dt", "0"], "dt=0.0 must be positive"),
        (["--size", "8", "--split", "test", "--test", "1"], "--split belongs to --source"),
        (["--size", "8", "--source", "x.mat"], "name its --split"),
        (["--size", "8", "--source", "x.mat", "--split", "test"], "source='x.mat' does not exist"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(options: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert cli.main(["generate", "navier_stokes", "--folder", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, helmholtz_file: Path) -> None:
    content = helmholtz_file.read_bytes()
    truncated = tmp_path / "truncated.h5"
    truncated.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"truncated.h5 is truncated or not an HDF5 file"):
        read_attributes(truncated)
    with pytest.raises(FileNotFoundError, match=r"missing.h5 does not exist"):
        read_attributes(tmp_path / "missing.h5")
    foreign = tmp_path / "foreign.h5"
    for content, message in (
        ({"images": np.zeros(3)}, "has no data set 'a'; it has images"),
        ({"a": np.zeros((2, 4, 4)), "u": np.zeros((2, 4, 4))}, "a must be float32"),
        ({name: np.zeros((2, 4, 4), np.float32) for name in "au"}, "lacks the attribute 'pde'"),
    ):
        with h5py.File(foreign, "w") as file:
            for name, value in content.items():
                file[name] = value
        with pytest.raises(ValueError, match=message):
            read_attributes(foreign)
    shorter = tmp_path / "shorter.h5"
    shorter.write_bytes(helmholtz_file.read_bytes())
    with h5py.File(shorter, "r+") as file:
        file.attrs["count"] = 50
    with pytest.raises(ValueError, match=r"a must be \[50, 8, 8\] by its attributes, got \[40, 8, 8\]"):
        read_attributes(shorter)


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    """Fields as in the published .mat files: flows with ten times."""
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((5, 8, 8)), "u": rng.standard_normal((5, 8, 8, 10))}


def write_mat73(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w", userblock_size=512) as file:  # MATLAB stores the first axis last
        for name, value in arrays.items():
            file[name] = value.transpose()


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_published_matlab_files_are_converted(version: str, tmp_path: Path, official: dict[str, np.ndarray]) -> None:
    source = tmp_path / "ns-nonbounded_1.mat"
    (savemat if version == "5" else write_mat73)(source, official)
    path = import_fields([source, source], tmp_path, "navier_stokes", "train", size=8)
    x = read_pairs(path)
    assert x.shape == (10, 2, 8, 8)
    np.testing.assert_array_equal(x[:5, 0], official["a"].astype(np.float32))
    np.testing.assert_array_equal(x[5:, 1], official["u"][..., -1].astype(np.float32))  # the last time
    coarse = read_pairs(import_fields([source], tmp_path, "navier_stokes", "test", size=4))
    np.testing.assert_array_equal(coarse, x[:5, :, ::2, ::2])


def test_the_published_helmholtz_names_are_known(tmp_path: Path) -> None:
    fields = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    source = tmp_path / "helmholtz.mat"
    savemat(source, {"f_data": fields[0], "psi_data": fields[1]})
    options = ["--folder", str(tmp_path), "--size", "8", "--source", str(source), "--split", "test"]
    assert generate_command(["helmholtz", *options]) == 0
    np.testing.assert_array_equal(read_pairs(tmp_path / "helmholtz_test_8.h5"), fields.swapaxes(0, 1).astype("f4"))


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_unusable_matlab_files_are_refused(version: str, tmp_path: Path, official: dict[str, np.ndarray]) -> None:
    write = savemat if version == "5" else write_mat73
    source = tmp_path / "source.mat"

    def refused(message: str, pde: str = "navier_stokes", size: int = 8) -> None:
        with pytest.raises(ValueError, match=message):
            import_fields([source], tmp_path / "out", pde, "test", size)

    write(source, official)
    refused("must hold f_data and psi_data, it has a, u; these are fields of navier_stokes", "helmholtz")
    refused("holds fields of 8x8, not a multiple of size=5", size=5)
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    refused("is truncated or")
    write(source, {"a": official["a"], "u": official["a"][:3]})
    refused(r"must hold a \[N, H, W\] and u")
    source.write_bytes(b"not a matlab file at all" * 40)
    refused("is truncated or not a MATLAB file")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def write_arrow(folder: Path, fields: np.ndarray, metadata: dict | None) -> None:
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(exist_ok=True)
    table = pa.table({"id": pa.array(range(len(fields)), pa.int32()), "data": pa.array(fields.tolist())})
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=2)
    if metadata is not None:
        (folder / "metadata.json").write_text(json.dumps(metadata))


def test_the_normalised_public_set_is_converted_to_physical_units(tmp_path: Path) -> None:
    fields = np.random.default_rng(0).standard_normal((5, 2, 8, 8))
    stats = {"mean": [0.0, 0.5], "std": [0.25, 2.0]}
    write_arrow(tmp_path / "helmholtz_test_hf", fields, {"name": "helmholtz", "stats": stats})
    path = import_fields([tmp_path / "helmholtz_test_hf"], tmp_path, "helmholtz", "test", size=8)
    expected = fields * np.array([0.25, 2.0]).reshape(2, 1, 1) / 0.5 + np.array([0, 0.5]).reshape(2, 1, 1)
    np.testing.assert_allclose(read_pairs(path), expected, rtol=1e-6, atol=1e-6)


def test_an_unusable_arrow_folder_is_refused(tmp_path: Path) -> None:
    folder, fields = tmp_path / "set", np.zeros((2, 2, 8, 8))
    write_arrow(folder, fields, None)

    def refused(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            import_fields([folder], tmp_path, "helmholtz", "test", size=8)

    refused("metadata.json does not exist", FileNotFoundError)
    good = {"mean": [0, 0], "std": [1, 1]}
    write_arrow(folder, fields, {"name": "ns-nonbounded", "stats": good})
    refused("metadata.json is about 'ns-nonbounded', not helmholtz")
    write_arrow(folder, fields[:, :1], {"name": "helmholtz", "stats": good})
    refused(r"must hold fields \[2, H, W\], got \[1, 8, 8\]")
    (folder / "data-00000-of-00001.arrow").write_bytes(b"nonsense" * 8)
    refused("is truncated or not an Arrow file")
