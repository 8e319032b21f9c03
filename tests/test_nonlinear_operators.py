"""The nonlinear measurement operators: laws of their mathematics and of the contract."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from equireg.noise import SampleNoise, Stream
from equireg.operators import HighDynamicRange, NonlinearDeblur, Operator, PhaseRetrieval
from equireg.operators.blur_network import BlurNetwork
from equireg.priors import VPPrior
from tests.test_samplers import SAMPLERS, measure

SEEDS = [5, 6, 7]
NAMES = ("phase", "signed_phase", "hdr", "nonlinear_blur")
SHAPES = {"nonlinear_blur": (3, 128, 256)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small blur network with random weights, with the part of the checkpoint that blurring does not use."""
    path = tmp_path_factory.mktemp("weights") / "blur.pth"
    torch.manual_seed(0)
    state = BlurNetwork(width=2, front_blocks=1, back_blocks=2, full_width=4).state_dict()
    torch.save(state | {"kernel_extractor.model.1.weight": torch.zeros(2)}, path)
    return str(path)


@pytest.fixture
def operators(weights: str) -> dict[str, Operator]:
    return {
        "phase": PhaseRetrieval(),
        "signed_phase": PhaseRetrieval(oversampling=3.0, resolution=12, signed=True),
        "hdr": HighDynamicRange(),
        "nonlinear_blur": NonlinearDeblur(weights),
    }


def pictures(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in [-1, 1] with values at both ends."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype).clamp(-1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_measured_on_its_own_in_float32_and_again_the_same(operators: dict, name: str) -> None:
    shape = SHAPES.get(name, (3, 17, 22))
    x = pictures(3, *shape)
    together = operators[name].realize(shape, SEEDS)
    alone = [operators[name].realize(shape, [seed]) for seed in SEEDS]
    y = together(x)
    assert y.dtype == torch.float32
    assert tuple(y.shape[1:]) == operators[name].y_shape(shape)
    torch.testing.assert_close(y, torch.cat([a(x[i : i + 1]) for i, a in enumerate(alone)]), rtol=0, atol=1e-5)
    assert [together.fingerprint(i) for i in range(3)] == [a.fingerprint(0) for a in alone]
    assert torch.equal(together(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(together(x), y)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_every_image_and_is_that_of_finite_differences(operators: dict, name: str) -> None:
    shape = SHAPES.get(name, (1, 9, 12))
    operator = operators[name].double().realize(shape, SEEDS[:1]).double()
    x = 0.3 * pictures(1, *shape, dtype=torch.float64)
    direction = pictures(1, *shape, dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(operator(x).square().sum(), x)
    assert gradient.flatten(1).norm() > 0
    h = 1e-7
    with torch.no_grad():
        difference = (operator(x + h * direction).square().sum() - operator(x - h * direction).square().sum()) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_has_the_stated_level(operators: dict, name: str) -> None:
    shape = SHAPES.get(name, (3, 32, 32))
    operator = operators[name].realize(shape, SEEDS[:1])
    operator.sigma_y = 0.2
    x = pictures(1, *shape)
    noise = operator.measure(x, SampleNoise([0], 0, Stream.MEASUREMENT)) - operator(x)
    assert noise.std().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 15, 20)], ids=["even", "odd"])
def test_moduli_do_not_tell_an_image_from_its_turned_or_shifted_self(shape: tuple) -> None:
    operator = PhaseRetrieval()
    x = pictures(2, *shape, dtype=torch.float64)
    y = operator(x)
    torch.testing.assert_close(operator(x.flip(-1, -2)), y, rtol=0, atol=1e-12)
    framed = torch.nn.functional.pad(x[..., 2:-2, 2:-2], (2, 2, 2, 2), value=-1.0)
    shifted = torch.roll(framed, (2, -1), dims=(-2, -1))
    torch.testing.assert_close(operator(shifted), operator(framed), rtol=0, atol=1e-12)
    assert (operator(x.flip(-1)) - y).abs().max() > 0.1


def test_signed_moduli_do_not_tell_an_image_from_its_negative() -> None:
    x = pictures(2, 1, 16, 16, dtype=torch.float64)
    for signed, alike in ((True, True), (False, False)):
        operator = PhaseRetrieval(signed=signed)
        assert torch.allclose(operator(-x), operator(x), atol=1e-12) == alike


def test_moduli_keep_the_energy_and_a_black_image_has_a_gradient_of_zeros() -> None:
    x = pictures(2, 3, 16, 24, dtype=torch.float64)
    energy = ((x + 1) / 2).square().sum((1, 2, 3))
    torch.testing.assert_close(PhaseRetrieval()(x).square().sum((1, 2, 3)), energy)
    black = -torch.ones(1, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(PhaseRetrieval()(black).sum(), black)
    assert (gradient == 0).all()


def test_the_zero_frequency_lies_in_the_middle() -> None:
    y = PhaseRetrieval()(torch.ones(1, 1, 16, 16))[0, 0]
    assert y.argmax().item() == 12 * 24 + 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"oversampling": 0.0}, "oversampling=0.0 must be a positive number"),
        ({"oversampling": float("nan")}, "oversampling=nan must be a positive number"),
        ({"resolution": 0}, "resolution=0 must be at least 1"),
        ({"sigma_y": -1.0}, "sigma_y=-1.0 must not be negative"),
    ],
)
def test_bad_arguments_of_phase_retrieval_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhaseRetrieval(**arguments)


def test_an_oversampling_that_pads_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"oversampling=0\.4 pads images of 16x24 by .* must be at least 0\.5"):
        PhaseRetrieval(oversampling=0.4).realize((1, 16, 24), [0])


def test_high_dynamic_range_saturates_and_its_gradient_stops_there() -> None:
    x = torch.tensor([-0.9, -0.25, 0.0, 0.25, 0.9]).view(1, 1, 1, 5).requires_grad_()
    y = HighDynamicRange(scale=2.0)(x)
    assert y.flatten().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.flatten().tolist() == [0.0, 2.0, 2.0, 2.0, 0.0]


def test_the_baseline_of_high_dynamic_range_is_right_where_nothing_saturates() -> None:
    operator = HighDynamicRange(scale=3.0)
    x = pictures(2, 1, 8, 8)
    baseline = operator.baseline(operator(x), (1, 8, 8))
    inside = x.abs() < 1 / 3
    torch.testing.assert_close(baseline[inside], x[inside])
    assert (baseline.abs() <= 1 / 3 + 1e-6).all()


def test_a_scale_that_saturates_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale=1\.0 must be above 1"):
        HighDynamicRange(scale=1.0)


def test_a_kernel_is_drawn_once_per_image_and_stays(weights: str) -> None:
    shape, state = (3, 128, 128), np.random.get_state()[1].copy()
    operator = NonlinearDeblur(weights).realize(shape, [1, 1, 2])
    assert operator.kernel_latent.shape == (3, 16, 1, 1)
    assert torch.equal(operator.kernel_latent[0], operator.kernel_latent[1])
    assert not torch.equal(operator.kernel_latent[0], operator.kernel_latent[2])
    x = pictures(1, *shape).expand(3, -1, -1, -1)
    y = operator(x)
    assert torch.equal(operator(x), y)
    assert (y[0] - y[2]).abs().max() > 1e-4
    shared = NonlinearDeblur(weights, shared=True).realize(shape, [1, 2])
    assert torch.equal(shared.kernel_latent[0], shared.kernel_latent[1])
    assert np.array_equal(np.random.get_state()[1], state)  # the global generator is not touched


def test_the_blur_network_is_frozen(weights: str) -> None:
    operator = NonlinearDeblur(weights)
    assert not any(parameter.requires_grad for parameter in operator.parameters())
    assert not operator.network.training


def test_a_measurement_does_not_depend_on_where_the_weights_lie(weights: str, tmp_path: Path) -> None:
    shutil.copy(weights, tmp_path / "moved.pth")
    paths = (weights, str(tmp_path / "moved.pth"))
    assert len({NonlinearDeblur(path).realize((3, 128, 128), [0]).fingerprint(0) for path in paths}) == 1


@pytest.mark.parametrize("shape", [(3, 192, 256), (1, 128, 128)], ids=["sides", "grey"])
def test_images_that_the_blur_network_cannot_take_are_refused(weights: str, shape: tuple) -> None:
    with pytest.raises(ValueError, match="need 3 channels and sides that are multiples of 128"):
        NonlinearDeblur(weights).realize(shape, [0])


def test_missing_blur_weights_are_named_with_their_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"blur.pth' does not exist; download GOPRO_wVAE.pth .* https://"):
        NonlinearDeblur(str(tmp_path / "blur.pth"))


def test_other_files_are_no_blur_weights(weights: str, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="no network of encoded blur kernels"):
        NonlinearDeblur(str(path))
    torch.save({name: value for name, value in state.items() if "adapter.model.up" not in name}, path)
    with pytest.raises(ValueError, match="no network of encoded blur kernels"):
        NonlinearDeblur(str(path))
    path.write_bytes(Path(weights).read_bytes()[:5000])
    with pytest.raises(ValueError, match="is damaged or not a checkpoint of tensors alone"):
        NonlinearDeblur(str(path))


class Trap:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sprung"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"feature_extractor.0.weight": Trap()}, protocol=2))
    with pytest.raises(ValueError, match="is damaged or not a checkpoint of tensors alone"):
        NonlinearDeblur("trap.pth")
    torch.save({"feature_extractor.0.weight": Trap()}, tmp_path / "zip.pth")
    with pytest.raises(ValueError, match="is damaged or not a checkpoint of tensors alone"):
        NonlinearDeblur("zip.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("make_operator", [PhaseRetrieval, HighDynamicRange])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_restores_nonlinear_measurements_or_says_why_not(
    name: str, make_operator: type[Operator], tiny_prior: VPPrior, images: Tensor
) -> None:
    module = SAMPLERS[name](tiny_prior, make_operator())
    operator, y = measure(module.operator, images[:2], [0, 1])
    refusal = module.supports(operator)
    if refusal:
        with pytest.raises(ValueError, match="needs a linear operator"):
            module(y, [0, 1], operator)
    else:
        x0 = module(y, [0, 1], operator)
        assert x0.shape == images[:2].shape
        assert x0.isfinite().all()
