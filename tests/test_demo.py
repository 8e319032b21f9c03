"""The demonstration's pictures: from the command to the table and the figure."""

from pathlib import Path

import pytest
from PIL import Image

import cli
from tests.golden import ROOT

pytest.importorskip("skimage")


def test_the_demo_ends_with_a_table_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["demo", "--only=images", "--num_steps=2", "--draws=1", "--root", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for task in ("super resolution", "motion deblur", "random inpainting", "box inpainting"):
        assert task in told
    assert "tensorboard --logdir" in told
    assert "make demo IMAGES=" in told
    with Image.open(tmp_path / "demo/astronaut/demo.png") as figure:
        assert min(figure.size) > 400
    assert len(list(tmp_path.glob("demo/astronaut/*/*/metrics.csv"))) == 8


def test_the_demo_takes_your_own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = tmp_path / "mine"
    pictures.mkdir()
    Image.new("RGB", (90, 70), (200, 40, 90)).save(pictures / "a.jpg")
    monkeypatch.chdir(ROOT)
    assert cli.main(["demo", "--images", str(pictures), "--num_steps=2", "--draws=1", "--root", str(tmp_path)]) == 0
    assert (tmp_path / "demo/mine/demo.png").is_file()
    assert not (tmp_path / "demo/equations").exists()


def test_pictures_and_a_part_that_does_not_restore_them_are_refused(tmp_path: Path, capsys) -> None:
    assert cli.main(["demo", "--images", "mine", "--only=fields", "--root", str(tmp_path)]) == 1
    assert "--images=mine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
