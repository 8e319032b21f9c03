"""A sample's random numbers depend on (seed, index, draw, stream) alone."""

import torch

from equireg.noise import SampleNoise, Stream, hash_seed

LIKE = torch.zeros(1)


def test_a_sample_draws_the_same_numbers_in_any_batch() -> None:
    together = SampleNoise([3, 1, 7], 0, Stream.SAMPLER)
    alone = SampleNoise([1], 0, Stream.SAMPLER)
    for _ in range(2):
        torch.testing.assert_close(together.randn((2, 4), LIKE)[1], alone.randn((2, 4), LIKE)[0], rtol=0, atol=0)


def test_seeds_streams_indices_and_draws_give_different_numbers() -> None:
    def first(index: int = 0, seed: int = 0, stream: Stream = Stream.SAMPLER, draw: int = 0) -> float:
        return SampleNoise([index], seed, stream, [draw]).randn((1,), LIKE).item()

    values = {first(), first(index=1), first(seed=1), first(stream=Stream.GROUP), first(draw=1)}
    assert len(values) == 5


def test_numbers_are_standard_normal() -> None:
    draws = SampleNoise(range(200), 0, Stream.SAMPLER).randn((500,), LIKE)
    assert abs(draws.mean()) < 0.01  # 100 000 draws: standard error 0.003
    assert abs(draws.std() - 1) < 0.01


def test_integers_are_uniform_and_per_sample() -> None:
    numbers = SampleNoise(range(3000), 0, Stream.GROUP).randint(3, torch.device("cpu"))
    assert numbers.bincount(minlength=3).min() > 900
    assert SampleNoise([17], 0, Stream.GROUP).randint(3, torch.device("cpu")) == numbers[17]


def test_poisson_counts_have_the_asked_expectation() -> None:
    rate = torch.tensor([2.0, 50.0]).repeat(2000, 1)
    counts = SampleNoise(range(2000), 0, Stream.MEASUREMENT).poisson(rate)
    torch.testing.assert_close(counts.mean(0), rate[0], rtol=0.03, atol=0)


def test_nearby_seeds_hash_far_apart() -> None:
    assert len({hash_seed(0, 1, index, 0) >> 32 for index in range(1000)}) > 990
