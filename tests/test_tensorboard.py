"""Pictures, curves and hyper-parameters of a run."""

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from callbacks import EquiReg, PredictionWriter, TensorBoardInspector
from callbacks.tensorboard import as_images, hyperparameters, to_picture
from equireg.operators import SuperResolution
from equireg.pictures import encode_png, from_uint8, picture_grid, to_uint8
from equireg.priors import Step
from equireg.runs import read_run
from tests.test_prediction_writer import Blur
from tests.tiny_run import TinyData, TinySampler, predict


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def board(run) -> EventAccumulator:
    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def files(run) -> set[str]:
    return {file.name for file in (run / "inspect").iterdir()}


def test_the_first_samples_leave_arrays_pictures_and_a_grid(run):
    predict(run, TensorBoardInspector(num_images=3))
    stems = {f"0000{i}_image-{i}" for i in range(3)}
    assert files(run) == {stem + suffix for stem in stems for suffix in (".npz", ".png")} | {"grid.png"}
    assert Image.open(run / "inspect" / "grid.png").size == (3 * 12, 3 * 12)  # truth, measurement, restoration
    assert Image.open(run / "inspect" / "00001_image-1.png").size == (3 * 12, 12)  # three steps


def test_the_grid_shows_truth_measurement_and_restoration(run):
    predict(run, TensorBoardInspector(num_images=2), PredictionWriter())
    grid = np.asarray(Image.open(run / "inspect" / "grid.png"))
    restored = np.asarray(Image.open(run / "predictions" / "00001_image-1.png"))
    assert np.array_equal(grid[12:, 24:], restored)
    truth = to_uint8(TinyData().dataset("test")[1]["x"])[0].numpy()
    assert np.array_equal(grid[12:, :12], truth)


def test_the_last_snapshot_is_the_restoration(run):
    predict(run, TensorBoardInspector(num_images=1))
    with np.load(run / "inspect" / "00000_image-0.npz") as arrays:
        assert np.array_equal(arrays["snapshots"][-1], arrays["restoration"])
        assert arrays["steps"].tolist() == [0, 1, 2]


def test_pictures_and_curves_reach_tensorboard(run):
    predict(run, EquiReg(Blur(), weight=0.0), TensorBoardInspector(num_images=2), PredictionWriter())
    events = board(run)
    assert set(events.Tags()["images"]) == {
        "truth - measurement - restoration",
        "trajectory/00000_image-0",
        "trajectory/00001_image-1",
    }
    for name in ("data_misfit", "equivariance_error"):
        scalars = events.Scalars(f"{name}/00001_image-1")
        assert [scalar.step for scalar in scalars] == [0, 1, 2]
        assert all(scalar.value > 0 for scalar in scalars)
    last = events.Scalars("data_misfit/00001_image-1")[-1].value
    assert last == pytest.approx(read_run(run).rows[1].metrics["data_misfit"], rel=1e-5)


def test_hyper_parameters_stand_beside_the_final_metrics(run):
    predict(run, TensorBoardInspector(num_images=1), PredictionWriter())
    events = board(run)
    assert {"metrics/psnr", "metrics/ssim", "metrics/data_misfit"} <= set(events.Tags()["scalars"])
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.parametrize("inspector_first", [True, False])
def test_the_order_of_inspector_and_writer_does_not_matter(run, inspector_first):
    callbacks = [TensorBoardInspector(num_images=1), PredictionWriter()]
    predict(run, *(callbacks if inspector_first else callbacks[::-1]))
    assert (run / "summary.json").exists()
    assert "metrics/psnr" in board(run).Tags()["scalars"]


def test_a_diverged_sample_is_shown_black_and_the_others_are_logged(run):
    with pytest.raises(RuntimeError, match="diverged"):
        predict(run, TensorBoardInspector(num_images=2), PredictionWriter(), sampler=TinySampler(diverges_at=(0,)))
    grid = np.asarray(Image.open(run / "inspect" / "grid.png"))
    assert grid[:12, 24:].max() == 0
    assert "metrics/psnr" in board(run).Tags()["scalars"]


def test_a_resumed_run_shows_the_samples_of_the_first_one_too(run):
    with pytest.raises(ArithmeticError):
        predict(
            run,
            TensorBoardInspector(),
            PredictionWriter(),
            sampler=TinySampler(raises_at=(2,)),
            data=TinyData(count=3, batch_size=1),
        )
    before = (run / "inspect" / "00000_image-0.npz").read_bytes()
    predict(run, TensorBoardInspector(), PredictionWriter(), data=TinyData(count=3, batch_size=1))
    assert (run / "inspect" / "00000_image-0.npz").read_bytes() == before
    assert Image.open(run / "inspect" / "grid.png").size == (36, 36)
    assert "trajectory/00000_image-0" in board(run).Tags()["images"]


def test_the_first_draw_of_each_measurement_is_inspected(run):
    predict(run, TensorBoardInspector(num_images=2), data=TinyData(count=3, draws=2))
    assert {name for name in files(run) if name.endswith(".npz")} == {f"0000{i}_image-{i}_draw0.npz" for i in (0, 1)}


def test_steps_that_are_not_recorded_cost_nothing(run):
    class Counting(TinySampler):
        def emit(self, step, x0_hat):
            calls["operator"] = 0
            super().emit(step, x0_hat)
            calls[step.k] = calls["operator"]

    calls = {"operator": 0}
    sampler = Counting(num_steps=5)
    forward = type(sampler.operator).forward

    class Counted(type(sampler.operator)):
        def forward(self, x):
            calls["operator"] += 1
            return forward(self, x)

    sampler.operator.__class__ = Counted
    predict(run, TensorBoardInspector(num_images=2, every_steps=3), sampler=sampler, data=TinyData(count=2))
    assert {k: n for k, n in calls.items() if k != "operator"} == {0: 1, 1: 0, 2: 0, 3: 1, 4: 1}


def test_about_eight_steps_are_recorded():
    recorded = {
        n: [k for k in range(n) if TensorBoardInspector()._is_recorded(Step(k, n, alpha_bar=0.5, beta=0.0))]
        for n in (1, 5, 100, 1000)
    }
    assert recorded[1] == [0]
    assert recorded[5] == [0, 1, 2, 3, 4]
    assert recorded[1000] == [0, 125, 250, 375, 500, 625, 750, 875, 999]
    assert len(recorded[100]) in (8, 9)


def test_small_measurements_are_enlarged_by_their_nearest_pixels(run):
    predict(run, TensorBoardInspector(num_images=1), sampler=TinySampler(SuperResolution(factor=2)))
    with np.load(run / "inspect" / "00000_image-0.npz") as arrays:
        measurement = arrays["measurement"][0]
    assert measurement.shape == (12, 12)
    assert np.array_equal(measurement, measurement[::2, ::2].repeat(2, 0).repeat(2, 1))


def test_measurements_that_are_no_images_are_left_out():
    assert as_images(torch.zeros(2, 7), (3, 8, 8)) is None
    assert as_images(torch.zeros(2, 1, 4, 4), (3, 8, 8)).shape == (2, 3, 8, 8)


def test_without_a_truth_the_grid_has_two_columns(run):
    predict(run, TensorBoardInspector(num_images=2), data=TinyData(is_given=True))
    assert Image.open(run / "inspect" / "grid.png").size == (24, 24)


def test_latent_estimates_are_decoded_and_their_own_equivariance_error_is_recorded(run):
    class LatentBlur(Blur):
        space = "latent"

        def forward(self, z):
            assert z.shape[1:] == (1, 6, 6)
            return super().forward(z)

    class Latent(TinySampler):
        space = "latent"

        def emit(self, step, x0_hat):
            super().emit(step, x0_hat[:, :, ::2, ::2])

    sampler = Latent()
    sampler.prior.decode = lambda z: nn.functional.interpolate(z, scale_factor=2)
    sampler.prior.encode = lambda x: x[:, :, ::2, ::2]
    sampler.prior.latent_shape = lambda shape: (1, 6, 6)
    predict(run, EquiReg(LatentBlur(), weight=0.0), TensorBoardInspector(num_images=1), sampler=sampler)
    assert Image.open(run / "inspect" / "00000_image-0.png").size == (36, 12)
    with np.load(run / "inspect" / "00000_image-0.npz") as arrays:
        assert arrays["equivariance_error"].shape == (3,)


def test_a_run_without_a_tensorboard_logger_gets_event_files_all_the_same(run):
    predict(run, TensorBoardInspector(num_images=1), PredictionWriter(), logger=False, default_root_dir=run)
    assert "metrics/psnr" in board(run).Tags()["scalars"]


def test_the_listener_is_gone_after_a_run_and_after_a_crash(run):
    for sampler in (TinySampler(), TinySampler(raises_at=(0,))):
        with suppress(ArithmeticError):
            predict(run, TensorBoardInspector(), sampler=sampler)
        assert sampler.listeners == []


def test_hyper_parameters_come_from_the_resolved_configuration(run):
    run.mkdir()
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_modules.DPS",
            "init_args": {
                "zeta": 0.3,
                "prior": {
                    "class_path": "equireg.priors.VPPrior",
                    "init_args": {"weights": "w.safetensors", "clip": None},
                },
                "operator": {"class_path": "equireg.operators.BoxInpainting", "init_args": {"margin": [4, 4]}},
            },
        },
        "data": {"class_path": "datamodules.Faces", "init_args": {"limit": 4}},
        "trainer": {
            "callbacks": [
                {"class_path": "callbacks.PredictionWriter", "init_args": {"save_png": True}},
                {"class_path": "callbacks.EquiReg", "init_args": {"weight": 0.1}},
            ]
        },
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert hyperparameters(run, None, None) == {
        "sampler": "DPS",
        "sampler.zeta": 0.3,
        "sampler.prior": "VPPrior",
        "sampler.prior.weights": "w.safetensors",
        "sampler.operator": "BoxInpainting",
        "sampler.operator.margin": "[4, 4]",
        "data": "Faces",
        "data.limit": 4,
        "EquiReg": "EquiReg",
        "EquiReg.weight": 0.1,
    }


@pytest.mark.parametrize("arguments", [{"num_images": 0}, {"every_steps": 0}])
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        TensorBoardInspector(**arguments)


def test_eight_bit_values_are_rounded_clipped_and_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert to_uint8(torch.tensor([-3.0, 3.0, -1 + 1.6 / 127.5])).tolist() == [0, 255, 2]


def test_a_png_is_grey_or_rgb():
    assert Image.open(io.BytesIO(encode_png(torch.zeros(3, 4, 6, dtype=torch.uint8)))).mode == "RGB"
    grey = Image.open(io.BytesIO(encode_png(torch.zeros(1, 4, 6, dtype=torch.uint8))))
    assert (grey.mode, grey.size) == ("L", (6, 4))
    with pytest.raises(ValueError, match="1 or 3"):
        encode_png(torch.zeros(2, 4, 6, dtype=torch.uint8))


def test_a_grid_fills_its_rows_from_left_to_right():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(-1, 1, 2, 2)
    grid = picture_grid(images, columns=3)
    assert grid.shape == (1, 4, 6)
    assert grid[0, ::2, ::2].flatten().tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0])


def test_fields_show_channel_below_channel():
    field = torch.stack([torch.full((2, 3), -1.0), torch.full((2, 3), torch.nan)])
    assert to_picture(field).shape == (1, 4, 3)
    assert to_picture(field).max() == 0
