"""The augmentation pipe: draws, alignment of all entries, strength, second order, and the adaptive rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from training.augment import AugmentPipe, adjust_p, make_augment_pipe
from training.train_config import AugmentConfig

GEOMETRY = ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac")
COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")


def only(*names: str, p: float = 1.0, **options: float) -> AugmentPipe:
    """Make a pipe with the named augmentations alone."""
    pipe = AugmentPipe(**{**{name: float(name in names) for name in GEOMETRY + COLOUR}, **options})
    pipe.p.fill_(p)
    return pipe


def disc(size: int, x: float = -0.2, y: float = 0.1, radius: float = 0.45) -> torch.Tensor:
    """Draw a disc with soft edges, 1 inside and 0 outside, [1, 1, size, size]; places in half sides from the middle."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    distance = ((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2).sqrt()
    return ((radius - distance) * size / 2 + 0.5).clamp(0, 1)[None, None]


def stacked_inputs(batch: int = 4) -> dict[str, torch.Tensor]:
    """Return a white disc on black as image and raw image, with mask and parsing map, of four sizes."""

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(batch, 1, 1, 1)

    parsing = disc(32)
    return {
        "image": repeated(disc(64)).repeat(1, 3, 1, 1) * 2 - 1,
        "image_raw": repeated(disc(32)).repeat(1, 3, 1, 1) * 2 - 1,
        "image_mask": repeated(disc(48)),
        "image_parsing": repeated(torch.cat([1 - parsing, 0.25 * parsing, 0.75 * parsing], dim=1)),
    }


def test_pipe_at_strength_zero_returns_the_images() -> None:
    images = stacked_inputs()
    images["image"] = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pipe = AugmentPipe()
    pipe.p.fill_(0.0)
    for name, augmented in pipe(images).items():
        # Places in float32 are off by up to 1e-5 pixels.
        torch.testing.assert_close(augmented, images[name], rtol=0, atol=1e-4)
    pipe.p.fill_(1.0)
    assert all((augmented - images[name]).abs().max() > 0.3 for name, augmented in pipe(images).items())


@pytest.mark.parametrize("name", GEOMETRY)
def test_pipe_keeps_all_entries_aligned_under_each_geometric_augmentation(name: str) -> None:
    torch.manual_seed(1)
    images, pipe = stacked_inputs(batch=8), only(name)
    moved = pipe(images)
    as_masks = {
        "image": (moved["image"][:, :1] + 1) / 2,
        "image_raw": (moved["image_raw"][:, :1] + 1) / 2,
        "image_mask": moved["image_mask"],
        "image_parsing": 1 - moved["image_parsing"][:, :1],
    }
    assert (moved["image"] - images["image"]).abs().amax(dim=(1, 2, 3)).max() > 0.3
    for entry, mask in as_masks.items():
        small = F.interpolate(mask, size=(16, 16), mode="area")
        expected = F.interpolate(as_masks["image"], size=(16, 16), mode="area")
        # Edges of raw images and maps are softer than those of the image: a few hundredths of an edge pixel of 4 x 4;
        # an edge out of place by one pixel of 64 would be 0.25.
        assert (small - expected).abs().max() < 0.12, entry
        assert (small - expected).mean(dim=(1, 2, 3)).abs().max() < 0.01, entry


def test_pipe_at_full_strength_keeps_the_range_of_masks_and_the_sum_of_parsing_maps() -> None:
    torch.manual_seed(2)
    images = {**stacked_inputs(batch=8), "image_mask": (stacked_inputs(8)["image_mask"] > 0.5).float()}
    moved = AugmentPipe()(images)
    for name in ("image_mask", "image_parsing"):
        assert moved[name].min() >= -1e-6 and moved[name].max() <= 1 + 1e-6  # rounding of float32
    torch.testing.assert_close(moved["image_parsing"].sum(1), torch.ones(8, 32, 32), rtol=0, atol=1e-6)
    # Classes stay in their proportion wherever there is foreground.
    torch.testing.assert_close(3 * moved["image_parsing"][:, 1], moved["image_parsing"][:, 2], rtol=0, atol=1e-5)


def test_pipe_colours_image_and_raw_image_alike_and_maps_not_at_all() -> None:
    torch.manual_seed(3)
    images = stacked_inputs()
    images["image"] = torch.tensor([0.3, -0.4, 0.1])[None, :, None, None].expand(4, 3, 64, 64)
    images["image_raw"] = images["image"][:, :, :32, :32]
    changed = only(*COLOUR)(images)
    torch.testing.assert_close(changed["image"][:, :, :32, :32], changed["image_raw"])
    assert (changed["image"] - images["image"]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    for name in ("image_mask", "image_parsing"):
        torch.testing.assert_close(changed[name], images[name], rtol=0, atol=0)


def test_pipe_keeps_the_colour_of_a_constant_image_under_all_geometry() -> None:
    torch.manual_seed(4)
    image = torch.tensor([0.3, -0.4, 0.1])[None, :, None, None].repeat(8, 1, 32, 32)
    torch.testing.assert_close(only(*GEOMETRY)(image), image, rtol=0, atol=2e-5)  # taps in float32


def test_pipe_xflip_exchanges_left_and_right_of_the_images_it_reports() -> None:
    torch.manual_seed(5)
    images, pipe = stacked_inputs(batch=16), only("xflip")
    drawn = pipe.draw(16, (64, 64))
    moved = pipe.apply_transforms(images, drawn)
    assert 2 < drawn.flipped.sum() < 14
    for name in images:
        expected = torch.where(drawn.flipped[:, None, None, None], images[name].flip(3), images[name])
        torch.testing.assert_close(moved[name], expected, rtol=0, atol=0.25)  # the sharp edge, 0.1 pixels off in images
        assert (moved[name] - expected).abs().mean() < 0.01 < (images[name] - images[name].flip(3)).abs().mean()


def twin_of_draws(seed: int, batch: int, size: tuple[int, int], p: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw and multiply the matrices of a full pipe in float64 NumPy, sample by sample, from the published list."""
    torch.manual_seed(seed)
    height, width = size

    def uniform(*shape: int) -> np.ndarray:
        return torch.rand(batch, *shape).double().numpy()

    def normal(*shape: int) -> np.ndarray:
        return torch.randn(batch, *shape).double().numpy()

    def gate(value: np.ndarray, identity: float, probability: float = p) -> np.ndarray:
        chosen = uniform() < probability
        return np.where(chosen.reshape(-1, *[1] * (value.ndim - 1)), value, identity)

    def rotation(angle: float) -> np.ndarray:
        return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])

    def translation(x: float, y: float) -> np.ndarray:
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])

    once = 1 - math.sqrt(1 - p)
    flip, quarters = gate(np.floor(uniform() * 2), 0), gate(np.floor(uniform() * 4), 0)
    whole, scale = gate((uniform(2) * 2 - 1) * 0.125, 0), gate(2 ** (normal() * 0.2), 1)
    before, aniso = gate((uniform() * 2 - 1) * np.pi, 0, once), gate(2 ** (normal() * 0.2), 1)
    after, fraction = gate((uniform() * 2 - 1) * np.pi, 0, once), gate(normal(2) * 0.125, 0)
    brightness, contrast = gate(normal() * 0.2, 0), gate(2 ** (normal() * 0.5), 1)
    luma, hue = gate(np.floor(uniform() * 2), 0), gate((uniform() * 2 - 1) * np.pi, 0)
    saturation = gate(2 ** normal(), 1)

    axis = np.ones(3) / math.sqrt(3)
    along, cross = np.outer(axis, axis), np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    inverses, colours = [], []
    for i in range(batch):
        whole_pixels = np.round(whole[i] * [width, height])
        forward = [  # in the order in which an image goes through them
            *(np.diag([1 - 2 * flip[i], 1, 1]), rotation(-np.pi / 2 * quarters[i]), translation(*whole_pixels)),
            *(np.diag([scale[i], scale[i], 1]), rotation(-before[i]), np.diag([aniso[i], 1 / aniso[i], 1])),
            *(rotation(-after[i]), translation(fraction[i, 0] * width, fraction[i, 1] * height)),
        ]
        matrix = np.eye(3)
        for step in forward:
            matrix = step @ matrix
        inverses.append(np.linalg.inv(matrix))
        linear = contrast[i] * np.eye(3)
        linear = (np.eye(3) - 2 * luma[i] * along) @ linear
        linear = (np.cos(hue[i]) * np.eye(3) + (1 - np.cos(hue[i])) * along + np.sin(hue[i]) * cross) @ linear
        linear = (along + (np.eye(3) - along) * saturation[i]) @ linear
        colour = np.eye(4)
        colour[:3, :3], colour[:3, 3] = linear, linear @ np.full(3, brightness[i])
        colours.append(colour)
    return np.stack(inverses), np.stack(colours)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_draw_matches_matrices_multiplied_in_the_published_order(p: float) -> None:
    inverse, colour = twin_of_draws(7, 32, (48, 64), p)
    pipe = AugmentPipe()
    pipe.p.fill_(p)
    torch.manual_seed(7)
    drawn = pipe.draw(32, (48, 64))
    # float32 against float64: entries up to 100 (pixels) made of eight factors.
    torch.testing.assert_close(drawn.inverse.double(), torch.from_numpy(inverse), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn.colour.double(), torch.from_numpy(colour), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "share"),
    # Half of the flips and a quarter of the quarter turns do nothing; a rotation may come before, after, or twice.
    [("xflip", 0.2), ("rotate90", 0.3), ("rotate", 0.4), ("scale", 0.4), ("hue", 0.4), ("lumaflip", 0.2)],
)
def test_draw_at_strength_changes_the_expected_share_of_images(name: str, share: float) -> None:
    torch.manual_seed(8)
    drawn = only(name, p=0.4).draw(4000, (64, 64))
    matrices, size = (drawn.inverse, 3) if name in GEOMETRY else (drawn.colour, 4)
    changed = ((matrices - torch.eye(size)).abs().amax(dim=(1, 2)) > 1e-6).float().mean().item()
    assert changed == pytest.approx(share, abs=0.031)  # four standard deviations of a share of 4000
    assert (drawn.inverse is None) == (name in COLOUR) and (drawn.colour is None) == (name in GEOMETRY)


def test_draw_with_a_strength_halves_its_probability() -> None:
    torch.manual_seed(9)
    drawn = AugmentPipe(xflip=0.5).draw(4000, (64, 64))
    assert drawn.flipped.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_draw_depends_on_the_seed_alone_and_differs_between_samples() -> None:
    pipe = AugmentPipe()
    torch.manual_seed(10)
    first = pipe.draw(16, (64, 64))
    torch.manual_seed(10)
    second = pipe.draw(16, (64, 64))
    third = pipe.draw(16, (64, 64))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for matrices, other in ((first.inverse, third.inverse), (first.colour, third.colour)):
        assert len(torch.unique(torch.cat([matrices, other]).flatten(1), dim=0)) == 32


def test_pipe_without_augmentations_draws_nothing_and_returns_the_images() -> None:
    images = stacked_inputs()
    state = torch.get_rng_state()
    augmented = only()(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(augmented[name], images[name]) for name in images)


def test_published_resampling_matches_one_tensor_of_six_channels() -> None:
    images = {name: image for name, image in stacked_inputs().items() if name in ("image", "image_raw")}
    pipe = AugmentPipe(published_resampling=True)
    torch.manual_seed(11)
    augmented = pipe(images)
    torch.manual_seed(11)
    options = {"mode": "bilinear", "align_corners": False, "antialias": True}
    six = pipe(torch.cat([images["image"], F.interpolate(images["image_raw"], size=(64, 64), **options)], dim=1))
    torch.testing.assert_close(augmented["image"], six[:, :3])
    torch.testing.assert_close(augmented["image_raw"], F.interpolate(six[:, 3:], size=(32, 32), **options))


def test_published_resampling_nearly_matches_the_usual_one() -> None:
    images, results = stacked_inputs(), []
    for published in (False, True):
        pipe = AugmentPipe(published_resampling=published)
        pipe.p.fill_(0.5)
        torch.manual_seed(12)
        results.append(pipe(images))
    usual, published = results
    assert (usual["image"] - published["image"]).abs().mean() < 5e-3  # reflected parts are a pixel apart
    assert 1e-3 < (usual["image_raw"] - published["image_raw"]).abs().mean() < 0.05  # blurred by resizing
    assert (usual["image_mask"] - published["image_mask"]).abs().mean() < 5e-3


def test_pipe_has_right_first_and_second_derivatives() -> None:
    pipe = AugmentPipe().double()
    generator = torch.Generator().manual_seed(0)
    sizes = {"image": (3, 10), "image_raw": (3, 8), "image_mask": (1, 6), "image_parsing": (2, 8)}
    inputs = [torch.randn(2, c, s, s, generator=generator, dtype=torch.float64) for c, s in sizes.values()]
    drawn = pipe.draw(2, (10, 10))

    def curved(*entries: torch.Tensor) -> torch.Tensor:
        augmented = pipe.apply_transforms(dict(zip(sizes, entries)), drawn)
        return sum(entry.sin().sum() for entry in augmented.values())

    inputs = [entry.requires_grad_() for entry in inputs]
    assert torch.autograd.gradcheck(curved, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(curved, inputs, fast_mode=True)


def test_pipe_between_images_and_discriminator_lets_r1_reach_the_weights() -> None:
    torch.manual_seed(13)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    image = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = F.softplus(F.conv2d(AugmentPipe()(image), weight)).mean(dim=(1, 2, 3))
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad.abs().max() > 0 and weight.grad.isfinite().all()


def test_pipe_of_half_precision_images_returns_half_precision() -> None:
    pipe, images = AugmentPipe(), stacked_inputs()
    torch.manual_seed(14)
    expected = pipe(images)
    torch.manual_seed(14)
    halves = pipe({name: image.bfloat16() for name, image in images.items()})
    for name, image in halves.items():
        assert image.dtype == torch.bfloat16
        assert (image.float() - expected[name]).abs().mean() < 0.02  # 8 bits


class NoCopiesFromTheHost(TorchDispatchMode):
    """Fail where a tensor is made from numbers on the host, which waits for a CUDA device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "lift_fresh" not in str(func), str(func)
        return func(*args, **(kwargs or {}))


def test_pipe_and_adjust_p_exchange_no_values_with_the_host() -> None:
    # Tensors on the meta device have no values: reading one is an error.
    pipe, mean_sign = AugmentPipe().to("meta"), torch.zeros([], device="meta")
    images = {name: image.to("meta").requires_grad_() for name, image in stacked_inputs().items()}
    with NoCopiesFromTheHost():
        total = sum(image.sin().sum() for image in pipe(images).values())
        gradients = torch.autograd.grad(total, list(images.values()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        pipe.p.copy_(adjust_p(pipe.p, mean_sign, target=0.6, num_images=4, ada_kimg=500))
    pipe.published_resampling = True
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        pipe(images)  # so that the check above can fail
    with pytest.raises(AssertionError, match="lift_fresh"), NoCopiesFromTheHost():
        torch.tensor(0.6)


@pytest.mark.gpu
def test_pipe_on_cuda_does_not_wait_and_matches_the_cpu() -> None:
    pipe, images = AugmentPipe(), stacked_inputs()
    drawn = pipe.draw(4, (64, 64))
    expected = pipe.apply_transforms(images, drawn)
    pipe.cuda()
    images = {name: image.cuda().requires_grad_() for name, image in images.items()}
    on_device = drawn._replace(inverse=drawn.inverse.cuda(), colour=drawn.colour.cuda())
    augmented = pipe.apply_transforms(images, on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = sum(image.square().sum() for image in pipe(images).values())
        gradients = torch.autograd.grad(total, list(images.values()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, image in augmented.items():
        torch.testing.assert_close(image.cpu(), expected[name], rtol=0, atol=2e-3)  # places in float32, sharp edges


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "an entry 'image'"),
        ({"image_depth": torch.zeros(4, 1, 64, 64)}, "image_depth"),
        ({"image_raw": torch.zeros(4, 3, 32, 16)}, "augmented 'image_raw': .*proportion"),
        ({"image_mask": torch.zeros(3, 1, 64, 64)}, "augmented 'image_mask': .*4 images"),
        ({"image_raw": torch.zeros(4, 4, 32, 32)}, "multiple of 3 channels"),
    ],
)
def test_pipe_of_unfit_entries_raises(change: dict[str, torch.Tensor | None], message: str) -> None:
    images = {name: image for name, image in {**stacked_inputs(), **change}.items() if image is not None}
    with pytest.raises(ValueError, match=message):
        AugmentPipe()(images)


def test_pipe_with_unfit_options_raises() -> None:
    with pytest.raises(ValueError, match="xflip"):
        AugmentPipe(xflip=-0.5)
    with pytest.raises(TypeError, match="cutout"):
        AugmentPipe(cutout=1)


def test_state_dict_has_the_published_names() -> None:
    state = AugmentPipe().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"p": (), "Hz_geom": (12,)}
    assert state["p"] == 1 and state["Hz_geom"].sum().item() == pytest.approx(1.0)


def test_make_augment_pipe_starts_as_the_mode_says() -> None:
    assert make_augment_pipe(AugmentConfig(mode="noaug")) is None
    assert make_augment_pipe(AugmentConfig(mode="ada", p=0.7)).p.item() == 0
    fixed = make_augment_pipe(AugmentConfig(mode="fixed", p=0.7), xflip=0.0)
    assert fixed.p.item() == pytest.approx(0.7) and fixed.options.xflip == 0


@pytest.mark.parametrize(
    ("p", "mean_sign", "expected"),
    [
        (0.5, 0.9, 0.500256),  # 32 images, four iterations, of 500 kimg
        (0.5, 0.1, 0.499744),
        (0.5, 0.6, 0.5),
        (0.0001, -1.0, 0.0),
        (1.0, 1.0, 1.000256),
        (0.5, math.nan, 0.5),
    ],
)
def test_adjust_p_moves_by_the_published_step(p: float, mean_sign: float, expected: float) -> None:
    moved = adjust_p(torch.tensor(p), torch.tensor(mean_sign), target=0.6, num_images=128, ada_kimg=500.0)
    torch.testing.assert_close(moved, torch.tensor(expected))
