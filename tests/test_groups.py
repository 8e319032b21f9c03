"""Groups act, invert and draw as their mathematics says."""

import pytest
import torch

from equireg.groups import GROUPS, get_group
from equireg.noise import SampleNoise, Stream


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_the_inverse_undoes_every_element(name: str) -> None:
    group = get_group(name)
    x = torch.arange(len(group.elements) * 18.0).view(-1, 2, 3, 3)
    g = torch.arange(len(group.elements))
    torch.testing.assert_close(group.transform(group.transform(x, g), group.inverse(g)), x)


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_elements_are_distinct_and_closed_under_composition(name: str) -> None:
    group = get_group(name)
    probe = torch.arange(9.0).view(3, 3)
    images = {tuple(element(probe).flatten().tolist()) for element in group.elements}
    assert len(images) == len(group.elements)
    for a in group.elements:
        for b in group.elements:
            assert tuple(a(b(probe)).flatten().tolist()) in images


def test_element_zero_is_the_identity_and_never_drawn() -> None:
    x = torch.rand(1, 1, 4, 4)
    for group in GROUPS.values():
        torch.testing.assert_close(group.transform(x, torch.tensor([0])), x)
        drawn = group.draw(SampleNoise(range(100), 0, Stream.GROUP), 100, x.device)
        assert set(drawn.tolist()) == set(group.pool)
        assert 0 not in group.pool


def test_rot90_turns_counter_clockwise_and_draws_quarter_turns() -> None:
    group = get_group("rot90")
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    torch.testing.assert_close(group.transform(x, torch.tensor([1])), torch.tensor([[[[2.0, 4.0], [1.0, 3.0]]]]))
    assert group.pool == (1, 3)
    assert get_group("rot90_full").pool == (1, 2, 3)


def test_every_image_is_moved_by_its_own_element() -> None:
    group = get_group("d4")
    x = torch.rand(8, 1, 5, 5)
    g = torch.arange(8)
    moved = group.transform(x, g)
    for i in range(8):
        torch.testing.assert_close(moved[i : i + 1], group.transform(x[i : i + 1], g[i : i + 1]))


def test_an_unknown_group_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"group='rot45' is unknown; available: d4, hflip"):
        get_group("rot45")
