"""What the samplers of fields promise: FunDPS, its regularised form, and DiffusionPDE."""

import copy
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from callbacks import EquiReg, PredictionWriter, TensorBoardInspector
from datamodules import Helmholtz, NavierStokes
from equireg.mpe import MPE
from equireg.noise import SampleNoise, Stream, hash_seed
from equireg.operators import Sensors
from equireg.pde.files import field_path
from equireg.pde.generate import HelmholtzLaw, generate
from equireg.pde.residuals import RESIDUALS
from equireg.priors import EDMPrior
from equireg.regularizer import Regularizer, WeightSchedule
from equireg.runs import read_run
from lightning_modules import DiffusionPDE, FieldPiGDM, FieldSampler, FunDPS
from tests.tiny_fields import tiny_field_prior
from tests.tiny_run import predict

Make = Callable[..., FieldSampler]

SAMPLERS: dict[str, Make] = {
    "FunDPS": lambda prior, operator, **options: FunDPS(prior, operator, num_steps=6, weight=20.0, **options),
    "DiffusionPDE": lambda prior, operator, **options: DiffusionPDE(
        prior, operator, num_steps=6, zeta_u=5.0, **options
    ),
}
published = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())
ALL = SAMPLERS | {"FieldPiGDM": lambda prior, operator: FieldPiGDM(prior, operator, num_steps=6)}
sampler = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


class Blurred(MPE):
    """Some function of the second channel that is not equivariant."""

    space = "field"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.arange(9.0, dtype=torch.float64).view(1, 1, 3, 3) / 36)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x[:, 1:].tanh(), self.kernel, padding=1)


@pytest.fixture(scope="module")
def prior() -> EDMPrior:
    return tiny_field_prior("helmholtz")


@pytest.fixture(scope="module")
def fields() -> Tensor:
    """Six pairs of the Helmholtz equation, 8x8, in physical units."""
    return HelmholtzLaw(8).sample(range(6), 0, "test")


def penalty(weight: float = 1.0, group: str = "flip", **options: object) -> Regularizer:
    schedule = WeightSchedule(weight, scale="none")
    return Regularizer(Blurred(), group, schedule, reduction="rms", **options)


def restore(module: FieldSampler, fields: Tensor, indices: list[int]) -> Tensor:
    seeds = [hash_seed(0, Stream.OPERATOR, i) % 2**32 for i in indices]
    operator = module.operator.realize(tuple(fields.shape[1:]), seeds)
    return module(operator(fields[indices]), indices, operator)


@sampler
@pytest.mark.parametrize("task", ["forward", "inverse", "both"])
def test_a_restoration_is_a_field_in_physical_units(make: Make, task: str, prior: EDMPrior, fields: Tensor) -> None:
    x0 = restore(make(prior, Sensors(task, count=10)), fields, [0, 1])
    assert x0.shape == (2, 2, 8, 8)
    assert x0.dtype == torch.float32
    assert x0.isfinite().all()
    assert not x0.requires_grad
    assert x0[:, 0].std() > 5 * x0[:, 1].std()  # the source is 66 times larger than the solution


@sampler
@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_sample_does_not_depend_on_its_batch(make: Make, batch_size: int, prior: EDMPrior, fields: Tensor) -> None:
    # a network in float64: its float32 rounding grows over the steps
    module = make(copy.deepcopy(prior).double(), Sensors("inverse", count=10))
    module.attach(penalty(group="d4"))
    fields = fields.double()
    alone = torch.cat([restore(module, fields, [i]) for i in range(6)])
    batches = [list(range(i, min(i + batch_size, 6))) for i in range(0, 6, batch_size)]
    together = torch.cat([restore(module, fields, batch) for batch in batches])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@sampler
def test_the_same_sample_is_the_same_bit_for_bit(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    module = make(prior, Sensors("inverse", count=10))
    assert torch.equal(restore(module, fields, [3, 4]), restore(module, fields, [3, 4]))


@published
def test_one_gradient_of_all_terms_is_the_sum_of_their_gradients(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    results = []
    for merge_losses in (True, False):
        module = make(prior, Sensors("both", count=10), merge_losses=merge_losses)
        module.attach(penalty())
        module.evaluations.reset()
        results.append(restore(module, fields, [0, 1]))
        backwards = module.evaluations.backward
    scale = fields.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(results[0] / scale, results[1] / scale, rtol=0, atol=1e-5)
    assert backwards > 24  # each term by itself


@pytest.mark.parametrize(("name", "backwards"), [("FunDPS", 10), ("DiffusionPDE", 11), ("FieldPiGDM", 11)])
def test_a_step_costs_two_evaluations_and_their_backward_passes(
    name: str, backwards: int, prior: EDMPrior, fields: Tensor
) -> None:
    """The last step of six is Euler's; FunDPS does not guide it."""
    module = ALL[name](prior, Sensors("inverse", count=10))
    module.evaluations.reset()
    restore(module, fields, [0, 1])
    assert (module.evaluations.forward, module.evaluations.backward) == (11, backwards)


@sampler
def test_the_penalty_has_an_effect_and_a_weight_of_zero_has_none(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    module = make(prior, Sensors("inverse", count=10))
    plain = restore(module, fields, [0, 1])
    module.attach(penalty(weight=0.0))
    assert torch.equal(restore(module, fields, [0, 1]), plain)
    module.detach_penalty()
    module.attach(penalty(weight=5.0))
    assert (restore(module, fields, [0, 1]) - plain)[:, 0].abs().max() > 1e-4


@published
def test_a_separate_penalty_is_scaled_by_its_weight_alone(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    """Where the sampler scales its terms down, a penalty with a step size of its own is not scaled."""
    scales = []
    for attachment in ("in_norm", "separate_step"):
        module = make(prior, Sensors("inverse", count=10))
        module.attach(penalty(attachment=attachment))
        weighted = module.gradient
        last = []
        module.gradient = lambda terms, x, step, w=weighted, o=last: w(o.append(list(terms)) or o[-1], x, step)
        restore(module, fields, [0])
        scales.append(torch.stack([terms[-1].detach() for terms in last]))
    ratio = scales[0][1:] / scales[1][1:]
    assert (ratio.amin() < 0.2).item()  # sigma below 1, or the last fifth of the steps


@sampler
def test_half_precision_is_that_of_the_network_alone(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    module = make(copy.deepcopy(prior), Sensors("inverse", count=10))
    full = restore(module, fields, [0, 1])
    heard = []
    module.listeners.append(lambda module, step, x0_hat: heard.append(x0_hat.dtype))
    module.prior.autocast_dtype = torch.bfloat16  # what bf16-mixed sets
    half = restore(module, fields, [0, 1])
    assert set(heard) == {torch.float64}
    assert not torch.equal(half, full)
    difference = (half - full).flatten(2).norm(dim=2) / full.flatten(2).norm(dim=2)
    assert difference.max() < 0.1  # bfloat16 has three digits; FieldPiGDM divides by what its prior is sure of


@sampler
def test_listeners_hear_every_step_once_in_physical_units(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    module = make(prior, Sensors("inverse", count=10))
    heard = []
    module.listeners.append(lambda module, step, x0_hat: heard.append((step.k, step.num_steps, x0_hat)))
    x0 = restore(module, fields, [0])
    assert [(k, n) for k, n, _ in heard] == [(k, 6) for k in range(6)]
    assert not any(x.requires_grad for _, _, x in heard)
    last = heard[-1][2]
    assert (last - x0)[:, 1].abs().max() < 3 * x0[:, 1].std()  # not in units 66 times larger


@sampler
def test_a_damaged_measurement_spoils_no_other_field(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    module = make(prior, Sensors("inverse", count=10))
    module.attach(penalty())
    spoiled = fields.clone()
    spoiled[1, 1] = torch.nan
    x0 = restore(module, spoiled, [0, 1, 2])
    assert torch.equal(x0.isfinite().flatten(1).all(1), torch.tensor([True, False, True]))
    torch.testing.assert_close(x0[[0, 2]], restore(module, fields, [0, 2]), rtol=1e-4, atol=1e-6)


@sampler
def test_the_prior_is_frozen_and_no_graph_survives(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    restore(make(prior, Sensors("inverse", count=10)), fields, [0])
    assert not any(p.requires_grad or p.grad is not None for p in prior.parameters())


@sampler
def test_the_temperature_scales_the_initial_noise(make: Make, prior: EDMPrior, fields: Tensor) -> None:
    module = make(prior, Sensors("inverse", count=10))
    module.temperature = 0.0
    y = module.operator.realize((2, 8, 8), [7])(fields[:1])  # the same measurement of the same field for both draws
    operator = module.operator.realize((2, 8, 8), [7])
    assert torch.equal(module(y, [0], operator, [0]), module(y, [0], operator, [1]))
    module.temperature = 1.0
    assert not torch.equal(module(y, [0], operator, [0]), module(y, [0], operator, [1]))


def test_fundps_follows_the_sensors(prior: EDMPrior, fields: Tensor) -> None:
    misfits = []
    for weight in (0.0, 30.0):
        module = FunDPS(prior, Sensors("inverse", count=30), num_steps=30, weight=weight, residual_weight=0.0)
        x0 = restore(module, fields, [0, 1])
        seeds = [hash_seed(0, Stream.OPERATOR, i) % 2**32 for i in (0, 1)]
        operator = module.operator.realize((2, 8, 8), seeds)
        misfits.append((operator(x0) - operator(fields[:2])).norm().item())
    assert misfits[1] < 0.3 * misfits[0]


def test_a_weight_for_each_channel(prior: EDMPrior, fields: Tensor) -> None:
    def run(weight: float | tuple[float, float], task: str = "both") -> Tensor:
        return restore(FunDPS(prior, Sensors(task, count=10), 4, weight=weight, residual_weight=0.0), fields, [0])

    assert torch.equal(run((20.0, 20.0)), run(20.0))
    assert not torch.equal(run((20.0, 0.0)), run(20.0))
    assert torch.equal(run((0.0, 20.0), "inverse"), run((7.0, 20.0), "inverse"))


@pytest.mark.parametrize("kind", ["mse", "l2", "l1", "huber"])
def test_sensor_losses_are_means_over_the_sensors(kind: str, prior: EDMPrior) -> None:
    module = FunDPS(prior, Sensors(), huber_delta=0.5)
    r = torch.zeros(2, 4, 4, dtype=torch.float64)
    r[0, 0, :2] = torch.tensor([1.0, -0.1])
    expected = {"mse": 1.01 / 2, "l2": (1.01 / 2) ** 0.5, "l1": 1.1 / 2, "huber": (0.5 * (1 - 0.25) + 0.005) / 2}[kind]
    r.requires_grad_()
    loss = module.mean(r, kind, torch.tensor([2, 2]))
    assert loss[0].item() == pytest.approx(expected)
    assert loss[1].item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), r)
    assert gradient.isfinite().all()  # of a root at zero, too


def test_the_helmholtz_residual_of_a_solution_is_zero() -> None:
    x = HelmholtzLaw(16).sample([0, 1], 0, "test").double()
    assert RESIDUALS["helmholtz"](x).abs().max() < 1e-4 * x[:, 0].abs().max()  # pairs are float32
    assert RESIDUALS["helmholtz"](x * torch.tensor([1.0, 1.01]).view(2, 1, 1)).abs().max() > 1e-3


def test_the_published_navier_stokes_residual_is_a_sum_of_differences() -> None:
    i = torch.arange(5.0).view(5, 1)
    u = 2 * i + 3 * i.T
    residual = RESIDUALS["ns_gradient_sum"](torch.stack([torch.zeros(5, 5), u])[None])
    torch.testing.assert_close(residual, torch.full((1, 3, 3), 5.0))
    assert (RESIDUALS["helmholtz"].cells(128), RESIDUALS["ns_gradient_sum"].cells(128)) == (127**2, 128**2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: FunDPS(p, Sensors(), weight=-1.0), "weight=-1.0 must be one number or two"),
        (lambda p: FunDPS(p, Sensors(), weight=(1.0, 2.0, 3.0)), "must be one number or two"),
        (lambda p: FunDPS(p, Sensors(), residual_weight=-1.0), "residual_weight=-1.0 must not be negative"),
        (lambda p: FunDPS(p, Sensors(), num_steps=1), "num_steps=1 must be at least 2"),
        (lambda p: FunDPS(p, Sensors(), residual="wave"), "residual='wave' is unknown; available: helmholtz"),
        (
            lambda p: FunDPS(p, Sensors(), sensor_loss="l3"),
            "sensor_loss='l3' is unknown; available: mse, l2, l1, huber",
        ),
        (lambda p: FunDPS(p, Sensors(), temperature=-1.0), "temperature=-1.0 must not be negative"),
        (lambda p: FieldPiGDM(p, Sensors(), ridge=-1.0), "ridge=-1.0 must not be negative"),
        (lambda p: DiffusionPDE(p, Sensors(), zeta_a=-1.0), "zeta_a=-1.0 must not be negative"),
        (lambda p: DiffusionPDE(p, Sensors(), late_fraction=1.5), "late_fraction=1.5 must be between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[EDMPrior], object], message: str, prior: EDMPrior) -> None:
    with pytest.raises(ValueError, match=message):
        make(prior)


def test_a_residual_is_needed_only_where_it_is_weighed() -> None:
    prior = EDMPrior.from_network(tiny_field_prior().network, mean=(0.0, 0.0), std=(1.0, 1.0))
    with pytest.raises(ValueError, match="name the residual, the prior does not tell its equation"):
        FunDPS(prior, Sensors())
    FunDPS(prior, Sensors(), residual_weight=0.0)
    FunDPS(prior, Sensors(), residual="helmholtz")


def test_pixel_regularisers_and_priors_are_refused(prior: EDMPrior, encoder: MPE, tiny_prior: nn.Module) -> None:
    with pytest.raises(ValueError, match="Encoder takes pixel inputs, FunDPS samples in field space"):
        FunDPS(prior, Sensors()).attach(Regularizer(encoder, "hflip", WeightSchedule(1.0)))
    with pytest.raises(ValueError, match="FunDPS samples in field space, VPPrior is a prior on pixels"):
        FunDPS(tiny_prior, Sensors())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five test pairs of 8x8."""
    folder = tmp_path_factory.mktemp("fields")
    generate(HelmholtzLaw(8), folder, "test", 5, seed=0)
    return folder


def test_a_run_measures_fields_as_fields(prior: EDMPrior, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    module = FunDPS(prior, Sensors("inverse", count=10), num_steps=4, weight=20.0)
    callbacks = [EquiReg(Blurred(), "flip", weight=0.0), TensorBoardInspector(2), PredictionWriter()]
    predict(run, *callbacks, sampler=module, data=Helmholtz(str(folder), size=8, batch_size=2))
    rows = read_run(run).rows
    assert [row.index for row in rows] == [0, 1, 2, 3, 4]
    assert {"relative_l2", "data_misfit", "equivariance_error", "network_evaluations"} <= set(rows[0].metrics)
    assert not {"psnr", "ssim"} & set(rows[0].metrics)
    assert rows[0].metrics["equivariance_error"] > 0
    x0 = np.load(run / "predictions/00002_test00002.npy")
    with h5py.File(field_path(folder, "helmholtz", "test", 8)) as file:
        a = file["a"][2]  # what an inverse problem asks for
    assert rows[2].metrics["relative_l2"] == pytest.approx(np.linalg.norm(x0[0] - a) / np.linalg.norm(a), rel=1e-5)
    assert (run / "predictions/00002_test00002.png").is_file()
    assert (run / "inspect/grid.png").is_file()


def test_metrics_of_images_are_refused_for_fields(prior: EDMPrior, folder: Path, tmp_path: Path) -> None:
    module = FunDPS(prior, Sensors("inverse", count=10), num_steps=4)
    with pytest.raises(ValueError, match="'psnr' is for images; for fields there is relative_l2"):
        predict(
            tmp_path / "run", PredictionWriter(metrics=["psnr"]), sampler=module, data=Helmholtz(str(folder), size=8)
        )


def test_a_field_that_is_not_finite_is_named_and_the_others_finish(
    prior: EDMPrior, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FunDPS(prior, Sensors("inverse", count=10), num_steps=4)
    sample = module.sample

    def diverging(y: Tensor, operator: Sensors, noise: SampleNoise) -> Tensor:
        diverges = torch.tensor([index == 3 for index in module.problem.indices]).view(-1, 1, 1, 1)
        return torch.where(diverges, torch.nan, sample(y, operator, noise))

    monkeypatch.setattr(module, "sample", diverging)
    with pytest.raises(RuntimeError, match=r"1 of 5 samples diverged, .* 00003 test00003"):
        predict(tmp_path / "run", PredictionWriter(), sampler=module, data=Helmholtz(str(folder), size=8, batch_size=2))
    assert [row.index for row in read_run(tmp_path / "run").rows] == [0, 1, 2, 4]


def test_a_prior_of_the_other_equation_is_refused(prior: EDMPrior, tmp_path: Path) -> None:
    module = FunDPS(prior, Sensors("inverse", count=10), num_steps=4)
    data = NavierStokes(str(tmp_path), size=8, generate_test=1)
    with pytest.raises(ValueError, match="the prior is on fields of helmholtz, the data are of navier_stokes"):
        Trainer(accelerator="cpu", logger=False, inference_mode=False).predict(module, data)
