import math

import pytest
import torch

from vla import keyed

MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15
MANY = 20_000
FAR = 4 / MANY**0.5  # four standard errors of a correlation, or of the mean of a unit variance


def splitmix(x):
    """SplitMix64's output function on Python's unbounded integers, cut to 64 bits after each product."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def signed(x):
    return (x & MASK) - (1 << 64) if x & 1 << 63 else x & MASK


def keys(seed=0, first=0, count=MANY):
    return keyed.derive(seed, torch.arange(first, first + count))


def correlation(a, b):
    return abs(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item())


def test_mix_equals_a_reference_in_unbounded_integers():
    random = torch.randint(-(2**63), 2**63 - 1, (500,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0, 1, -1, 2**30, 2**31, 2**63 - 1, -(2**63), -(2**63) + 1])
    for x in (random, edges):
        assert keyed.mix(x).tolist() == [signed(splitmix(value & MASK)) for value in x.tolist()]


def test_mix_of_a_counter_gives_the_published_outputs_of_splitmix64():
    states = torch.tensor([signed(1234567 + turn * GOLDEN) for turn in range(1, 6)])
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [value & MASK for value in keyed.mix(states).tolist()] == published


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63, 2**64 - 1, -1])
def test_derived_keys_equal_a_reference_for_any_seed_and_any_position(seed):
    positions = [0, 1, 2, -1, -2, 10**12, 2**62, 2**63 - 1]
    expected = [signed(splitmix(splitmix(seed + GOLDEN & MASK) + p * GOLDEN & MASK)) for p in positions]
    assert keyed.derive(seed, torch.tensor(positions)).tolist() == expected


def test_bits_equal_a_reference():
    key = [0, 5, -7, -(2**63)]
    for stream in (keyed.FLOW_NOISE, keyed.FLOW_TIME):
        starts = [splitmix(k + (stream + 1) * 0xD1342543DE82EF95 & MASK) for k in key]
        expected = [[signed(splitmix(s + n * GOLDEN & MASK)) for n in range(1, 7)] for s in starts]
        bits = keyed.bits(torch.tensor(key), stream, (2, 3))
        assert bits.shape == (4, 2, 3)
        assert bits.flatten(1).tolist() == expected


@pytest.mark.parametrize("draw", [keyed.uniform, keyed.normal])
def test_same_key_gives_the_same_numbers_whatever_was_drawn_before(draw):
    first = draw(keys(count=9), keyed.FLOW_NOISE, (4, 3))
    torch.manual_seed(123)
    draw(keys(seed=8), keyed.FLOW_TIME)
    before = torch.get_rng_state()
    assert torch.equal(draw(keys(count=9), keyed.FLOW_NOISE, (4, 3)), first)
    assert torch.equal(torch.get_rng_state(), before)  # and takes nothing from the global generator


@pytest.mark.parametrize("draw", [keyed.uniform, keyed.normal])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (16, 7)])
def test_numbers_of_a_key_do_not_depend_on_the_batch_that_it_is_in(draw, shape):
    key = keys(count=37)
    batch = draw(key, keyed.FLOW_NOISE, shape)
    assert batch.shape == (37, *shape)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.cat([draw(one, keyed.FLOW_NOISE, shape) for one in key[:, None]]))
    assert torch.equal(batch.flip(0), draw(key.flip(0), keyed.FLOW_NOISE, shape))


def test_no_key_and_no_number_comes_twice():
    seeds = [keys(seed=seed) for seed in (0, 1, 2, 2**32)]
    positions = torch.cat([*seeds, keys(first=-MANY), keys(first=10**12)])
    assert len(positions.unique()) == 6 * MANY
    streams = (keyed.FLOW_NOISE, keyed.FLOW_TIME, keyed.AUGMENT)
    bits = torch.stack([keyed.bits(positions[::10], stream, (5,)) for stream in streams])
    assert len(bits.unique()) == bits.numel()


NEIGHBOURS = {
    "the next position": lambda draw: (draw(keys(), 0), draw(keys(first=1), 0)),
    "the next epoch": lambda draw: (draw(keys(), 0), draw(keys(first=MANY), 0)),
    "the next seed": lambda draw: (draw(keys(0), 0), draw(keys(1), 0)),
    "the other stream": lambda draw: (draw(keys(), keyed.FLOW_NOISE), draw(keys(), keyed.FLOW_TIME)),
    "the next number of a sample": lambda draw: draw(keys(), 0, (2,)).unbind(1),
}


@pytest.mark.parametrize("draw", [keyed.uniform, keyed.normal])
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_numbers_tell_nothing_about_their_neighbours(draw, neighbour):
    a, b = NEIGHBOURS[neighbour](draw)
    assert (a != b).float().mean() > 0.999
    assert correlation(a, b) < FAR
    assert correlation((a - a.mean()).square(), (b - b.mean()).square()) < FAR


def test_uniform_is_uniform_in_zero_to_one():
    u = keyed.uniform(keys(), keyed.FLOW_TIME, (10,)).double().flatten()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 1 / 2) < 0.002
    assert abs(u.var() - 1 / 12) < 0.001
    counts = torch.histc(u, 100, 0, 1)
    assert (counts / len(u) * 100 - 1).abs().max() < 0.1
    assert torch.histc(keyed.uniform(keys(), 0), 16, 0, 1).min() > MANY / 16 * 0.85  # the first number of a sample too


def test_normal_is_standard_normal():
    x = keyed.normal(keys(), keyed.FLOW_NOISE, (10,)).double().flatten()
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert abs((x**3).mean()) < 0.03
    assert abs((x**4).mean() - 3) < 0.1
    ordered, share = x.sort().values, (torch.arange(len(x)) + 0.5) / len(x)
    assert (torch.special.ndtr(ordered) - share).abs().max() < 1.63 / len(x) ** 0.5  # Kolmogorov and Smirnov, 1 %


@pytest.mark.parametrize("word", [0, -1, 2**63 - 1, -(2**63), 0xFFFFFF << 16])
def test_extreme_bits_give_numbers_within_bounds(monkeypatch, word):
    monkeypatch.setattr(keyed, "bits", lambda key, stream, shape: torch.full((len(key), *shape), word))
    u, x = keyed.uniform(keys(count=1), 0, (1,)), keyed.normal(keys(count=1), 0, (1,))
    assert 0 <= u.item() < 1
    assert abs(x.item()) <= math.sqrt(48 * math.log(2)) + 1e-5  # the radius of the smallest of 2^24 uniform numbers


# ---- Permutations.


def permuted(size, key):
    return keyed.permute(torch.arange(size), size, torch.full((size,), key))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, -1, 2**62])
def test_permutation_reaches_every_place_once(size, key):
    assert permuted(size, key).sort().values.tolist() == list(range(size))


def test_permutation_leaves_its_arguments_alone():
    index, key = torch.arange(5), torch.arange(5)
    keyed.permute(index, 5, key)
    assert index.tolist() == key.tolist() == list(range(5))


@pytest.mark.parametrize("size", [64, 1000, 4097])
def test_permutations_look_shuffled_and_differ_between_keys(size):
    identity, first, second = torch.arange(size), permuted(size, 10), permuted(size, 11)
    for a, b in ((identity, first), (identity, second), (first, second)):
        assert (a == b).float().mean() < 5 / size + 0.01  # about one place in `size` agrees by chance
        assert correlation(a, b) < 4 / size**0.5
    assert (first.diff() == 1).float().mean() < 5 / size + 0.01  # neighbours are torn apart


@pytest.mark.parametrize("size", [2, 3, 5, 8, 10])
def test_every_index_goes_to_every_place_equally_often(size):
    key = keyed.derive(0, torch.arange(MANY))
    for index in range(size):
        places = keyed.permute(torch.full((MANY,), index), size, key)
        share = torch.bincount(places, minlength=size) * size / MANY
        assert (share - 1).abs().max() < 0.1, (index, share)  # a network of few rounds is not quite fair on few bits


def test_place_of_an_index_does_not_depend_on_what_is_permuted_beside_it():
    index, key = torch.arange(1000), keys(count=1000)
    together = keyed.permute(index, 1000, key)
    assert together.tolist() == [keyed.permute(i[None], 1000, k[None]).item() for i, k in zip(index, key, strict=True)]
