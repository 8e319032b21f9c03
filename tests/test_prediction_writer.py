"""What a run leaves behind, and how a stopped one goes on."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import equireg.perceptual
import equireg.runs
from callbacks import EquiReg, PredictionWriter
from equireg.metrics import psnr
from equireg.mpe import MPE
from equireg.operators import RandomInpainting, SuperResolution
from equireg.runs import read_run
from tests.tiny_run import SHAPE, STEPS, TinyData, TinySampler, predict


class Blur(MPE):
    """An MPE function: a fixed blur with an asymmetric kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.tensor([[[[1.0, 2.0, 0.0]]]]))

    def forward(self, x):
        return nn.functional.conv2d(x, self.kernel, padding=(0, 1))


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_every_sample_leaves_a_picture_an_array_a_measurement_and_a_row(run):
    predict(run, PredictionWriter())
    stems = [f"{i:05d}_image-{i}" for i in range(5)]
    assert files(run / "predictions") == {stem + suffix for stem in stems for suffix in (".png", ".npy")}
    assert files(run / "measurements") == {f"{stem}.npz" for stem in stems}
    assert files(run / "rows") == {f"{stem}.json" for stem in stems}
    restored = np.load(run / "predictions" / f"{stems[3]}.npy")
    assert restored.shape == SHAPE
    assert restored.dtype == np.float32
    pixels = np.asarray(Image.open(run / "predictions" / f"{stems[3]}.png"))
    assert np.array_equal(pixels, np.clip(np.round((restored[0] + 1) * 127.5), 0, 255))
    with np.load(run / "measurements" / f"{stems[3]}.npz") as measurement:
        assert measurement["y"].shape == SHAPE
        assert set(np.unique(measurement["mask"])) == {0, 1}


def test_the_table_has_a_sorted_row_of_numbers_for_every_sample(run):
    predict(run, PredictionWriter())
    rows = list(csv.DictReader(io.StringIO((run / "metrics.csv").read_text())))
    assert [row["index"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert list(rows[0]) == [
        *("index", "draw", "name", "psnr", "ssim"),
        *("seconds", "network_evaluations", "network_backwards", "data_misfit"),
        *("equivariance_error", "equivariance_error_before", "measurement"),
    ]
    truth = TinyData().dataset("test")[2]["x"]
    restored = torch.from_numpy(np.load(run / "predictions" / "00002_image-2.npy"))
    assert float(rows[2]["psnr"]) == pytest.approx(psnr(restored[None], truth[None]).item())
    assert rows[2]["network_evaluations"] == str(STEPS)
    assert rows[2]["equivariance_error"] == ""  # no regulariser measures it
    assert len({row["measurement"] for row in rows}) == 5


def test_the_table_is_one_that_compare_reads(run):
    predict(run, PredictionWriter())
    assert [row.index for row in read_run(run).rows] == [0, 1, 2, 3, 4]


def test_a_regulariser_adds_the_equivariance_error_before_and_after(run):
    predict(run, EquiReg(Blur(), weight=0.0), PredictionWriter(metrics=["psnr"]))
    rows = read_run(run).rows
    assert all(row.metrics["equivariance_error"] > 0 for row in rows)
    assert all(row.metrics["equivariance_error_before"] > 0 for row in rows)


def test_the_summary_says_what_was_measured_and_with_what(run):
    predict(run, PredictionWriter())
    summary = summary_of(run)
    values = [row.metrics["psnr"] for row in read_run(run).rows]
    statistics = summary["metrics"]["psnr"]
    assert statistics["mean"] == pytest.approx(np.mean(values))
    assert statistics["std"] == pytest.approx(np.std(values, ddof=1))
    assert statistics["n"] == 5
    low, high = statistics["interval_95"]
    assert low < statistics["mean"] < high
    assert summary["counts"] == {
        **{"expected": 5, "written": 5, "found_finished": 0},
        **{"unreadable": {}, "diverged": [], "missing": []},
    }
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["processes"] == 1
    assert {"git_commit", "hardware", "seconds"} <= set(summary)


def test_draws_have_files_of_their_own_and_are_averaged_in_the_summary(run):
    predict(run, PredictionWriter(metrics=["psnr"], save_png=False), data=TinyData(count=2, draws=2))
    assert files(run / "predictions") == {f"0000{i}_image-{i}_draw{k}.npy" for i in (0, 1) for k in (0, 1)}
    rows = read_run(run).rows
    assert [(row.index, row.draw) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows[0].measurement == rows[1].measurement
    assert not np.array_equal(*(np.load(run / "predictions" / f"00000_image-0_draw{k}.npy") for k in (0, 1)))
    averages = [np.mean([row.metrics["psnr"] for row in rows if row.index == i]) for i in (0, 1)]
    statistics = summary_of(run)["metrics"]["psnr"]
    assert statistics["n"] == 2
    assert statistics["std"] == pytest.approx(np.std(averages, ddof=1))


def test_given_measurements_have_no_truth_to_measure_against(run, capsys):
    predict(run, PredictionWriter(), data=TinyData(is_given=True))
    assert set(read_run(run).columns) == {
        *("seconds", "network_evaluations", "network_backwards", "data_misfit"),
        *("equivariance_error", "equivariance_error_before"),
    }
    assert "without a truth there is no psnr, ssim" in capsys.readouterr().out


def test_a_run_restores_only_what_is_not_finished(run):
    predict(run, PredictionWriter())
    before = np.load(run / "predictions" / "00001_image-1.npy")
    untouched = (run / "rows" / "00000_image-0.json").stat().st_mtime_ns
    (run / "rows" / "00001_image-1.json").unlink()
    (run / "predictions" / "00003_image-3.png").unlink()
    (run / "rows" / "00004_image-4.json").write_text("{damaged")
    sampler = TinySampler()
    predict(run, PredictionWriter(), sampler=sampler)
    assert sampler.restored == [(1, 0), (3, 0), (4, 0)]
    assert np.array_equal(np.load(run / "predictions" / "00001_image-1.npy"), before)
    assert (run / "rows" / "00000_image-0.json").stat().st_mtime_ns == untouched
    counts = summary_of(run)["counts"]
    assert (counts["written"], counts["found_finished"]) == (3, 2)
    assert summary_of(run)["metrics"]["psnr"]["n"] == 5


def test_a_finished_run_restores_nothing_and_writes_its_tables_again(run, capsys):
    predict(run, PredictionWriter())
    table = (run / "metrics.csv").read_text()
    (run / "metrics.csv").unlink()
    (run / "summary.json").unlink()
    capsys.readouterr()
    sampler = TinySampler()
    predict(run, PredictionWriter(), sampler=sampler)
    assert sampler.restored == []
    assert (run / "metrics.csv").read_text() == table
    assert summary_of(run)["counts"]["found_finished"] == 5
    message = capsys.readouterr().out
    assert "0 samples restored now, 5 found finished" in message
    assert f"tensorboard --logdir {run.parent}" in message


def test_a_metric_asked_for_later_is_computed_from_the_saved_restorations(run):
    predict(run, PredictionWriter(metrics=["psnr"]))
    sampler = TinySampler()
    predict(run, PredictionWriter(metrics=["psnr", "ssim"]), sampler=sampler)
    assert sampler.restored == []
    rows = read_run(run).rows
    predict(run.with_name("at_once"), PredictionWriter(metrics=["psnr", "ssim"]))
    for row, expected in zip(rows, read_run(run.with_name("at_once")).rows, strict=True):
        assert row.metrics["ssim"] == pytest.approx(expected.metrics["ssim"], abs=1e-5)
    assert "ssim" in json.loads((run / "rows" / "00000_image-0.json").read_text())


def test_a_crash_leaves_what_was_finished_and_nothing_half_written(run, capsys):
    with pytest.raises(ArithmeticError):
        predict(run, PredictionWriter(), sampler=TinySampler(raises_at=(2,)), data=TinyData(batch_size=1))
    assert files(run / "rows") == {"00000_image-0.json", "00001_image-1.json"}
    assert not list(run.rglob(".*"))
    assert "the same command goes on from it" in capsys.readouterr().out
    assert not (run / "metrics.csv").exists()
    sampler = TinySampler()
    predict(run, PredictionWriter(), sampler=sampler, data=TinyData(batch_size=1))
    assert sampler.restored == [(2, 0), (3, 0), (4, 0)]


def test_what_a_killed_run_left_half_written_is_removed(run):
    stray = run / "predictions" / ".0123456789abcdef.tmp"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")
    predict(run, PredictionWriter())
    assert not stray.exists()


def test_a_diverged_sample_is_reported_after_everything_else_was_written(run, capsys):
    with pytest.raises(RuntimeError, match=r"1 of 5 samples diverged, .* 00003 image 3 \(draw 0\)"):
        predict(run, PredictionWriter(), sampler=TinySampler(diverges_at=(3,)))
    assert [row.index for row in read_run(run).rows] == [0, 1, 2, 4]
    assert "00003_image-3.npy" not in files(run / "predictions")
    assert summary_of(run)["counts"]["diverged"] == [[3, 0, "image 3"]]
    message = capsys.readouterr().out
    assert "1 diverged" in message
    assert "stopped" not in message


def test_unreadable_samples_are_counted_with_their_reason(run, capsys):
    data = TinyData()
    data.unreadable = {"broken": "truncated"}
    predict(run, PredictionWriter(), data=data)
    assert summary_of(run)["counts"]["unreadable"] == {"broken": "truncated"}
    assert summary_of(run)["counts"]["expected"] == 6
    assert "left out: broken (truncated)" in capsys.readouterr().out


def test_a_sample_that_vanished_is_an_error(run, monkeypatch):
    written = PredictionWriter._write_sample

    def forgetful(writer, stem, *rest):
        if not stem.startswith("00001"):
            written(writer, stem, *rest)

    monkeypatch.setattr(PredictionWriter, "_write_sample", forgetful)
    with pytest.raises(RuntimeError, match=r"lacks 1 of 5 samples: 00001 \(draw 0\)"):
        predict(run, PredictionWriter())


def test_a_run_limited_by_the_trainer_is_not_blamed_for_the_rest(run):
    predict(run, PredictionWriter(), limit_predict_batches=1)
    assert len(summary_of(run)["counts"]["missing"]) == 3


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(run, monkeypatch):
    def refuse(path, content):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("callbacks.prediction_writer.atomic_write", refuse)
    sampler = TinySampler()
    with pytest.raises(PermissionError, match=f"the folder {run} cannot be written"):
        predict(run, PredictionWriter(), sampler=sampler)
    assert sampler.restored == []


@pytest.mark.parametrize("lost", ["predictions", "measurements"])
def test_a_sample_whose_files_are_not_all_written_has_no_row(run, monkeypatch, lost):
    def full(path, content):
        if path.parent.name == lost:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    write = equireg.runs.atomic_write
    monkeypatch.setattr("callbacks.prediction_writer.atomic_write", full)
    with pytest.raises(OSError, match="No space left on device"):
        predict(run, PredictionWriter())
    assert not (run / "rows").exists()


def test_a_full_disk_stops_the_run_and_leaves_what_was_finished(run, monkeypatch):
    def full(source, target):
        if "00002" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    replace = os.replace
    monkeypatch.setattr(equireg.runs.os, "replace", full)
    with pytest.raises(OSError, match=f"into {run} \\(No space left on device\\)") as error:
        predict(run, PredictionWriter())
    assert error.value.errno == errno.ENOSPC
    assert files(run / "rows") == {"00000_image-0.json", "00001_image-1.json"}
    assert not list(run.rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["psnr", "mse"]}, "metrics: 'mse' is unknown; available: psnr, ssim"),
        ({"metrics": ["fid"], "save_npy": False}, "they need save_npy=true"),
        ({"save_png": False, "save_npy": False}, "would leave no restoration"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PredictionWriter(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 8, 8), "metric 'ssim' cannot be computed of images"), ((2, 12, 12), "save_png=true: images of 2 channels")],
)
def test_images_that_do_not_fit_are_refused_before_the_first_step(run, shape, message):
    sampler = TinySampler()
    with pytest.raises(ValueError, match=message):
        predict(run, PredictionWriter(), sampler=sampler, data=TinyData(shape=shape))
    assert sampler.restored == []


def test_measurements_of_another_shape_than_the_images_are_saved(run):
    predict(run, PredictionWriter(), sampler=TinySampler(SuperResolution(factor=2)))
    with np.load(run / "measurements" / "00000_image-0.npz") as measurement:
        assert measurement["y"].shape == (1, 6, 6)
        assert measurement.files == ["y"]


def test_missing_weights_of_a_metric_stop_the_run_before_the_first_step(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("a download"))
    for metric in ("lpips", "fid", "kid"):
        sampler = TinySampler()
        with pytest.raises(FileNotFoundError, match=f"metric '{metric}' needs"):
            predict(run, PredictionWriter(metrics=[metric]), sampler=sampler)
        assert sampler.restored == []


def test_lpips_is_a_column_and_fid_and_kid_are_numbers_of_the_whole_run(run, monkeypatch):
    class Means(nn.Module):
        def forward(self, images):
            assert images.dtype == torch.uint8
            assert images.shape[1:] == (3, 12, 12)
            return images.float().mean((2, 3))

    class Difference:
        def to(self, device):
            return self

        def __call__(self, x_hat, x):
            return (x_hat - x).abs().mean((1, 2, 3))

    monkeypatch.setattr("callbacks.prediction_writer.check_backbone", lambda *names: None)
    monkeypatch.setattr("callbacks.prediction_writer.LPIPS", lambda net: Difference())
    monkeypatch.setattr(equireg.perceptual, "inception", Means)
    predict(run, PredictionWriter(metrics=["psnr", "lpips", "fid", "kid"]), data=TinyData(count=3, draws=2))
    metrics = summary_of(run)["metrics"]
    assert metrics["lpips"]["n"] == 3
    assert metrics["fid"]["n"] == metrics["kid"]["n"] == 3
    assert metrics["fid"]["mean"] > 0
    assert "lpips" in read_run(run).columns
    assert "fid" not in read_run(run).columns


def test_fid_of_one_image_is_refused_before_the_first_step(run):
    with pytest.raises(ValueError, match="fid need at least 2 images"):
        predict(run, PredictionWriter(metrics=["fid"]), data=TinyData(count=1))


def test_the_operator_is_drawn_again_for_a_resumed_sample(run):
    """The saved mask is the one a fresh operator draws for this index, whatever was restored before it."""
    predict(run, PredictionWriter(), sampler=TinySampler(RandomInpainting((0.5, 0.6))))
    with np.load(run / "measurements" / "00004_image-4.npz") as measurement:
        mask = measurement["mask"]
    (run / "rows" / "00004_image-4.json").unlink()
    predict(run, PredictionWriter(), sampler=TinySampler(RandomInpainting((0.5, 0.6))))
    with np.load(run / "measurements" / "00004_image-4.npz") as measurement:
        assert np.array_equal(measurement["mask"], mask)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(run, tmp_path):
    """Five samples on two processes; then one that is missing, so that a process has nothing to do; then none."""
    predict(tmp_path / "alone", PredictionWriter())
    answer = subprocess.run(
        [sys.executable, "-m", "tests.two_processes", str(run)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    first, second, third = (json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{"))
    assert (first["written"], first["found_finished"]) == (5, 0)
    assert (second["written"], second["found_finished"]) == (1, 4)
    assert (third["written"], third["found_finished"]) == (0, 5)
    together, alone = read_run(run), read_run(tmp_path / "alone")
    assert [row.index for row in together.rows] == [0, 1, 2, 3, 4]
    for row, expected in zip(together.rows, alone.rows, strict=True):
        assert row.measurement == expected.measurement
        assert row.metrics["psnr"] == pytest.approx(expected.metrics["psnr"], abs=1e-4)  # float32, other batches
    assert summary_of(run)["processes"] == 2
    assert (
        len(files(run / "inspect")) == 2 * 5 + 1
    )  # an array and a picture of every sample, whoever restored it; the grid
