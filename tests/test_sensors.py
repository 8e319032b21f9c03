"""Sensors read what they say, at distinct places that depend on their seed alone."""

import pytest
import torch

from equireg.noise import SampleNoise, Stream
from equireg.operators import Sensors

SHAPE = (2, 6, 8)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("task", "channels"), [("forward", [0]), ("inverse", [1]), ("both", [0, 1])])
def test_sensors_lie_on_the_observed_channels(task: str, channels: list[int], x: torch.Tensor) -> None:
    operator = Sensors(task, count=5).realize(SHAPE, [1, 2, 3])
    assert operator.count.tolist() == [[5.0 if c in channels else 0.0 for c in range(2)]] * 3
    assert tuple(operator(x).shape[1:]) == operator.y_shape(SHAPE) == (5 * len(channels),)
    assert list(operator.observed) == channels
    assert operator.recovered not in channels or task == "both"
    for image, mask, y in zip(x, operator.mask, operator(x), strict=True):
        assert sorted(image[mask == 1].tolist()) == sorted(y.tolist())


def test_the_adjoint_is_exact_and_inverts_from_the_right(x: torch.Tensor) -> None:
    operator = Sensors("both", count=0.25).realize(SHAPE, [1, 2, 3])
    assert operator.y_shape(SHAPE) == (24,)
    y = operator(x).flip(1)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum())
    torch.testing.assert_close(operator(operator.adjoint(y)), y)
    torch.testing.assert_close(operator.pinv(y, ridge=1.0), operator.adjoint(y) / 2)


def test_positions_depend_on_the_seed_unless_they_are_shared() -> None:
    own = Sensors(count=9).realize(SHAPE, [1, 2]).positions
    assert not torch.equal(own[0], own[1])
    assert torch.equal(Sensors(count=9).realize(SHAPE, [2]).positions[0], own[1])
    shared = Sensors(count=9, shared=True, shared_seed=4).realize(SHAPE, [1, 2]).positions
    assert torch.equal(shared[0], shared[1])
    assert not torch.equal(shared[0], own[0])


def test_noise_is_added_where_it_is_asked_for(x: torch.Tensor) -> None:
    noise = SampleNoise([0, 1, 2], 0, Stream.MEASUREMENT)
    exact = Sensors(count=5).realize(SHAPE, [1, 2, 3])
    assert torch.equal(exact.measure(x, noise), exact(x))
    noisy = Sensors(count=40, sigma_y=0.5).realize(SHAPE, [1, 2, 3])
    assert (noisy.measure(x, noise) - noisy(x)).std().item() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[48, 96]], r"positions: 96 lies outside a field of 2x6x8; allowed are 0 to 95"),
        ([[-1, 60]], r"positions: -1 lies outside"),
        ([[60, 48, 60]], r"positions repeat row 1, column 4 of channel 1; sensors must be distinct"),
        ([[]], r"positions are empty"),
        ([[47, 48]], r"task='inverse' has no sensors on channel 0, only on 1"),
        ([[48.0, 49.0]], r"must be integers \(batch, sensors\), got torch.float32"),
        ([48, 49], r"must be integers \(batch, sensors\), got torch.int64 \(2,\)"),
    ],
)
def test_bad_positions_are_refused(positions: list, message: str) -> None:
    dtype = torch.long if positions == [[]] else None
    with pytest.raises(ValueError, match=message):
        Sensors("inverse").with_parameters({"positions": torch.tensor(positions, dtype=dtype)}, SHAPE)


@pytest.mark.parametrize("count", [0, -3, 2.5, float("nan"), float("inf")])
def test_a_count_that_is_none_is_refused(count: float) -> None:
    with pytest.raises(ValueError, match=r"count=.* must be a number of sensors, or a fraction"):
        Sensors(count=count)


def test_grids_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(ValueError, match=r"there must be between 1 and 48"):
        Sensors(count=49).check_shape(SHAPE)
    with pytest.raises(ValueError, match=r"count=0.001 makes 0 sensors"):
        Sensors(count=0.001).check_shape(SHAPE)
    with pytest.raises(ValueError, match=r"fields of two channels \(a, u\), not images of 3"):
        Sensors(count=1).check_shape((3, 6, 8))
    with pytest.raises(ValueError, match=r"task='sideways' must be one of forward, inverse, both"):
        Sensors("sideways")
