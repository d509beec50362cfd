import math

import pytest
import torch

from vla import InputError, keyed
from vla.config import AugmentConfig, DataConfig, TrainConfig
from vla.data.augment import augment, check_shift
from vla.options import validate

MANY = 2000
COLOR = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.5, "hue": 0.2}
GEOMETRY = {"shift": 0.2, "crop": 0.3, "rotate": 25.0}
DRAWS = ("brightness", "contrast", "saturation", "hue", "right", "down", "cut", "left", "top", "rotate")  # in order
EACH = [pytest.param(AugmentConfig(**{name: value}), id=name) for name, value in (COLOR | GEOMETRY).items()]
ALL = AugmentConfig(**COLOR, **GEOMETRY)


def keys(count, first=0):
    return keyed.derive(3, torch.arange(first, first + count))


def noise(*shape, low=0, high=256):
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def augmented(picture, key, **strengths):
    """One picture [3, h, w] changed by each key -> int64 [B, 3, h, w]."""
    images = picture.expand(len(key), 1, *picture.shape)
    return augment(images, key, AugmentConfig(**strengths))[:, 0].long()


def strength_for(name, wanted, key):
    """The strength with which this key's number makes a change of exactly `wanted`."""
    return wanted / (2 * keyed.uniform(key, keyed.AUGMENT, (1, len(DRAWS)))[0, 0, DRAWS.index(name)].item() - 1)


def assert_uniform(values, low, high):
    """`values` lie in [low, high], reach both ends, and have the mean and variance of uniform numbers."""
    values = (values.double() - low) / (high - low)
    assert values.min() > -0.02
    assert values.min() < 0.03
    assert values.max() > 0.97
    assert values.max() < 1.02
    assert abs(values.mean() - 1 / 2) < 4 / (12 * len(values)) ** 0.5
    assert abs(values.var() - 1 / 12) < 0.012


def test_no_strength_returns_the_very_input():
    images = noise(2, 2, 3, 4, 6)
    assert augment(images, keys(2), AugmentConfig()) is images
    assert augment(images, keys(2), DataConfig().augment) is images


@pytest.mark.parametrize("config", [*EACH, pytest.param(ALL, id="all")])
def test_result_is_new_images_of_the_same_type_and_differs_by_key_and_by_camera(config):
    images = noise(1, 1, 3, 40, 60).expand(5, 2, 3, 40, 60).clone()
    before = images.clone()
    result = augment(images, keys(5), config)
    assert result.dtype == torch.uint8
    assert result.shape == images.shape
    assert torch.equal(images, before)
    assert len(result.flatten(0, 1).unique(dim=0)) == 10  # all different
    assert (result.flatten(0, 1) != images.flatten(0, 1)).flatten(1).any(1).all()


@pytest.mark.parametrize("config", [*EACH, pytest.param(ALL, id="all")])
@pytest.mark.parametrize("size", [(7, 5), (48, 64)])
def test_result_of_a_sample_has_the_same_bits_in_any_batch_and_order(config, size):
    images, key = noise(9, 2, 3, *size), keys(9)
    result = augment(images, key, config)
    assert torch.equal(augment(images, key, config), result)
    assert torch.equal(augment(images.flip(0), key.flip(0), config).flip(0), result)
    alone = [augment(images[i : i + 1], key[i : i + 1], config) for i in range(9)]
    assert torch.equal(torch.cat(alone), result)
    first_camera = augment(images[:, :1], key, config)
    assert torch.equal(first_camera, result[:, :1])


@pytest.mark.parametrize("size", [(20, 40), (40, 20)])
def test_shift_moves_whole_pixels_up_to_its_share_and_repeats_edges(size):
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([6 * x, 6 * y, 250 * ((x + y) % 2)])
    result = augmented(picture.to(torch.uint8), keys(MANY), shift=0.15)
    right = x[0, width // 2] - result[:, 0, height // 2, width // 2] // 6
    down = y[height // 2, 0] - result[:, 1, height // 2, width // 2] // 6
    for i in range(0, MANY, 10):
        from_y, from_x = (y - down[i]).clamp(0, height - 1), (x - right[i]).clamp(0, width - 1)
        assert torch.equal(result[i], picture[:, from_y, from_x])
    for moved, largest in ((right, int(0.15 * width)), (down, int(0.15 * height))):
        values, counts = moved.unique(return_counts=True)
        assert values.tolist() == list(range(-largest, largest + 1))
        assert (counts / MANY * len(values) - 1).abs().max() < 5 * (len(values) / MANY) ** 0.5
    assert abs(torch.corrcoef(torch.stack([right, down]).double())[0, 1]) < 4 / MANY**0.5


def test_shift_reaches_its_share_where_floats_fall_short():
    picture = torch.zeros(3, 3, 100, dtype=torch.uint8)  # 0.29 * 100 is 28.999999999999996
    picture[:, :, 50] = 255
    places = augmented(picture, keys(1000), shift=0.29)[:, 0, 1].argmax(1)
    assert (places.min(), places.max()) == (21, 79)


@pytest.mark.parametrize(("size", "idle", "least"), [((64, 64), 0.01, 0.0157), ((48, 100), 0.0099, 0.01)])
def test_shift_of_less_than_a_pixel_is_refused_with_the_least_that_acts(size, idle, least):
    with pytest.raises(InputError, match=f"shift {idle} of images of {size[0]}x{size[1]} .* at least {least}, or"):
        check_shift(AugmentConfig(shift=idle), size)
    for config in (AugmentConfig(), AugmentConfig(shift=least)):
        check_shift(config, size)
    picture = torch.arange(3 * size[0] * size[1]).to(torch.uint8).view(3, *size)
    moved = [(augmented(picture, keys(9), shift=shift) != picture).any() for shift in (idle, least)]
    assert moved == [False, True]


@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_crop_scales_up_a_window_that_may_lie_anywhere_within_the_image(size):
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    result = augmented(torch.stack([5 * x, 5 * y, 0 * x]).to(torch.uint8), keys(MANY), crop=0.4).double() / 5
    first, last = result[:, :2, 2, 2], result[:, :2, -3, -3]  # the places where two pixels were; [B, (x, y)]
    zoom = (last - first) / torch.tensor([width - 5, height - 5])
    assert (zoom[:, 0] - zoom[:, 1]).abs().max() < 0.03  # the aspect stays
    assert_uniform(1 - zoom[:, 0], 0, 0.4)
    sizes, zoom = torch.tensor([width, height]), zoom.mean(1, keepdim=True)
    window = first + 0.5 - 2.5 * zoom  # its left upper corner
    narrow = zoom[:, 0] < 0.7
    for place in (window / (sizes * (1 - zoom)))[narrow].unbind(1):
        assert_uniform(place, 0, 1)
    middle = result[:, 0, height // 2]
    assert ((middle[:, 1:-1] - middle[:, 2:]) < 0).all()  # no edge is repeated


@pytest.mark.parametrize("degrees", [90.0, -90.0, 180.0, 30.0, -17.0])
@pytest.mark.parametrize("size", [(40, 64), (64, 40)])
def test_rotation_turns_the_picture_in_pixels_about_its_centre(degrees, size):
    height, width = size
    key = keys(1)
    x, y = torch.arange(width) - (width - 1) / 2, torch.arange(height)[:, None] - (height - 1) / 2
    for dot_x, dot_y in ((10, 0), (-4, 12)):  # to the right, and downwards, of the centre
        picture = 250 * torch.exp(-((x - dot_x).square() + (y - dot_y).square()) / 4)
        picture = picture.round().to(torch.uint8).expand(3, height, width)
        result = augmented(picture, key, rotate=strength_for("rotate", degrees, key))[0, 0]
        place = torch.stack([(result * axis).sum() / result.sum() for axis in (x, y)])
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        expected = torch.tensor([cos * dot_x + sin * dot_y, cos * dot_y - sin * dot_x])  # counter-clockwise
        assert (place - expected).abs().max() < 0.05
        assert abs(result.sum() / picture[0].sum() - 1) < 0.02


def test_rotation_is_uniform_up_to_its_degrees_either_way():
    x, y = torch.arange(48) - 23.5, torch.arange(32)[:, None] - 15.5
    picture = (250 * torch.exp(-((x - 12).square() + y.square()) / 4)).round().to(torch.uint8).expand(3, 32, 48)
    result = augmented(picture, keys(MANY), rotate=40.0)[:, 0]
    angle = torch.atan2(-(result * y).sum((1, 2)), (result * x).sum((1, 2))).rad2deg()
    assert_uniform(angle, -40, 40)


def test_geometry_applies_crop_then_rotation_then_shift():
    x, y = torch.arange(64) - 31.5, torch.arange(64)[:, None] - 31.5
    waves = torch.stack([torch.sin(x / 9) + 0 * y, torch.cos(y / 7) + 0 * x, torch.sin((x + y) / 11)])
    picture, key = (127 + 120 * waves).round().to(torch.uint8)[None, None], keys(40)
    steps = picture.expand(40, 1, 3, 64, 64)
    together = augment(steps, key, AugmentConfig(**GEOMETRY))
    for name, value in (("crop", 0.3), ("rotate", 25.0), ("shift", 0.2)):
        steps = augment(steps, key, AugmentConfig(**{name: value}))
    inner = (..., slice(25, 39), slice(25, 39))  # where no edge comes
    assert (together[inner].int() - steps[inner].int()).abs().max() <= 3


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_leaves_colours(name):
    picture = torch.tensor([0, 200, 255], dtype=torch.uint8)[:, None, None].expand(3, 9, 13)
    assert (augmented(picture, keys(50), **{name: GEOMETRY[name]}) == picture).all()


def gray(picture):
    return 0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2]


def turned(picture, share):
    """Hue by its textbook definition: a rotation of the plane of I and Q."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]).double()
    cos, sin = math.cos(2 * math.pi * share), math.sin(2 * math.pi * share)
    turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]).double()  # from red to green
    return torch.einsum("ij,jhw->ihw", to_yiq.inverse() @ turn @ to_yiq, picture)


REFERENCES = {
    "brightness": lambda x, change: (1 + change) * x,
    "contrast": lambda x, change: gray(x).mean() + (1 + change) * (x - gray(x).mean()),
    "saturation": lambda x, change: gray(x) + (1 + change) * (x - gray(x)),
    "hue": turned,
}


@pytest.mark.parametrize("change", [-0.4, 0.3, 1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("low", [0, 90])
def test_colours_change_pixel_by_pixel_as_defined(name, change, low):
    picture, key = noise(3, 11, 17, low=low, high=256 - low), keys(1)
    picture[1] //= 2  # not gray on average
    result = augmented(picture, key, **{name: strength_for(name, change, key)})[0]
    expected = REFERENCES[name](picture.double(), change).clamp(0, 255)
    assert (result - expected).abs().max() < (0.501 if name != "hue" else 0.7)


@pytest.mark.parametrize("name", ["saturation", "hue"])
def test_saturation_and_hue_leave_gray_pixels(name):
    picture = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    assert (augmented(picture, keys(200), **{name: 0.5}) == picture).all()


def test_hue_leaves_all_pixels_after_a_full_turn():
    picture, key = noise(3, 16, 16), keys(1)
    for turns in (1, -1):
        assert torch.equal(augmented(picture, key, hue=strength_for("hue", turns, key))[0], picture.long())


@pytest.mark.parametrize("name", ["contrast", "saturation", "hue"])
def test_mean_gray_stays(name):
    picture = noise(3, 32, 32, low=100, high=150)
    means = torch.stack([gray(result.double()).mean() for result in augmented(picture, keys(50), **{name: 0.5})])
    assert (means - gray(picture.double()).mean()).abs().max() < 0.1


def angle(color):
    """Of a colour [3, …] in the plane of U and V, as a share of the circle, from red towards green."""
    return torch.atan2(0.877 * (color[0] - gray(color)), 0.492 * (color[2] - gray(color))) / (2 * math.pi)


MEASURES = {  # of an image whose left half is reddish and whose right half is gray
    "brightness": lambda before, left, right: right[0] / before[0, 0, -1] - 1,
    "contrast": lambda before, left, right: gray(right - left) / gray(before[:, 0, -1] - before[:, 0, 0]) - 1,
    "saturation": lambda before, left, right: (left[0] - left[1]) / (before[0, 0, 0] - before[1, 0, 0]) - 1,
    "hue": lambda before, left, right: (angle(left) - angle(before[:, 0, 0]) + 0.5) % 1 - 0.5,
}


@pytest.mark.parametrize("name", COLOR)
def test_colour_changes_are_uniform_up_to_their_strength_either_way(name):
    picture = torch.full((3, 2, 8), 195, dtype=torch.uint8)
    picture[:, :, :4] = torch.tensor([165, 90, 90])[:, None, None]
    result = augmented(picture, keys(MANY), **{name: COLOR[name]}).double()
    change = MEASURES[name](picture.double(), result[:, :, 0, 0].T, result[:, :, 0, -1].T)
    assert_uniform(change, -COLOR[name], COLOR[name])


@pytest.mark.parametrize("parts", [[{name: value} for name, value in COLOR.items()], [COLOR, GEOMETRY]])
def test_all_changes_together_are_those_of_each_alone(parts):
    smooth = torch.linspace(90, 150, 24).expand(16, 24)
    images = torch.stack([smooth, 240 - smooth, smooth.flip(1) - 10]).to(torch.uint8).expand(20, 2, 3, 16, 24)
    together = augment(images, keys(20), AugmentConfig(**{name: v for part in parts for name, v in part.items()}))
    for part in parts:
        images = augment(images, keys(20), AugmentConfig(**part))
    assert (together.int() - images.int()).abs().max() <= 4  # each rounds


BOUNDS = {"shift": 0.5, "crop": 0.5, "rotate": 180.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}


@pytest.mark.parametrize("name", BOUNDS)
def test_strength_out_of_bounds_is_refused_with_its_flag(name):
    def given(value):
        data = DataConfig(path="data", augment=AugmentConfig(**{name: value}))
        return TrainConfig(run_dir="run", steps=1, data=data)

    validate(given(BOUNDS[name]))
    for value in (-0.01, BOUNDS[name] + 0.01, math.nan):
        with pytest.raises(InputError, match=f"--data.augment.{name} is {value}; expected"):
            validate(given(value))
