"""The parts of an inversion: shared generators, cameras, layer noise, statistics of w, the loss."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import camera_utils
from inference.inversion_camera import CameraRefinement
from inference.inversion_generator import share_generator, trainable, with_ray_start
from inference.inversion_loss import ImageLoss
from inference.inversion_noise import initial_noise, noise_correlation, noise_names, normalize_noise_
from inference.inversion_settings import TUNABLE_PARTS, CameraSettings
from inference.inversion_statistics import measure_w, shift_as_published
from inference.photos import Photo
from tests.helpers.inversion import AreaDistance, view_label
from tests.helpers.tiny import latents, tiny_config, tiny_network
from training.networks_stylegan2 import SynthesisNetwork


@pytest.fixture(scope="module")
def network():
    """Return a small generator with all parts."""
    return tiny_network(parsing_classes=4)


# ---- shared generators ----


def test_shared_generator_has_own_tensors_for_tuned_parts_alone(network):
    shared = share_generator(network, tuned=("decoder",))
    base = dict(network.named_parameters())
    own = {name for name, value in shared.named_parameters() if value.data_ptr() != base[name].data_ptr()}
    assert own == set(trainable(shared)) == {name for name in base if name.startswith("decoder.")}
    assert all(torch.equal(value, shared.state_dict()[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        shared.decoder.net[0].weight.zero_()
    assert float(network.decoder.net[0].weight.detach().abs().max()) > 0


def test_tunable_parts_are_all_parameters_that_images_depend_on(network):
    shared = share_generator(network, tuned=TUNABLE_PARTS)
    ws = network.mapping(latents(1), view_label(0)).detach()
    shared.synthesis(ws, view_label(0), noise_mode="const")["image"].sum().backward()
    tuned = {name for name, parameter in shared.named_parameters() if parameter.grad is not None}
    full = copy.deepcopy(network).requires_grad_(True)
    full.synthesis(ws, view_label(0), noise_mode="const")["image"].sum().backward()
    assert tuned == {name for name, parameter in full.named_parameters() if parameter.grad is not None}
    assert tuned <= set(trainable(shared))


def test_shared_generator_does_not_change_the_original(network):
    config, requires = network.config, [parameter.requires_grad for parameter in network.parameters()]
    name = noise_names(network)[1]
    noise = torch.ones_like(dict(network.named_buffers())[name])
    shared = share_generator(network, tuned=("background",), ray_start=2.4, noise_buffers={name: noise})
    assert shared.rendering_kwargs["ray_start"] == 2.4 and network.config == config
    assert torch.equal(dict(shared.named_buffers())[name], noise)
    assert not torch.equal(dict(network.named_buffers())[name], noise)
    noise.zero_()
    assert float(dict(shared.named_buffers())[name].mean()) == 1
    assert [parameter.requires_grad for parameter in network.parameters()] == requires
    assert isinstance(shared.backbone.synthesis, SynthesisNetwork) and shared.toparsing is not None


def test_shared_generator_with_noise_that_does_not_fit_raises(network):
    with pytest.raises(ValueError, match="layer noise 'nothing': expected shape None"):
        share_generator(network, noise_buffers={"nothing": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match=r"layer noise 'backbone.* expected shape \(4, 4\), got \(8, 8\)"):
        share_generator(network, noise_buffers={noise_names(network)[0]: torch.zeros(8, 8)})


@pytest.mark.parametrize(
    "own, asked, expected",
    [((2.25, 3.3), None, 2.35), ((2.0, 3.3), None, 2.0), ((2.25, 3.3), 2.25, 2.25), (("auto", "auto"), None, "auto")],
)
def test_ray_start_is_the_published_where_the_range_is(own, asked, expected):
    config = tiny_config(ray_start=own[0], ray_end=own[1])
    assert with_ray_start(config, asked).rendering.ray_start == expected


def test_ray_start_that_does_not_fit_raises():
    with pytest.raises(ValueError, match="ray_start: expected none for a network whose rays are limited by its box"):
        with_ray_start(tiny_config(ray_start="auto", ray_end="auto"), 2.3)


# ---- cameras ----


def test_refined_camera_without_unknowns_is_the_given_one():
    label = view_label(30, 10)
    assert torch.equal(CameraRefinement(label, CameraSettings(refine=True)).label(), label)


def test_refined_camera_turns_around_the_head_shifts_and_zooms():
    settings = CameraSettings(refine=True, rotation_deg=2.0, translation=0.1, log_focal=0.5)
    refinement = CameraRefinement(view_label(30), settings)
    with torch.no_grad():
        refinement.unknowns.copy_(torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0]))  # 10 degrees around y
    torch.testing.assert_close(refinement.label(), view_label(40), rtol=0, atol=1e-6)  # float32
    with torch.no_grad():
        refinement.unknowns.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, -2.0, 2.0]))
    cam2world, intrinsics = camera_utils.split_label(refinement.label())
    before, focal = camera_utils.split_label(view_label(30))
    moved = torch.linalg.inv(before[0]) @ cam2world[0, :, 3]
    torch.testing.assert_close(moved, torch.tensor([0.1, 0.0, -0.2, 1.0]), rtol=0, atol=1e-6)
    expected = focal[0] * torch.tensor([[math.e, 1, 1], [1, math.e, 1], [1, 1, 1]])
    torch.testing.assert_close(intrinsics[0], expected, rtol=1e-6, atol=0)


def test_refined_camera_stays_a_camera_and_has_gradients():
    refinement = CameraRefinement(view_label(30), CameraSettings(refine=True))
    with torch.no_grad():
        refinement.unknowns.copy_(torch.linspace(-8, 8, 7))
    camera_utils.check_label(refinement.label(), rotation_tolerance=1e-5)
    refinement.label().square().sum().backward()
    assert bool(refinement.unknowns.grad.isfinite().all())
    assert refinement.penalty().item() == pytest.approx(float(torch.linspace(-8, 8, 7).square().sum()))


def test_refined_camera_gradients_are_those_of_differences():
    settings = CameraSettings(refine=True, rotation_deg=20.0, translation=0.3, log_focal=0.3)
    refinement = CameraRefinement(view_label(30, 5).double(), settings)

    def label(unknowns):
        refinement.unknowns = unknowns
        return refinement.label()

    torch.autograd.gradcheck(label, torch.linspace(-0.5, 0.7, 7, dtype=torch.float64).requires_grad_(True))


def test_unit_of_zero_keeps_that_part_of_the_camera():
    refinement = CameraRefinement(view_label(30), CameraSettings(refine=True, log_focal=0.0, translation=0.0))
    with torch.no_grad():
        refinement.unknowns.fill_(1.0)
    cam2world, intrinsics = camera_utils.split_label(refinement.label())
    assert torch.equal(intrinsics, camera_utils.split_label(view_label(30))[1])
    assert float(cam2world[0, :3, 3].norm()) == pytest.approx(camera_utils.TRAINING_RADIUS)


# ---- layer noise ----


def naive_correlation(noise: np.ndarray) -> float:
    """Compute the sum of the pyramid with loops."""
    size, total = noise.shape[0], 0.0
    for axis in (0, 1):
        products = [
            noise[i, j] * (noise[i - 1, j] if axis == 0 else noise[i, j - 1]) for i in range(size) for j in range(size)
        ]
        total += np.mean(products) ** 2
    if size <= 8:
        return total
    return total + naive_correlation(noise.reshape(size // 2, 2, size // 2, 2).mean(axis=(1, 3)))


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_noise_correlation_is_that_of_loops(size):
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    assert float(noise_correlation(noise)) == pytest.approx(naive_correlation(noise.numpy()), rel=1e-10)


def test_noise_of_a_backbone_is_seeded_and_normal(network):
    first, again, other = initial_noise(network, 1), initial_noise(network, 1), initial_noise(network, 2)
    assert list(first) == noise_names(network) and len(first) == 5  # 4, 8, 8, 16, 16
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    noise = first[noise_names(network)[-1]] * 3 + 1
    normalize_noise_(noise)
    assert float(noise.mean()) == pytest.approx(0, abs=1e-6) and float(noise.std()) == pytest.approx(1, abs=5e-3)


# ---- statistics of w ----


def test_w_statistics_are_those_of_all_samples_at_once(network):
    measured = measure_w(network, 1234, 7)
    z = torch.from_numpy(np.random.RandomState(7).randn(1234, network.z_dim)).float()
    with torch.no_grad():
        w = network.mapping(z, view_label(0).expand(1234, -1))[:, 0].double()
    mean = w.mean(dim=0)
    std = ((w - mean).square().sum() / 1234).sqrt()
    # the published frontal camera, with 3.14 for pi, is 0.1 degrees from the front
    torch.testing.assert_close(measured.mean[0, 0].double(), mean, rtol=2e-3, atol=2e-3)
    assert measured.mean.shape == (1, 1, 512)
    assert measured.std == pytest.approx(float(std), rel=1e-3)


def test_published_shift_is_that_of_the_mean_latent(network):
    z = torch.from_numpy(np.random.RandomState(3).randn(700, network.z_dim).mean(axis=0, keepdims=True))
    label = view_label(15)
    expected, _ = network.apply_delta_c(z.float(), label)
    # means of latents are summed in another order; they are tiny, and scaled to unit length
    torch.testing.assert_close(shift_as_published(network, label, 700, 3), expected.detach(), rtol=1e-5, atol=1e-5)


# ---- the loss ----


def test_image_loss_with_mask_weighs_pixels():
    random = torch.Generator().manual_seed(0)
    target, image = torch.randn(2, 1, 3, 16, 16, generator=random, dtype=torch.float64)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    mask[..., :8] = 1
    photo = Photo(name="a", image=target, label=view_label(0), mask=mask)
    opacity = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    terms = ImageLoss(photo, AreaDistance(), 0.25, 1.0)({"image": image, "image_mask": opacity})
    weight = 0.25 + 0.75 * mask
    distance = AreaDistance()
    mixed = target + weight * (image - target)
    assert float(terms["mse"]) == pytest.approx(float((weight * (image - target) ** 2).mean()))
    assert float(terms["perceptual"]) == pytest.approx(float(distance.distance(mixed, distance.features(target))))
    assert float(terms["silhouette"]) == pytest.approx(0.25)
    image.requires_grad_(True)
    ImageLoss(photo, distance, 0.0, 0.0)({"image": image})["perceptual"].backward()
    assert float(image.grad[..., 8:].abs().max()) == 0 < float(image.grad[..., :8].abs().min())


def test_image_loss_without_mask_is_the_published():
    random = torch.Generator().manual_seed(0)
    target, image = torch.randn(2, 1, 3, 16, 16, generator=random, dtype=torch.float64)
    photo = Photo(name="a", image=target, label=view_label(0))
    terms = ImageLoss(photo, AreaDistance(), 0.0, 0.0)({"image": image})
    distance = AreaDistance()
    assert terms.keys() == {"mse", "perceptual"}
    assert float(terms["mse"]) == float((image - target).square().mean())
    assert float(terms["perceptual"]) == float(distance.distance(image, distance.features(target)))
    full = dataclasses.replace(photo, mask=torch.ones(1, 1, 16, 16, dtype=torch.float64))
    assert ImageLoss(full, AreaDistance(), 1.0, 0.0)({"image": image}) == terms
