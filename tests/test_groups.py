"""Groups act, invert and draw as their mathematics says."""

import pytest
import torch

from equireg.groups import GROUPS, get_group
from equireg.noise import SampleNoise, Stream


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_the_inverse_undoes_every_element(name: str) -> None:
    group = get_group(name)
    x = torch.arange(len(group.elements) * 128.0).view(-1, 2, 8, 8)
    g = torch.arange(len(group.elements))
    torch.testing.assert_close(group.transform(group.transform(x, g), group.inverse(g)), x)


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_elements_are_distinct_and_closed_under_composition(name: str) -> None:
    group = get_group(name)
    probe = torch.arange(64).view(8, 8)
    images = {tuple(element(probe).flatten().tolist()) for element in group.elements}
    assert len(images) == len(group.elements)
    for a in group.elements:
        for b in group.elements:
            assert tuple(a(b(probe)).flatten().tolist()) in images


def test_element_zero_is_the_identity_and_never_drawn() -> None:
    x = torch.rand(1, 1, 8, 8)
    for group in GROUPS.values():
        torch.testing.assert_close(group.transform(x, torch.tensor([0])), x)
        drawn = group.draw(SampleNoise(range(400), 0, Stream.GROUP), 400, x.device)
        assert set(drawn.tolist()) == set(group.pool)
        assert 0 not in group.pool


def test_rot90_turns_counter_clockwise_and_draws_quarter_turns() -> None:
    group = get_group("rot90")
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    torch.testing.assert_close(group.transform(x, torch.tensor([1])), torch.tensor([[[[2.0, 4.0], [1.0, 3.0]]]]))
    assert group.pool == (1, 3)
    assert get_group("rot90_full").pool == (1, 2, 3)


@pytest.mark.parametrize("name", ["d4", "navier_stokes_exact"])
def test_every_image_is_moved_by_its_own_element(name: str) -> None:
    group = get_group(name)
    x = torch.rand(8, 1, 16, 16)
    g = torch.arange(8)
    moved = group.transform(x, g)
    for i in range(8):
        torch.testing.assert_close(moved[i : i + 1], group.transform(x[i : i + 1], g[i : i + 1]))


@pytest.mark.parametrize("number", range(8))
def test_elements_of_the_torus_move_points_as_their_definition_says(number: int) -> None:
    element = get_group("navier_stokes_exact").elements[number]
    w, n = torch.rand(16, 16), 16
    moved = element(w)
    for i, j in ((0, 0), (3, 7), (15, 2)):
        if element.name == "identity":
            expected = w[i, j]
        else:
            p, q = (j, i) if element.swap else (i, j)
            p, q = (-p, -q) if element.negate else (p, q)
            expected = element.sign * w[(p + element.shift[0] * n // 8) % n, (q + element.shift[1] * n // 8) % n]
        assert moved[i, j] == expected


def test_groups_refuse_the_sides_that_their_elements_cannot_act_on() -> None:
    with pytest.raises(ValueError, match=r"'navier_stokes_exact' .* must be a multiple of 8, not 60x60"):
        get_group("navier_stokes_exact").check_shape((2, 60, 60))
    with pytest.raises(ValueError, match=r"element antireflection .* multiple of 8, not 12x12"):
        get_group("navier_stokes_exact").elements[1](torch.zeros(12, 12))
    with pytest.raises(ValueError, match="must be square, not 8x16"):
        get_group("navier_stokes_exact").check_shape((2, 8, 16))
    get_group("helmholtz_d4").check_shape((2, 33, 33))


def test_an_unknown_group_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"group='rot45' is unknown; available: d4, flip, helmholtz_d4"):
        get_group("rot45")
