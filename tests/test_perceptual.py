"""LPIPS, FID and KID on networks that need no download."""

import hashlib

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import equireg.perceptual as perceptual
from equireg.perceptual import LPIPS, DistributionDistance, check_backbone, check_installed

CPU = torch.device("cpu")


class ChannelMeans(nn.Module):
    """Features of an 8-bit RGB image: its three mean values."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        return images.float().mean((2, 3)) / 255


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("a download"))


@pytest.fixture
def images():
    return 2 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 1


def test_fid_is_the_distance_of_two_gaussians_in_feature_space(images):
    """||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^1/2): a shift of all features leaves the first term alone."""
    dark = images * 0.5 - 0.25
    bright = dark + 0.5  # a quarter of the range: features move by 0.25
    values = DistributionDistance(["fid"], ChannelMeans())([(bright, dark)], CPU)
    assert values["fid"] == pytest.approx(3 * 0.25**2, abs=2e-3)  # rounding to 8 bits


def test_fid_and_kid_do_not_depend_on_the_batches(images):
    distance = DistributionDistance(["fid", "kid"], ChannelMeans())
    other = images.flip(1) * 0.7
    whole = distance([(other, images)], CPU)
    parts = distance(zip(other.split(4), images.split(4), strict=True), CPU)
    assert parts == pytest.approx(whole, abs=1e-9)
    assert set(whole) == {"fid", "kid"}


def test_pictures_are_rounded_not_truncated():
    """Unlike torchmetrics' own conversion of floats, which would see no difference here."""
    almost_black = torch.full((2, 3, 4, 4), -1 + 0.7 * 2 / 255)  # 0.7 of a grey level: 1 when rounded
    black = torch.full((2, 3, 4, 4), -1.0)
    values = DistributionDistance(["fid"], ChannelMeans())([(almost_black, black)], CPU)
    assert values["fid"] == pytest.approx(3 / 255**2, rel=1e-3)


def test_grey_images_are_repeated_to_rgb(images):
    grey = images[:, :1]
    distance = DistributionDistance(["fid"], ChannelMeans())
    assert distance([(grey * 0.5, grey)], CPU) == distance([((grey * 0.5).repeat(1, 3, 1, 1), grey)], CPU)


def test_kid_is_reproducible_and_leaves_the_random_state_alone(images):
    many = torch.cat([images, -images, images * 0.5] * 4)  # more than a subset of 50
    distance = DistributionDistance(["kid"], ChannelMeans())
    state = torch.random.get_rng_state()
    first = distance([(many * 0.9, many)], CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert distance([(many * 0.9, many)], CPU) == first


def test_one_image_has_no_distribution(images):
    with pytest.raises(ValueError, match="fid and kid need at least 2 images, got 1"):
        DistributionDistance(["fid", "kid"], ChannelMeans())([(images[:1], images[:1])], CPU)


@pytest.mark.parametrize("backbone", ["vgg", "alex", "squeeze", "inception"])
def test_a_missing_backbone_is_named_with_its_source_and_its_place(backbone, tmp_path):
    name, url = perceptual.BACKBONES[backbone]
    with pytest.raises(FileNotFoundError) as error:
        check_backbone("lpips", backbone)
    for part in ("metric 'lpips'", name, url, str(tmp_path / "hub" / "checkpoints"), "allow_download=true", "drop"):
        assert part in str(error.value)


def test_a_damaged_backbone_is_refused_and_a_whole_one_accepted(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    monkeypatch.setitem(perceptual.BACKBONES, "vgg", perceptual.Backbone(name, "https://example.org/net"))
    (folder / name).write_bytes(b"weigh")
    with pytest.raises(ValueError, match="is damaged"):
        check_backbone("lpips", "vgg")
    (folder / name).write_bytes(b"weights")
    check_backbone("lpips", "vgg")


@pytest.mark.parametrize(("metric", "package"), [("lpips", "torchvision"), ("fid", "torch_fidelity")])
def test_a_missing_package_is_answered_by_the_extra_that_brings_it(metric, package, monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf'needs {package}: pip install "equireg\[perceptual\]"'):
        check_installed(metric)


@pytest.fixture
def lpips(monkeypatch):
    """LPIPS on a random network in place of the trained one; the linear heads come with torchmetrics."""
    torchvision = pytest.importorskip("torchvision")
    random = torchvision.models.squeezenet1_1(weights=None)
    monkeypatch.setattr("torchvision.models.squeezenet1_1", lambda *a, **k: random)
    return LPIPS("squeeze")


def test_lpips_is_one_number_per_image_and_zero_for_equal_ones(lpips):
    a, b = 2 * torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    both = lpips(a, b)
    assert both.shape == (3,)
    torch.testing.assert_close(both[1:2], lpips(a[1:2], b[1:2]))
    assert (both > 0).all()
    assert lpips(a, a).abs().max() == 0


def test_lpips_repeats_grey_and_clips(lpips):
    a, b = 2 * torch.rand(2, 2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    torch.testing.assert_close(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(lpips(3 * a, b), lpips((3 * a).clamp(-1, 1), b))


def test_the_inception_network_is_torchmetrics_own(monkeypatch):
    """FID of our 8-bit values equals what torchmetrics computes of them."""
    u8 = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = ChannelMeans()
    network.num_features = 3
    reference = FrechetInceptionDistance(feature=network)
    reference.update(u8[:2], real=True)
    reference.update(u8[2:], real=False)
    images = u8.float() / 127.5 - 1
    values = DistributionDistance(["fid"], network)([(images[2:], images[:2])], CPU)
    assert values["fid"] == pytest.approx(reference.compute().item(), abs=1e-6)
