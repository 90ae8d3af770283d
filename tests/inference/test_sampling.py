"""Heads compute once what no camera changes, and show the same numbers as the generator's published calls."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import camera_utils
from inference import Head, Noise, Truncation, make_head, orbit_labels, to_uint8
from inference.sampling import (
    IMAGE_MODES,
    camera_pivot,
    camera_radius,
    conditioning_label,
    render_strip,
    seed_ws,
    shows_all_sides,
    strip_labels,
)
from inference.shapes import ShapeSettings, save_shape
from training.triplane import TriPlaneGenerator


@contextmanager
def counted_calls(**modules):
    """Count how often modules are called, by name."""
    calls = dict.fromkeys(modules, 0)

    def hook(name):
        def count(*_):
            calls[name] += 1

        return count

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    yield calls
    for handle in handles:
        handle.remove()


def networks_behind_planes(generator: TriPlaneGenerator):
    return {
        "mapping": generator.backbone.mapping,
        "backbone": generator.backbone.synthesis,
        "background": generator.bcg_synthesis,
    }


def assert_same_images(ours, expected):
    assert ours.keys() == expected.keys()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


# Latents and cameras.


@torch.no_grad()
def test_seed_ws_is_the_published_mapping_of_a_seed(generator):
    z = torch.from_numpy(np.random.RandomState(3).randn(1, generator.z_dim))
    pose = camera_utils.LookAtPoseSampler.sample(math.pi / 2, math.pi / 2, torch.zeros(3), radius=2.7)
    label = camera_utils.camera_label(pose, camera_utils.intrinsics_from_focal(4.2647))
    expected = generator.mapping(z, label, truncation_psi=0.7, truncation_cutoff=14)
    # The two ways to compute the same pose differ by a rounding step, which the label embedding passes on.
    torch.testing.assert_close(seed_ws(generator, [3], Truncation()), expected, rtol=1e-5, atol=1e-5)


def test_seed_ws_of_several_seeds_equals_each_alone(generator):
    together = seed_ws(generator, [4, 9], Truncation())
    # A matrix product of another height may sum in another order.
    torch.testing.assert_close(together[1:], seed_ws(generator, [9], Truncation()), rtol=1e-5, atol=1e-6)


def test_make_head_truncation_zero_is_the_mean_for_every_seed(generator):
    none_left = Truncation(psi=0.0, cutoff=None)
    first, second = (make_head(generator, seed, none_left).ws for seed in (1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, make_head(generator, 1).ws)


def test_conditioning_label_turns_by_the_published_angle(generator):
    angles = camera_utils.yaw_pitch_roll_deg(conditioning_label(generator, 120.0))
    # Degrees of float32 poses.
    torch.testing.assert_close(angles, torch.tensor([[30.0, 0.0, 0.0]]), rtol=0, atol=1e-4)


def test_strip_labels_head_goes_from_the_front_to_the_back(generator):
    labels = strip_labels(generator, fov_deg=18.837)
    yaw, pitch, roll = camera_utils.yaw_pitch_roll_deg(labels).T
    pitch_deg = math.degrees(camera_utils.pitch_from_vertical(math.pi / 2 - 0.2))
    # Degrees of float32 poses; yaw +180 and -180 are the same.
    torch.testing.assert_close(yaw % 360, torch.tensor([0.0, -45, -90, -135, -180]) % 360, rtol=0, atol=1e-4)
    torch.testing.assert_close(pitch, torch.full((5,), pitch_deg), rtol=0, atol=1e-4)
    torch.testing.assert_close(roll, torch.zeros(5), rtol=0, atol=1e-4)
    focal = torch.full((5,), camera_utils.focal_from_fov(18.837))
    torch.testing.assert_close(labels[:, 16], focal, rtol=0, atol=0)  # the same number in float32


def test_strip_labels_eg3d_shows_the_front_about_the_pivot(frontal_generator):
    labels = strip_labels(frontal_generator)
    poses, _ = camera_utils.split_label(labels)
    expected = camera_utils.look_at_pose(
        torch.tensor([0.4, 0.0, -0.4]), camera_utils.pitch_from_vertical(math.pi / 2 - 0.2), 2.7, (0.0, 0.0, 0.2)
    )
    # float32 poses
    torch.testing.assert_close(poses, expected, rtol=0, atol=1e-6)
    assert not shows_all_sides(frontal_generator)


def test_camera_radius_and_pivot_are_the_network_s_or_the_published(generator, monkeypatch):
    assert camera_radius(generator) == 2.7
    assert camera_pivot(generator) == (0, 0, 0.2)
    monkeypatch.setattr(generator, "config", generator.config)  # put back afterwards
    generator.rendering_kwargs["avg_camera_radius"] = 3.5
    assert camera_radius(generator) == 3.5
    del generator.rendering_kwargs["avg_camera_radius"], generator.rendering_kwargs["avg_camera_pivot"]
    assert camera_radius(generator) == 2.7
    assert camera_pivot(generator) == (0, 0, 0)


def test_orbit_labels_go_once_around():
    yaw = camera_utils.yaw_pitch_roll_deg(orbit_labels(4))[:, 0]
    # Degrees of float32 poses.
    torch.testing.assert_close(yaw % 360, torch.tensor([0.0, 90, 180, 270]), rtol=0, atol=1e-4)


# Heads.


def test_head_five_views_and_a_shape_compute_latents_planes_and_background_once(generator, tmp_path):
    with counted_calls(**networks_behind_planes(generator)) as calls:
        head = make_head(generator, 0)
        render_strip(head, strip_labels(generator))
        save_shape(tmp_path / "a.ply", head, ShapeSettings(resolution=8, chunk_points=100))
    assert calls == {"mapping": 1, "backbone": 1, "background": 1}


def test_head_random_noise_computes_planes_and_background_for_each_view(generator):
    labels = strip_labels(generator)[:3]
    with counted_calls(**networks_behind_planes(generator)) as calls:
        render_strip(make_head(generator, 0, noise=Noise(mode="random")), labels)
    assert calls == {"mapping": 1, "backbone": 3, "background": 3}


@pytest.mark.parametrize("mode", ["const", "none"])
def test_render_every_view_equals_synthesis_with_the_same_seed(parsing_generator, mode):
    noise = Noise(mode=mode, seed=7)
    head = make_head(parsing_generator, 2, noise=noise)
    for view, label in enumerate(strip_labels(parsing_generator)[:3]):
        random = torch.Generator().manual_seed(noise.stream_seed(0))
        with torch.no_grad():
            expected = parsing_generator.synthesis(head.ws, label[None], noise_mode=mode, generator=random)
        assert_same_images(head.render(label, view), expected)


def test_render_random_noise_equals_synthesis_with_the_seed_of_the_view(parsing_generator):
    noise = Noise(mode="random", seed=7)
    head = make_head(parsing_generator, 2, noise=noise)
    label = strip_labels(parsing_generator)[1]
    for view in (3, 0):
        random = torch.Generator().manual_seed(noise.stream_seed(view))
        with torch.no_grad():
            expected = parsing_generator.synthesis(head.ws, label[None], noise_mode="random", generator=random)
        assert_same_images(head.render(label, view), expected)


def test_noise_stream_seeds_differ_in_the_bits_that_count():
    seeds = [Noise(seed=seed).stream_seed(stream) for seed in (0, 1, 2**32 - 1) for stream in (0, 1, 10**6)]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # PyTorch on the CPU looks at no others
    with pytest.raises(ValueError, match="noise seed: expected at least 0, got -1"):
        Noise(seed=-1)


def test_render_ray_jitter_is_the_same_in_every_view_and_another_for_another_seed(generator):
    label = strip_labels(generator)[0]
    head = make_head(generator, 0)
    assert_same_images(head.render(label, view=5), head.render(label, view=0))
    other = make_head(generator, 0, noise=Noise(seed=1)).render(label)
    assert not torch.equal(other["image_depth"], head.render(label)["image_depth"])


@pytest.mark.parametrize("mode", ["const", "random"])
def test_render_view_does_not_depend_on_the_views_before(parsing_generator, mode):
    labels = strip_labels(parsing_generator)
    noise = Noise(mode=mode, seed=3)
    alone = make_head(parsing_generator, 0, noise=noise).render(labels[2], view=2)
    head = make_head(parsing_generator, 0, noise=noise)
    for view in range(2):
        head.render(labels[view], view)
    assert_same_images(head.render(labels[2], view=2), alone)


def test_render_leaves_the_global_random_numbers_alone(generator):
    before = torch.get_rng_state()
    make_head(generator, 0, noise=Noise(mode="random")).render(strip_labels(generator)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_field_random_noise_is_that_of_view_0_whatever_was_rendered(parsing_generator):
    noise = Noise(mode="random", seed=3)
    label = strip_labels(parsing_generator)[0]
    fresh, used = (make_head(parsing_generator, 0, noise=noise) for _ in range(2))
    used.render(label, view=2)
    assert torch.equal(used.field.planes, fresh.field.planes)
    for other in (Noise(mode="random", seed=4), Noise(), Noise(mode="none")):
        assert not torch.equal(make_head(parsing_generator, 0, noise=other).field.planes, fresh.field.planes)


def test_render_resolution_is_that_asked_for_and_does_not_stay(generator):
    head = make_head(generator, 0)
    label = strip_labels(generator)[0]
    assert head.render(label, neural_rendering_resolution=12)["image_raw"].shape == (1, 3, 12, 12)
    assert head.render(label)["image_raw"].shape == (1, 3, 8, 8)
    assert head.render(label)["image"].shape == (1, 3, 128, 128)


def test_render_label_that_is_no_camera_raises_and_names_the_entry(generator):
    head, label = make_head(generator, 0), strip_labels(generator)[0]
    for entry, value in ((0, float("nan")), (16, 0.0)):
        bad = label.clone()
        bad[entry] = value
        with pytest.raises(ValueError, match=f"entry {entry} "):
            head.render(bad)


@pytest.mark.parametrize("batched", [False, True])
def test_head_accepts_w_layers_with_and_without_a_batch_axis(generator, batched):
    ws = make_head(generator, 0).ws
    assert torch.equal(Head(generator, ws if batched else ws[0]).ws, ws)


@pytest.mark.parametrize("shape", [(2, 10, 512), (10, 511), (9, 512), (512,), (1, 1, 10, 512), (0, 10, 512)])
def test_head_w_of_wrong_shape_raises_and_names_both(generator, shape):
    assert generator.backbone.num_ws == 10
    with pytest.raises(ValueError, match=r"ws: expected shape \(1, 10, 512\)"):
        Head(generator, torch.zeros(shape))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_make_head_impossible_seed_raises(generator, seed):
    with pytest.raises(ValueError, match="[Ss]eed"):
        make_head(generator, seed)


# Pictures.


def test_render_strip_joins_the_views_from_left_to_right(generator):
    labels = strip_labels(generator)[:2]
    head = make_head(generator, 0)
    strip = render_strip(head, labels, "image_raw")
    assert strip.shape == (8, 16, 3) and strip.dtype == np.uint8
    np.testing.assert_array_equal(strip[:, 8:], to_uint8(head.render(labels[1], 1), "image_raw")[0])


@pytest.mark.parametrize("mode", ["image", "image_raw"])
def test_to_uint8_colours_are_scaled_clamped_and_truncated(mode):
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    pixels = to_uint8({mode: values}, mode)
    assert pixels.shape == (1, 1, 7, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_to_uint8_depth_near_is_bright_over_the_range_of_each_image():
    depth = torch.tensor([[2.0, 3.0, 4.0], [20.0, 10.0, 15.0]]).view(2, 1, 1, 3)
    pixels = to_uint8({"image_depth": depth}, "image_depth")
    assert pixels.shape == (2, 1, 3, 3)
    assert pixels[..., 0].tolist() == [[[255, 128, 0]], [[0, 255, 128]]]


def test_to_uint8_constant_depth_is_uniform():
    pixels = to_uint8({"image_depth": torch.full((1, 1, 2, 2), 2.7)}, "image_depth")
    assert len(np.unique(pixels)) == 1


def test_to_uint8_mask_empty_is_black_and_full_is_white():
    mask = torch.tensor([-0.001, 0.0, 0.5, 1.0, 1.001]).view(1, 1, 1, 5)
    assert to_uint8({"image_mask": mask}, "image_mask")[0, 0, :, 1].tolist() == [0, 0, 128, 255, 255]


def test_to_uint8_parsing_gives_every_class_its_own_colour():
    probabilities = torch.eye(20).view(1, 20, 4, 5)
    pixels = to_uint8({"image_parsing": probabilities}, "image_parsing")
    assert pixels.shape == (1, 4, 5, 3) and pixels.dtype == np.uint8
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 20
    assert pixels[0, 0, 0].tolist() == [0, 0, 0]  # the background


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_to_uint8_every_mode_of_a_parsing_network_is_a_picture(parsing_generator, mode):
    head = make_head(parsing_generator, 0)
    pixels = to_uint8(head.render(strip_labels(parsing_generator)[0]), mode)
    side = 128 if mode == "image" else 8
    assert pixels.shape == (1, side, side, 3) and pixels.dtype == np.uint8
    assert len(np.unique(pixels)) > 1


def test_to_uint8_mode_that_the_network_lacks_raises_and_lists_its_own(generator):
    output = make_head(generator, 0).render(strip_labels(generator)[0])
    with pytest.raises(ValueError, match="one of image, image_raw, .*for this network, got 'image_parsing'"):
        to_uint8(output, "image_parsing")
