"""The contract of the data modules: samples, shares of processes, and errors before the work starts."""

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image

from datamodules import FFHQ, Faces, ImageFolder, ImageNet, Packed, pack
from datamodules.base import split_of
from datamodules.pack import pack_command
from datamodules.pictures import prepare, read_picture
from equireg.operators import BoxInpainting, GaussianDeblur, MotionDeblur, SuperResolution

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "data").glob("*.yaml"))
INFO_LOGGER = "lightning.pytorch.utilities.rank_zero"


class Prior:
    """A prior for images of one size, which takes others whose sides are multiples of 8."""

    def __init__(self, channels: int = 3, side: int = 16) -> None:
        self.image_shape = (channels, side, side)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        if shape[0] != self.image_shape[0] or shape[1] % 8 or shape[2] % 8:
            raise ValueError(f"the prior cannot take images of {shape}")


def trainer_for(prior=None, operator=None, world_size: int = 1, rank: int = 0) -> SimpleNamespace:
    module = SimpleNamespace(prior=prior or Prior(), operator=operator)
    return SimpleNamespace(world_size=world_size, global_rank=rank, lightning_module=module)


def set_up(data, stage: str = "predict", **trainer):
    data.trainer = trainer_for(**trainer)
    data.setup(stage)
    return data


def restored(data) -> list[dict]:
    """The samples that predict is given, out of their batches."""
    return [
        {"index": int(batch["index"][i]), "draw": int(batch["draw"][i]), "name": batch["name"][i]}
        | {key: batch[key][i] for key in ("x", "y") if key in batch}
        for batch in data.predict_dataloader()
        for i in range(len(batch["index"]))
    ]


def save_picture(file: Path, size: tuple[int, int] = (16, 16), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """Writes random pixels, size (H, W), and returns them."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.RandomState(seed).randint(0, 256, (*size, bands)).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new(mode, size[::-1])
    picture.putdata([tuple(p) if bands > 1 else int(p[0]) for p in pixels.reshape(-1, bands)])
    picture.save(file)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures a.png to e.png."""
    for seed, name in enumerate("abcde"):
        save_picture(tmp_path / "pictures" / f"{name}.png", seed=seed)
    return tmp_path / "pictures"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    file = tmp_path / "images.h5"
    with h5py.File(file, "w") as f:
        for split, count in (("train", 6), ("val", 3), ("test", 5)):
            f[f"{split}/images"] = np.random.RandomState(count).randint(0, 256, (count, 1, 16, 16), dtype=np.uint8)
    return file


# samples


def test_a_clean_picture_comes_with_index_draw_name_and_x_between_minus_one_and_one(folder):
    pixels = save_picture(folder / "b.png", seed=9)
    samples = restored(set_up(ImageFolder(str(folder), batch_size=2)))
    assert [(s["index"], s["draw"], s["name"]) for s in samples] == [(i, 0, name) for i, name in enumerate("abcde")]
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(samples[1]["x"], expected)
    assert samples[1]["x"].dtype == torch.float32


def test_pictures_of_all_kinds_are_found_in_subfolders_and_sorted_by_path(tmp_path):
    names = ["z.png", "b/c.JPEG", "b/a.jpg", "a/x.webp", "a/w.BMP", "q.tif", "r.jpeg"]
    for name in names:
        save_picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "._z.png").write_bytes(b"hidden files of other systems are no pictures")
    samples = restored(set_up(ImageFolder(str(tmp_path))))
    assert [s["name"] for s in samples] == [Path(name).stem for name in sorted(names)]


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1"])
def test_pictures_of_every_colour_mode_become_rgb(mode, tmp_path):
    if mode == "CMYK":
        file = tmp_path / "x.jpg"
        save_picture(file, mode=mode)
    elif mode == "1":
        file = tmp_path / "x.png"
        Image.new("1", (16, 16), 1).save(file)
    else:
        file = tmp_path / "x.png"
        save_picture(file, mode=mode)
    (sample,) = restored(set_up(ImageFolder(str(tmp_path))))
    assert sample["x"].shape == (3, 16, 16)
    assert sample["x"].abs().max() <= 1


def test_alpha_is_dropped_without_blending(tmp_path):
    pixels = save_picture(tmp_path / "x.png", mode="RGBA")
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "x.png", channels=3)), pixels[..., :3])


def test_sixteen_bit_grey_pictures_keep_their_range(tmp_path):
    Image.fromarray(np.array([[0, 0x7FFF], [0x8000, 0xFFFF]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(read_picture(tmp_path / "x.png", channels=1)).tolist() == [[0, 127], [128, 255]]


def test_colours_become_grey_for_a_grey_prior_and_this_is_said_once(folder, caplog):
    data = ImageFolder(str(folder))
    with caplog.at_level(logging.INFO, logger=INFO_LOGGER):
        set_up(data, prior=Prior(channels=1))
        set_up(data, prior=Prior(channels=1))
    assert [r.message for r in caplog.records if "grey" in r.message] == [
        "5 of 5 pictures are in colour and are converted to grey (ITU-R 601)"
    ]
    assert restored(data)[0]["x"].shape == (1, 16, 16)


def test_grey_pictures_are_repeated_for_a_colour_prior_without_a_word(tmp_path, caplog):
    save_picture(tmp_path / "x.png", mode="L")
    with caplog.at_level(logging.INFO, logger=INFO_LOGGER):
        (sample,) = restored(set_up(ImageFolder(str(tmp_path))))
    assert not [r for r in caplog.records if "grey" in r.message]
    assert torch.equal(sample["x"][0], sample["x"][2])


@pytest.mark.parametrize("preprocess", ["daps", "adm", "box"])
@pytest.mark.parametrize("size", [(40, 16), (16, 40), (50, 33), (7, 9), (16, 16)])
def test_every_picture_is_brought_to_the_size_of_the_prior(preprocess, size, tmp_path):
    save_picture(tmp_path / "x.png", size=size)
    (sample,) = restored(set_up(ImageFolder(str(tmp_path), preprocess=preprocess)))
    assert sample["x"].shape == (3, 16, 16)
    assert sample["x"].abs().max() <= 1


@pytest.mark.parametrize("preprocess", ["daps", "adm", "box", "none"])
def test_a_picture_of_the_right_size_is_not_changed(preprocess, tmp_path):
    pixels = save_picture(tmp_path / "x.png")
    x = prepare(read_picture(tmp_path / "x.png", channels=3), (16, 16), preprocess)
    torch.testing.assert_close(x, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)


def test_box_is_the_area_mean_of_whole_blocks(tmp_path):
    pixels = save_picture(tmp_path / "x.png", size=(64, 64))
    x = prepare(read_picture(tmp_path / "x.png", channels=3), (16, 16), "box")
    mean = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3)).transpose(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(x, torch.from_numpy(mean).float(), rtol=0, atol=1.01 / 127.5)  # Pillow rounds twice


def test_image_size_may_differ_from_the_prior_and_need_not_be_square(folder):
    data = set_up(ImageFolder(str(folder), image_size=(24, 32)))
    assert data.image_shape == (3, 24, 32)
    assert restored(data)[0]["x"].shape == (3, 24, 32)


def test_preprocess_none_keeps_the_size_of_the_pictures(tmp_path):
    save_picture(tmp_path / "x.png", size=(24, 40))
    data = set_up(ImageFolder(str(tmp_path), preprocess="none"))
    assert data.image_shape == (3, 24, 40)
    assert restored(data)[0]["x"].shape == (3, 24, 40)


# shares, draws, resume


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 2, 4, None])
@pytest.mark.parametrize("stage", ["predict", "test", "validate"])
def test_processes_share_the_samples_without_gap_or_repeat(world_size, limit, stage, packed):
    seen, expected = [], set()
    for rank in range(world_size):
        data = Faces(str(packed), limit=limit, batch_size=2)
        set_up(data, stage, prior=Prior(1), world_size=world_size, rank=rank)
        loader = {"predict": data.predict_dataloader, "test": data.test_dataloader, "validate": data.val_dataloader}
        seen += [index for batch in loader[stage]() for index in batch["index"].tolist()]
        count = {"predict": min(limit or 5, 5), "test": 5, "validate": 3}[stage]
        expected = set(range(count))
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_shuffles_and_gives_every_process_as_many_batches(world_size, packed):
    indices = []
    for rank in range(world_size):
        data = set_up(Faces(str(packed), batch_size=2), "fit", prior=Prior(1), world_size=world_size, rank=rank)
        batches = [batch["index"].tolist() for batch in data.train_dataloader()]
        assert len(batches) == 3 // world_size
        indices += [index for batch in batches for index in batch]
    assert len(set(indices)) == len(indices)


def test_the_draws_of_a_measurement_differ_in_draw_alone(folder):
    data = set_up(ImageFolder(str(folder), draws=3, limit=2, batch_size=2))
    samples = restored(data)
    assert [(s["index"], s["draw"]) for s in samples] == [(i, d) for i in range(2) for d in range(3)]
    assert data.samples().keys() == [(i, d) for i in range(2) for d in range(3)]
    assert torch.equal(samples[0]["x"], samples[2]["x"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_finished_samples_are_left_out_and_still_expected(world_size, folder):
    finished = {(0, 0), (0, 1), (3, 1)}
    seen = []
    for rank in range(world_size):
        data = set_up(ImageFolder(str(folder), draws=2), world_size=world_size, rank=rank)
        data.exclude(finished)
        seen += [(s["index"], s["draw"]) for s in restored(data)]
        assert len(data.samples().keys()) == 10
    assert sorted(seen) == [key for key in data.samples().keys() if key not in finished]  # noqa: SIM118


def test_a_run_that_is_finished_has_nothing_pending(folder):
    data = set_up(ImageFolder(str(folder)))
    data.exclude(data.samples().keys())
    assert len(data.pending()) == 0
    assert restored(data) == []


def test_samples_are_the_same_with_loader_processes(folder):
    alone = restored(set_up(ImageFolder(str(folder))))
    helped = restored(set_up(ImageFolder(str(folder), num_workers=1)))
    assert [s["name"] for s in helped] == [s["name"] for s in alone]
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(alone, helped, strict=True))


# damaged and missing files


@pytest.mark.parametrize("damage", ["empty", "text", "truncated png", "truncated jpeg", "32 bit"])
def test_a_damaged_picture_is_reported_and_left_out_and_the_others_keep_their_index(damage, folder):
    bad = folder / "b2.png"
    if damage == "truncated jpeg":
        bad = folder / "b2.jpg"
        save_picture(bad, size=(64, 64))
    elif damage == "truncated png":
        save_picture(bad, size=(64, 64))
    elif damage == "32 bit":
        bad = folder / "b2.tif"
        Image.new("F", (16, 16), 0.5).save(bad)
    if damage.startswith("truncated"):
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    elif damage != "32 bit":
        bad.write_bytes(b"" if damage == "empty" else b"not a picture")
    with pytest.warns(UserWarning, match=r"1 of 6 files cannot be read and are skipped: 'b2\."):
        data = set_up(ImageFolder(str(folder)))
    assert list(data.unreadable) == ["b2"]
    assert data.unreadable["b2"]
    assert [(s["index"], s["name"]) for s in restored(data)] == [(0, "a"), (1, "b"), (3, "c"), (4, "d"), (5, "e")]
    assert data.samples().keys() == [(i, 0) for i in (0, 1, 3, 4, 5)]


def test_a_damaged_picture_counts_within_the_limit_and_beyond_it_is_not_looked_at(folder):
    (folder / "b.png").write_bytes(b"damaged")
    (folder / "e.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="1 of 3 files"):
        data = set_up(ImageFolder(str(folder), limit=3))
    assert [s["name"] for s in restored(data)] == ["a", "c"]


def test_damaged_pictures_of_equal_names_are_all_listed(folder):
    for place in ("x", "y"):
        (folder / place).mkdir()
        (folder / place / "bad.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="2 of 7"):
        data = set_up(ImageFolder(str(folder)))
    assert len(data.unreadable) == 2


def test_a_folder_without_readable_pictures_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="none of 1 files can be read"):
        set_up(ImageFolder(str(tmp_path)))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root='.*nowhere' must be an existing folder"):
        set_up(ImageFolder(str(tmp_path / "nowhere")))


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="holds no file that ends in"):
        set_up(ImageFolder(str(tmp_path)))


def test_a_size_that_the_prior_cannot_take_is_refused_at_setup(folder):
    with pytest.raises(ValueError, match="the prior cannot take"):
        set_up(ImageFolder(str(folder), image_size=20))


def test_an_image_that_the_operator_cannot_measure_is_refused_at_setup(folder):
    with pytest.raises(ValueError, match="a box of up to 128 pixels"):
        set_up(ImageFolder(str(folder)), operator=BoxInpainting())


def test_pictures_of_two_sizes_are_refused_without_preprocessing(folder):
    save_picture(folder / "f.png", size=(24, 16))
    with pytest.raises(ValueError, match=r"'f.png' is 24x16 and 'a.png' 16x16"):
        set_up(ImageFolder(str(folder), preprocess="none"))


def test_another_split_can_be_read_in_any_stage(folder):
    (folder / "a.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="cannot be read"):
        data = set_up(ImageFolder(str(folder), val_percent=1, predict_split="train"))
    with pytest.warns(UserWarning, match="cannot be read"):
        assert len(data.dataset("test")) == 4
    assert list(data.unreadable) == ["a"]
    assert data.dataset("test")[0]["x"].shape == data.image_shape


def test_a_model_without_prior_needs_size_and_channels(folder):
    data = ImageFolder(str(folder), image_size=8)
    with pytest.raises(ValueError, match="channels must be given"):
        data.setup("predict")
    data = ImageFolder(str(folder), channels=1)
    with pytest.raises(ValueError, match="image_size must be given"):
        data.setup("predict")
    data = ImageFolder(str(folder), channels=1, image_size=8)
    data.setup("predict")
    assert restored(data)[0]["x"].shape == (1, 8, 8)


@pytest.mark.parametrize(
    "argument",
    [
        {"batch_size": 0},
        {"num_workers": -1},
        {"limit": 0},
        {"draws": 0},
        {"image_size": 0},
        {"channels": 2},
        {"val_percent": 0},
        {"mode": "guess"},
        {"masks": "mask.png"},
        {"kernels": "kernel.png"},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_arguments_out_of_range_are_refused_by_name(argument, tmp_path):
    with pytest.raises(ValueError, match=next(iter(argument))):
        ImageFolder(str(tmp_path), **argument)


# given measurements


def given(folder: Path, operator, prior=None, **options):
    return set_up(ImageFolder(str(folder), mode="given", **options), prior=prior, operator=operator)


def test_given_measurements_come_in_their_own_size_without_ground_truth(folder):
    pixels = save_picture(folder / "a.png", seed=7)
    data = given(folder, SuperResolution(), prior=Prior(side=64), batch_size=2)
    batch = next(iter(data.predict_dataloader()))
    assert "x" not in batch
    assert batch["parameters"] == {}
    assert batch["y"].shape == (2, 3, 16, 16)
    assert data.image_shape == (3, 64, 64)
    torch.testing.assert_close(batch["y"][0], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)


def test_given_arrays_keep_their_units(tmp_path):
    y = np.random.RandomState(0).randn(3, 16, 16).astype(np.float64) * 40
    np.save(tmp_path / "y.npy", y)
    (sample,) = restored(given(tmp_path, GaussianDeblur(kernel_size=9)))
    torch.testing.assert_close(sample["y"], torch.from_numpy(y).float())


@pytest.mark.parametrize("array", [np.zeros((3, 16, 16), np.uint8), np.zeros((16, 16)), np.full((3, 16, 16), np.nan)])
def test_given_arrays_of_another_kind_are_reported(array, folder):
    np.save(folder / "f.npy", array)
    with pytest.warns(UserWarning, match="1 of 6 files cannot be read"):
        data = given(folder, GaussianDeblur(kernel_size=9))
    assert "the array" in data.unreadable["f"]


def test_given_masks_do_not_need_an_image_that_the_drawn_box_would_fit(folder, tmp_path):
    np.save(tmp_path / "mask.npy", np.eye(16))
    given(folder, BoxInpainting(box_size=128), masks=str(tmp_path / "mask.npy"))
    with pytest.raises(ValueError, match="128"):
        set_up(ImageFolder(str(folder)), operator=BoxInpainting(box_size=128))


def test_one_mask_serves_all_measurements(folder, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 200
    Image.fromarray(mask).save(tmp_path / "mask.png")
    data = given(folder, BoxInpainting(), prior=Prior(side=16), masks=str(tmp_path / "mask.png"), batch_size=5)
    masks = next(iter(data.predict_dataloader()))["parameters"]["mask"]
    assert masks.shape == (5, 1, 16, 16)
    assert torch.equal(masks[4, 0], torch.from_numpy((mask > 0).astype(np.float32)))


def test_every_measurement_gets_the_mask_of_its_name(folder, tmp_path):
    save_picture(folder / "sub" / "a.png")
    masks = np.eye(16, dtype=np.float32)
    for i, name in enumerate(["a", "b", "c", "d", "e", "sub/a"]):
        file = tmp_path / "masks" / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.roll(masks, i, axis=0)[None] if i % 2 else np.roll(masks, i, axis=0).astype(bool))
    data = given(folder, BoxInpainting(), masks=str(tmp_path / "masks"), batch_size=6)
    got = next(iter(data.predict_dataloader()))["parameters"]["mask"]
    for i in range(6):
        assert torch.equal(got[i, 0], torch.from_numpy(np.roll(masks, i, axis=0)))


def test_kernels_are_divided_by_their_sum_and_fit_the_operator(folder, tmp_path):
    kernel = np.zeros((5, 5), np.uint8)
    kernel[2] = [10, 20, 30, 20, 10]
    Image.fromarray(kernel).save(tmp_path / "kernel.png")
    operator = MotionDeblur(kernel_size=5)
    data = given(folder, operator, kernels=str(tmp_path / "kernel.png"), batch_size=5)
    batch = next(iter(data.predict_dataloader()))
    torch.testing.assert_close(batch["parameters"]["kernel"][0], torch.from_numpy(kernel / 90).float())
    definite = operator.with_parameters(batch["parameters"], data.image_shape)
    assert definite(torch.zeros(5, 3, 16, 16)).shape == (5, 3, 16, 16)


def test_what_a_picture_shows_in_its_holes_is_ignored_and_an_array_is_taken_as_it_is(tmp_path):
    mask = np.eye(16)
    np.save(tmp_path / "mask.npy", mask)
    pixels = save_picture(tmp_path / "y" / "picture.png").transpose(2, 0, 1) / 127.5 - 1
    np.save(tmp_path / "y" / "array.npy", pixels)
    array, picture = restored(given(tmp_path / "y", BoxInpainting(), masks=str(tmp_path / "mask.npy")))
    torch.testing.assert_close(array["y"], torch.from_numpy(pixels).float())
    torch.testing.assert_close(picture["y"], torch.from_numpy(mask * pixels).float())


def test_given_draws_share_the_measurement(folder, tmp_path):
    np.save(tmp_path / "mask.npy", np.ones((16, 16)))
    data = given(folder, BoxInpainting(), masks=str(tmp_path / "mask.npy"), draws=2, limit=1, batch_size=2)
    batch = next(iter(data.predict_dataloader()))
    assert batch["draw"].tolist() == [0, 1]
    assert torch.equal(batch["y"][0], batch["y"][1])


def test_preprocess_none_finds_the_image_size_from_that_of_the_measurement(tmp_path):
    save_picture(tmp_path / "y.png", size=(8, 12))
    assert given(tmp_path, SuperResolution(), preprocess="none").image_shape == (3, 32, 48)
    with pytest.raises(ValueError, match="the prior cannot take"):  # it takes multiples of 8
        given(tmp_path, GaussianDeblur(kernel_size=3), preprocess="none")


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        (BoxInpainting(), {}, "masks must be given: with mode='given', BoxInpainting needs the mask"),
        (MotionDeblur(5), {}, "kernels must be given"),
        (SuperResolution(), {}, "has the shape"),
        (GaussianDeblur(5), {"masks": "{tmp}/good.npy"}, "is not used: GaussianDeblur has no mask"),
        (BoxInpainting(), {"masks": "{tmp}/grey.npy"}, "must hold only zeros and ones"),
        (BoxInpainting(), {"masks": "{tmp}/black.png"}, "keeps no pixel"),
        (BoxInpainting(), {"masks": "{tmp}/small.npy"}, "is 8x8 and not 16x16"),
        (BoxInpainting(), {"masks": "{tmp}/text.png"}, "cannot be read"),
        (BoxInpainting(), {"masks": "{tmp}/some"}, "lacks a file for 4 of 5 measurements, the first is 'b'"),
        (BoxInpainting(), {"masks": "{tmp}/twice"}, "holds several files for 'a'"),
        (MotionDeblur(5), {"kernels": "{tmp}/even.npy"}, "must be square with an odd side, got 4x4"),
        (MotionDeblur(5), {"kernels": "{tmp}/zero.npy"}, "must have a positive sum"),
        (MotionDeblur(5), {"kernels": "{tmp}/huge.npy"}, "kernels: those of 'a.png' do not fit"),
    ],
)
def test_wrong_measurements_masks_and_kernels_are_refused_at_setup(operator, arguments, message, folder, tmp_path):
    np.save(tmp_path / "good.npy", np.ones((16, 16)))
    np.save(tmp_path / "grey.npy", np.full((16, 16), 0.5))
    Image.new("L", (16, 16), 1).save(tmp_path / "black.png")  # ones saved as a picture are black
    np.save(tmp_path / "small.npy", np.ones((8, 8)))
    (tmp_path / "text.png").write_text("damaged")
    np.save(tmp_path / "even.npy", np.ones((4, 4)))
    np.save(tmp_path / "zero.npy", np.zeros((5, 5)))
    np.save(tmp_path / "huge.npy", np.ones((41, 41)))
    for place, names in (("some", "a"), ("twice", "abcde")):
        (tmp_path / place).mkdir()
        for name in names:
            np.save(tmp_path / place / f"{name}.npy", np.ones((16, 16)))
    save_picture(tmp_path / "twice" / "a.png")
    with pytest.raises(ValueError, match=message):
        given(folder, operator, **{name: path.format(tmp=tmp_path) for name, path in arguments.items()})


def test_a_missing_mask_file_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"masks='.*nowhere'"):
        given(folder, BoxInpainting(), masks=str(tmp_path / "nowhere"))


def test_kernels_of_several_sizes_need_single_images(folder, tmp_path):
    (tmp_path / "kernels").mkdir()
    for i, name in enumerate("abcde"):
        np.save(tmp_path / "kernels" / f"{name}.npy", np.ones((3 + 2 * (i % 2),) * 2))
    with pytest.raises(ValueError, match="batch_size=1"):
        given(folder, MotionDeblur(5), kernels=str(tmp_path / "kernels"), batch_size=2)
    assert len(restored(given(folder, MotionDeblur(5), kernels=str(tmp_path / "kernels")))) == 5


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_given_measurements_are_for_predict_alone(stage, folder):
    with pytest.raises(ValueError, match="mode='given' has no clean images"):
        set_up(ImageFolder(str(folder), mode="given"), stage)


# training from a folder


def test_train_and_val_divide_the_folder_by_name_whatever_else_is_in_it(tmp_path):
    for i in range(40):
        save_picture(tmp_path / f"{i:03d}.png")
    data = set_up(ImageFolder(str(tmp_path), val_percent=30), "fit")
    train, val = ({s["name"] for s in data.dataset(split)} for split in ("train", "val"))
    assert train | val == {f"{i:03d}" for i in range(40)}
    assert not train & val
    assert 4 <= len(val) <= 20
    for i in range(0, 40, 2):
        (tmp_path / f"{i:03d}.png").unlink()
    fewer = set_up(ImageFolder(str(tmp_path), val_percent=30), "fit")
    assert {s["name"] for s in fewer.dataset("val")} == {name for name in val if int(name) % 2}


def test_the_test_split_of_a_folder_is_all_of_it(folder):
    data = set_up(ImageFolder(str(folder), limit=2), "test")
    assert len(data.dataset("test")) == 5  # the limit is for predict


# FFHQ and ImageNet


@pytest.fixture
def ffhq(tmp_path: Path) -> Path:
    for number in (0, 3, 99, 100, 2000, 2001, 2002, 60000, 60001):
        save_picture(tmp_path / "ffhq" / f"{number - number % 1000:05d}" / f"{number:05d}.png")
    return tmp_path / "ffhq"


@pytest.mark.parametrize(
    ("subset", "names", "indices"),
    [
        ("daps", ["00000", "00003", "00099"], [0, 3, 99]),
        ("dps", ["00000", "00003", "00099", "00100"], [0, 3, 99, 100]),
        ("diffstategrad", ["60000", "60001"], [0, 1]),
    ],
)
def test_ffhq_subsets_hold_their_ids_and_the_index_is_the_place_in_the_subset(subset, names, indices, ffhq):
    with pytest.warns(UserWarning, match="results are not comparable"):
        data = set_up(FFHQ(str(ffhq), subset, image_size=16, allow_missing=True))
    assert [s["name"] for s in restored(data)] == names
    assert [index for index, _ in data.samples().keys()] == indices  # noqa: SIM118


def test_an_incomplete_subset_is_refused_with_the_count_and_the_first_missing_id(ffhq):
    with pytest.raises(ValueError, match="lacks 97 of 100 pictures of subset='daps', the first is '00001'"):
        set_up(FFHQ(str(ffhq), image_size=16))


def test_a_subset_without_any_picture_is_refused_even_when_some_may_be_missing(ffhq):
    with pytest.raises(ValueError, match="lacks 100 of 100 pictures"):
        set_up(FFHQ(str(ffhq), "diffpir", image_size=16, allow_missing=True))


def test_a_subset_needs_only_the_pictures_within_the_limit(ffhq):
    assert [s["name"] for s in restored(set_up(FFHQ(str(ffhq), image_size=16, limit=1)))] == ["00000"]


def test_a_list_file_picks_pictures_in_its_order_whatever_their_suffix(ffhq, tmp_path):
    (tmp_path / "list.txt").write_text("# mine\n02001.jpg\n\nsome/where/00003.png 7\n60000\n")
    data = set_up(FFHQ(str(ffhq), str(tmp_path / "list.txt"), image_size=16))
    assert [(s["index"], s["name"]) for s in restored(data)] == [(0, "02001"), (1, "00003"), (2, "60000")]


@pytest.mark.parametrize("content", [None, "", "00001\n00001.png\n"])
def test_a_wrong_list_file_is_refused(content, ffhq, tmp_path):
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ValueError, match="subset="):
        FFHQ(str(ffhq), str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("subset", "free"),
    [("daps", {"02000", "02001", "02002", "60000", "60001"}), ("diffpir", {f"{i:05d}" for i in (0, 3, 99, 100, 2000)})],
)
def test_a_training_never_sees_the_evaluated_part_of_ffhq(subset, free, ffhq):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few pictures: perhaps none to validate
        data = set_up(FFHQ(str(ffhq), subset, image_size=16, val_percent=20), "fit")
    names = {s["name"] for split in ("train", "val") for s in data.dataset(split)}
    assert free <= names
    assert not names & {"02000": {"00000", "00003", "00099", "00100"}, "00000": {"60000", "60001"}}[min(free)]


def test_one_number_in_two_folders_is_refused(ffhq):
    save_picture(ffhq / "copy" / "00003.png")
    with pytest.raises(ValueError, match="holds picture 3 twice"):
        set_up(FFHQ(str(ffhq), image_size=16, allow_missing=True))


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for number, size in ((1, (300, 300)), (2, (300, 200)), (3, (256, 256)), (49000, (20, 30)), (49001, (20, 30))):
        save_picture(tmp_path / "val" / f"n{number % 2}" / f"ILSVRC2012_val_{number:08d}.JPEG", size=size, mode="L")
    return tmp_path / "val"


def test_imagenet_daps_is_the_hundred_from_49000(imagenet):
    with pytest.warns(UserWarning, match="lacks 98 of 100"):
        data = set_up(ImageNet(str(imagenet), image_size=16, allow_missing=True))
    assert [(s["index"], s["name"][-5:]) for s in restored(data)] == [(0, "49000"), (1, "49001")]


def test_imagenet_mcg_skips_small_pictures_and_reports_missing_ones(imagenet):
    with pytest.warns(UserWarning, match="lacks 998 of 1000 pictures of subset='mcg', the first is '00004'"):
        data = set_up(ImageNet(str(imagenet), "mcg", image_size=16, allow_missing=True))
    assert [(s["index"], s["name"][-5:]) for s in restored(data)] == [(0, "00001"), (1, "00003")]
    assert len(restored(set_up(ImageNet(str(imagenet), "mcg", image_size=16, limit=2)))) == 2


def test_imagenet_takes_lists_of_names_with_labels(imagenet, tmp_path):
    (tmp_path / "list.txt").write_text("ILSVRC2012_val_00000003.png 65\n00000001\n")
    data = set_up(ImageNet(str(imagenet), str(tmp_path / "list.txt"), image_size=16))
    assert [s["name"][-5:] for s in restored(data)] == ["00003", "00001"]


# packed files


def test_a_packed_file_gives_its_splits_in_their_order(packed):
    data = set_up(Faces(str(packed)), "fit", prior=Prior(1))
    with h5py.File(packed) as f:
        expected = torch.from_numpy(f["val/images"][:]).float() / 127.5 - 1
    batches = list(data.val_dataloader())
    assert torch.equal(torch.cat([b["x"] for b in batches]), expected)
    assert [b["name"][0] for b in batches] == ["val00000", "val00001", "val00002"]
    assert data.image_shape == (1, 16, 16)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_split_too_large_for_memory_gives_the_same_images(num_workers, packed):
    cached = restored(set_up(Packed(str(packed)), prior=Prior(1)))
    data = set_up(Packed(str(packed), cache_bytes=0, num_workers=num_workers), prior=Prior(1))
    assert data.dataset("test")[0]["index"] == 0  # opens the file in this process before the loader forks
    streamed = restored(data)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(cached, streamed, strict=True))
    data.teardown("predict")


def test_chosen_indices_keep_their_position(packed):
    data = set_up(Faces(str(packed), indices=[4, 1]), prior=Prior(1))
    assert [s["index"] for s in restored(data)] == [4, 1]
    assert data.samples().keys() == [(4, 0), (1, 0)]


@pytest.mark.parametrize("indices", [[5], [-1], [1, 1]])
def test_wrong_indices_are_refused(indices, packed):
    with pytest.raises(ValueError, match="indices="):
        set_up(Faces(str(packed), indices=indices), prior=Prior(1))


def test_packed_images_that_the_prior_cannot_take_are_refused(packed):
    with pytest.raises(ValueError, match="the prior cannot take"):
        set_up(Faces(str(packed)), prior=Prior(3))


def test_a_missing_packed_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="path="):
        set_up(Faces(str(tmp_path / "nothing.h5")))


def test_a_truncated_packed_file_is_refused(packed):
    packed.write_bytes(packed.read_bytes()[:-500])
    with pytest.raises(ValueError, match="truncated"):
        set_up(Faces(str(packed)), prior=Prior(1))


def test_a_file_that_is_not_hdf5_is_refused(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        set_up(Faces(str(tmp_path / "x.h5")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": np.zeros((2, 1, 8, 8), np.uint8)}, "has no data set test/images; it has images"),
        ({"test/pictures": np.zeros((2, 1, 8, 8), np.uint8)}, "has no data set test/images"),
        ({"test/images": np.zeros((2, 1, 8, 8), np.float32)}, "must be uint8"),
        ({"test/images": np.zeros((2, 8, 8), np.uint8)}, r"must be uint8 \[N, C, H, W\]"),
        ({"test/images": np.zeros((0, 1, 8, 8), np.uint8)}, "is empty"),
        ({"test/images": np.zeros((2, 1, 8, 8), np.uint8), "test/names": [1, 2]}, "names must be strings"),
        ({"test/images": np.zeros((2, 1, 8, 8), np.uint8), "test/names": ["a"]}, "has 1 names for 2 images"),
        ({"test/images": np.zeros((2, 1, 8, 8), np.uint8), "count": 3}, "has 2 of 3 images"),
    ],
)
def test_a_packed_file_of_another_layout_is_refused(content, message, tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as f:
        for name, values in content.items():
            if name == "count":
                f["test"].attrs["count"] = values
            else:
                f[name] = values
    with pytest.raises(ValueError, match=message):
        set_up(Faces(str(tmp_path / "x.h5")), prior=Prior(1))


# packing


@pytest.mark.parametrize("preprocess", ["daps", "adm", "box"])
def test_a_packed_folder_gives_the_images_of_the_folder(preprocess, tmp_path):
    for i in range(12):
        save_picture(tmp_path / "in" / f"{i}.png", size=(20, 40), seed=i)
    counts = pack(
        str(tmp_path / "in"), str(tmp_path / "out.h5"), 16, preprocess, val_percent=20, test_percent=30, licence="CC0"
    )
    assert sum(counts.values()) == 12
    for split in ("train", "val", "test"):
        assert counts[split] == sum(split_of(str(i), 20, 30) == split for i in range(12))
        if counts[split]:
            for sample in Packed(str(tmp_path / "out.h5")).dataset(split):
                picture = read_picture(tmp_path / "in" / f"{sample['name']}.png", channels=3)
                x = prepare(picture, (16, 16), preprocess)
                torch.testing.assert_close(sample["x"], x, rtol=0, atol=0.51 / 127.5)  # rounding to 8 bits
    with h5py.File(tmp_path / "out.h5") as f:
        assert (f.attrs["preprocess"], f.attrs["licence"], f.attrs["count"]) == (preprocess, "CC0", 12)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["in", "out.h5"]


def test_packing_leaves_damaged_pictures_out_and_says_so(folder, tmp_path):
    (folder / "c.png").write_bytes(b"damaged")
    with (
        pytest.warns(UserWarning, match="c.png' cannot be read"),
        pytest.warns(UserWarning, match="1 of 5 pictures cannot be read"),
    ):
        counts = pack(str(folder), str(tmp_path / "out.h5"), 8, channels=1)
    assert counts["unreadable"] == 1
    assert counts["train"] + counts["val"] == 4


def test_the_pack_command_takes_the_arguments_of_pack(folder, tmp_path, capsys):
    output = tmp_path / "out.h5"
    assert pack_command([f"--input={folder}", f"--output={output}", "--size=8", "--preprocess=box"]) == 0
    assert "5 train, 0 val, 0 test, 0 unreadable" in capsys.readouterr().out
    assert Packed(str(output)).dataset("train").image_shape == (3, 8, 8)


def test_packing_needs_a_new_file_and_leaves_nothing_behind_when_it_fails(folder, tmp_path):
    output = tmp_path / "out.h5"
    with pytest.raises(ValueError, match="size=8"):
        pack(str(folder), str(output), 8, preprocess="none")
    assert not list(tmp_path.glob("*.h5")) + list(tmp_path.glob(".*partial"))
    pack(str(folder), str(output), 8)
    with pytest.raises(FileExistsError, match="overwrite"):
        pack(str(folder), str(output), 8)
    pack(str(folder), str(output), 16, overwrite=True)
    assert Packed(str(output)).dataset("train").image_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 8, "preprocess": "crop"}, "preprocess='crop'"),
        ({"size": 8, "channels": 4}, "channels=4"),
        ({"size": 8, "val_percent": 60, "test_percent": 50}, "val_percent=60"),
    ],
)
def test_packing_refuses_arguments_out_of_range(arguments, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        pack(str(folder), str(tmp_path / "out.h5"), **arguments)


# command line


def data_parser() -> LightningArgumentParser:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    return parser


@pytest.mark.parametrize(
    ("name", "argument"),
    [("Faces", "path"), ("Packed", "path"), ("ImageFolder", "root"), ("FFHQ", "root"), ("ImageNet", "root")],
)
def test_every_data_module_takes_the_shared_arguments_on_the_command_line(name, argument):
    args = [f"--data=datamodules.{name}", f"--data.{argument}=here", "--data.init_args.batch_size=3", "--data.draws=2"]
    options = data_parser().parse_args([*args, "--data.limit=4", "--data.predict_split=val"]).data.init_args
    assert (options.batch_size, options.draws, options.limit, options.predict_split) == (3, 2, 4, "val")
    assert options[argument] == "here"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_data_config_is_accepted(config):
    parser = data_parser()
    content = yaml.safe_load(config.read_text())
    assert list(content) == ["data"]
    parsed = parser.parse_object(content)
    assert isinstance(parser.instantiate(parsed).data, LightningDataModule)
