"""Multi-view consistency, on scenes whose geometry is known."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from camera_utils import camera_label, look_at_pose, yaw_pitch_roll_deg
from metrics import multi_view_consistency
from metrics.multi_view_consistency import (
    MAX_PSNR_DB,
    PAIRS_PER_HEAD,
    View,
    compare,
    compare_heads,
    masked_ssim,
    pair_cameras,
    project,
    psnr_db,
    surface_of,
    turn,
    warp,
)
from metrics.registry import NotApplicable, parse_metric
from tests.helpers.head_data import head_labels
from tests.helpers.stand_ins import FAR, RayTracedGenerator
from tests.helpers.tiny import tiny_network
from tests.helpers.tiny_evaluations import tiny_evaluation
from training.image_metrics import ssim
from training.volumetric_rendering.ray_sampler import sample_rays

RADIUS = 0.25


def labels_at(yaw_deg, pitch_deg=0.0):
    return torch.from_numpy(head_labels(list(yaw_deg), pitch_deg))


def sphere_views(labels, size, depth_size=None, colour=None):
    """Look at a sphere around the origin: exact depth, and colours that are waves of the world's coordinates."""
    depth_size = depth_size or size
    depth, mask = _sphere_depth(labels, depth_size)
    fine, inside = _sphere_depth(labels, size)
    origins, directions = sample_rays(labels[:, :16].unflatten(1, (4, 4)), labels[:, 16:].unflatten(1, (3, 3)), size)
    points = (origins + directions * fine.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (size, size))
    image = torch.sin(20 * points) * 0.8 if colour is None else colour(points)
    return View(labels, torch.where(inside > 0, image, torch.zeros(())), depth, mask)


def _sphere_depth(labels, size):
    origins, directions = sample_rays(labels[:, :16].unflatten(1, (4, 4)), labels[:, 16:].unflatten(1, (3, 3)), size)
    along = -(origins * directions).sum(-1)
    square = RADIUS**2 - (origins + along[..., None] * directions).square().sum(-1)  # of half the chord
    depth = torch.where(square > 0, along - square.clamp(min=0).sqrt(), torch.tensor(FAR))
    return tuple(x.unflatten(1, (size, size))[:, None] for x in (depth, (square > 0).float()))


class SphereGenerator(RayTracedGenerator):
    """Shows a sphere; the depth is `depth_error` off, and colours move with the camera if they are to."""

    def __init__(self, resolution=32, depth_error=0.0, painted_on_screen=False, opacity=1.0):
        super().__init__(resolution, depth_error=depth_error)
        self.painted_on_screen, self.opacity = painted_on_screen, opacity

    def render(self, field, c, neural_rendering_resolution=None):
        view = sphere_views(c, self.img_resolution)
        image = view.image
        if self.painted_on_screen:
            image = image + 0.3 * torch.sin(torch.arange(self.img_resolution) * 1.0)
        return {"image": image, "image_depth": view.depth + self.depth_error, "image_mask": view.mask * self.opacity}


# ---- geometry ----


def test_project_of_points_along_rays_returns_pixel_centres_and_depths():
    intrinsics = torch.tensor([[4.0, 0.3, 0.52], [0.0, 4.4, 0.47], [0.0, 0.0, 1.0]])
    pose = look_at_pose(torch.tensor([0.4, -2.0]), torch.tensor([0.3, -0.1]))
    origins, directions = sample_rays(pose, intrinsics.expand(2, 3, 3), 6)
    depth = torch.linspace(1, 3, 72).view(2, 36)
    place, distance, in_front = project(origins + directions * depth[..., None], camera_label(pose, intrinsics))
    centres = (torch.arange(6) + 0.5) / 6
    u, v = centres.repeat(6), centres.repeat_interleave(6)
    # float32: coordinates of size 3, and focal lengths of 4
    assert_close(place, torch.stack([u, v], dim=-1).expand(2, -1, -1), atol=1e-5, rtol=0)
    assert_close(distance, depth, atol=1e-5, rtol=0)
    assert in_front.all()


def test_project_of_points_behind_the_camera_says_so():
    label = labels_at([0])
    _, _, in_front = project(torch.tensor([[[0.0, 0.0, 5.0], [0.0, 0.0, 2.0]]]), label)
    assert in_front.tolist() == [[False, True]]


def test_turn_changes_yaw_alone():
    labels = labels_at([10, -170], 20)
    before, after = yaw_pitch_roll_deg(labels), yaw_pitch_roll_deg(turn(labels, torch.tensor([25.0, -25.0])))
    expected = before + torch.tensor([[25.0, 0, 0], [335.0, 0, 0]])
    assert_close(after, expected, atol=1e-3, rtol=0)  # degrees in float32
    assert_close(turn(labels, 25.0)[:, [3, 7, 11]].norm(dim=1), labels[:, [3, 7, 11]].norm(dim=1))


def test_turn_by_nothing_changes_nothing():
    labels = labels_at([10, -170], 20)
    assert_close(turn(labels, 0.0), labels)


def test_pair_cameras_of_many_heads_fill_all_yaws_at_the_heads_own_pitch():
    heads = np.arange(50)
    labels = labels_at(np.linspace(-180, 170, 50), 12)
    angles = torch.stack([yaw_pitch_roll_deg(c) for c in pair_cameras(labels, heads)])  # [pairs, B, 3]
    yaw_deg = angles[..., 0].flatten().sort().values
    gaps = torch.diff(yaw_deg, append=yaw_deg[:1] + 360)
    assert len(angles) == PAIRS_PER_HEAD and gaps.max() < 3 * 360 / len(yaw_deg)
    assert_close(angles[..., 1], torch.full_like(angles[..., 1], 12.0), atol=1e-3, rtol=0)  # degrees in float32


def test_surface_of_a_plane_depends_on_how_far_it_is_turned_away():
    labels, size = labels_at([0, 0]), 64
    pixel = 2.7 / (size * labels[0, 16])
    across = (torch.arange(size) - size / 2) * pixel
    depth = torch.stack([2.7 + math.tan(math.radians(turned)) * across for turned in (60, 80)])
    depth = depth[:, None, None, :].expand(2, 1, size, size)
    found = surface_of(View(labels, depth.expand(-1, 3, -1, -1), depth, torch.ones(2, 1, size, size)))
    middle = slice(size // 2 - 8, size // 2 + 8)  # a pixel is as wide there as it was assumed to be
    assert found[0, ..., middle].all() and not found[1, ..., middle].any()


def test_surface_of_edges_and_transparent_pixels_leaves_them_and_their_neighbours_out():
    depth, mask = torch.full((1, 1, 9, 9), 2.7), torch.ones(1, 1, 9, 9)
    depth[..., 5:, :] = 3.3
    mask[..., 0, 0] = 0.5
    found = surface_of(View(labels_at([0]), depth.expand(-1, 3, -1, -1), depth, mask))[0, 0]
    expected = torch.ones(9, 9, dtype=torch.bool)
    expected[4:6] = False
    expected[:2, :2] = False
    assert found.equal(expected)


# ---- moving pictures ----


def test_compare_of_an_exact_scene_finds_it_consistent():
    left, right = (sphere_views(labels_at([yaw, yaw + 120], 10), 64) for yaw in (-5, 5))
    share, mse, similarity, difference = compare(left, right).unbind(1)
    # What is left is the bilinear filter: 20 rad per unit are 0.2 rad per pixel.
    assert (mse < 2e-4).all() and (similarity > 0.99).all()
    assert (difference < 1e-3).all() and (share > 0.8).all()


@pytest.mark.parametrize("error", [-0.1, 0.1])
def test_compare_with_wrong_depth_finds_less(error):
    left, right = (sphere_views(labels_at([yaw], 10), 64) for yaw in (-5, 5))
    wrong = [view._replace(depth=view.depth + error) for view in (left, right)]
    assert compare(*wrong)[0, 1] > 100 * compare(left, right)[0, 1]


def test_warp_counts_contradictions_but_not_what_is_hidden():
    left, right = (sphere_views(labels_at([yaw]), 32) for yaw in (-5, 5))
    seen = warp(left, right).seen
    hidden = warp(left, right._replace(depth=right.depth - 0.2))
    beyond = warp(left, right._replace(depth=right.depth + 0.2))
    assert seen.any() and not hidden.seen.any()
    assert beyond.seen.equal(seen)
    assert_close(beyond.depth_difference[seen], torch.full((int(seen.sum()),), 0.2), atol=5e-3, rtol=0)  # bilinear


def test_warp_of_pictures_finer_than_depth_loses_less():
    errors = []
    for size in (32, 128):
        left, right = (sphere_views(labels_at([yaw]), size, depth_size=32) for yaw in (-5, 5))
        assert warp(left, right).image.shape == (1, 3, 32, 32)
        errors.append(compare(left, right)[0, 1].item())
    assert errors[1] < errors[0] / 2


def test_compare_without_overlap_returns_zeros():
    left, right = (sphere_views(labels_at([yaw]), 32) for yaw in (-5, 5))
    nothing = right._replace(mask=torch.zeros_like(right.mask))
    assert compare(left, nothing).tolist() == [[0, 0, 0, 0]]


# ---- similarity ----


def test_masked_ssim_of_everything_is_ssim():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (1, 3, 24, 20), generator=generator)
    y = (x + torch.randint(-40, 40, x.shape, generator=generator)).clamp(0, 255)
    # (v - 128) / 127.5 comes back as v where pictures are rounded to 8 bits, and all formulas but that of the
    # luminance take differences; the shift by half a level is what the tolerance is for.
    x, y = (v / 127.5 - 1 for v in (x, y))
    shifted = masked_ssim(x + 1, y + 1, torch.ones(1, 1, 24, 20))  # 0 is black in `ssim`
    assert_close(shifted.item(), ssim(x, y), atol=1e-3, rtol=0)


def test_masked_ssim_ignores_pixels_that_do_not_count():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 3, 24, 24, generator=generator) * 2 - 1
    weight = (torch.rand(2, 1, 24, 24, generator=generator) > 0.5).float()
    spoilt = torch.where(weight > 0, y, torch.ones(()))
    # Means of squares and squares of means differ in the last digits of float64 only.
    assert_close(masked_ssim(x, spoilt, weight), masked_ssim(x, y, weight), atol=1e-6, rtol=0)
    assert_close(masked_ssim(x, torch.where(weight > 0, x, y), weight), torch.ones(2))
    assert masked_ssim(x, y, torch.zeros(2, 1, 24, 24)).tolist() == [0, 0]


def test_masked_ssim_of_small_pictures_is_refused():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        masked_ssim(*torch.zeros(2, 1, 3, 10, 10), torch.ones(1, 1, 10, 10))


def test_psnr_db_known_values_and_limit():
    assert psnr_db(4.0) == 0 and psnr_db(0.04) == pytest.approx(20)
    assert psnr_db(0.0) == psnr_db(1e-30) == MAX_PSNR_DB


# ---- the metric ----


def computed(folder, generator, name="mv_consistency6", **settings):
    evaluation = tiny_evaluation(folder, generator, side=generator.img_resolution, **settings)
    metric = parse_metric(name)
    assert list(metric.requests(evaluation)) == []
    return metric.compute(evaluation, {})


def test_compute_orders_generators_by_consistency(tmp_path):
    exact, off, painted = (
        computed(tmp_path / str(i), generator).values
        for i, generator in enumerate(
            (SphereGenerator(), SphereGenerator(depth_error=0.1), SphereGenerator(painted_on_screen=True))
        )
    )
    assert exact["mv_consistency6"] > 30 > 24 > off["mv_consistency6"]
    assert painted["mv_consistency6"] < 24
    assert exact["ssim"] > 0.97 > off["ssim"]
    assert exact["overlap"] > 0.8 and exact["depth_difference"] < 1e-3


def test_compute_gives_a_curve_over_yaw_with_gaps(tmp_path):
    found = computed(tmp_path, SphereGenerator(), "mv_consistency2", num_yaw_bins=12)
    # Heads are seen from -180, -90, 0, 90 degrees, and 56 degrees further; ranges are 30 degrees wide.
    assert [y is not None for y in found.curve.y] == [True, True, False] * 4
    assert found.curve.x[:2] == (-165, -135) and found.details["num_pairs"] == 2 * PAIRS_PER_HEAD


def test_compute_does_not_depend_on_batches(tmp_path):
    one, four = (computed(tmp_path / str(size), SphereGenerator(), batch_size=size) for size in (1, 4))
    # Rows travel in float32.
    assert one.values == pytest.approx(dict(four.values), rel=1e-5)


def test_compute_of_an_empty_volume_is_not_applicable(tmp_path):
    with pytest.raises(NotApplicable, match="mv_consistency6: no view shows a surface"):
        computed(tmp_path, SphereGenerator(opacity=0.5))


def test_compute_with_too_few_pixels_of_depth_is_not_applicable(tmp_path):
    with pytest.raises(NotApplicable, match="rendered with 8 pixels, too few for SSIM"):
        computed(tmp_path, SphereGenerator(8))


def test_compare_of_a_ray_traced_head_finds_it_consistent_unless_its_depth_is_wrong():
    generator, views = RayTracedGenerator(64), []
    for label in (labels_at([55], 10), labels_at([65], 10)):
        out = generator(torch.ones(1, 8), label)
        views.append(View(label, out["image"], out["image_depth"], out["image_mask"]))
    exact = compare(*views)[0]
    wrong = compare(*(view._replace(depth=view.depth + 0.15) for view in views))[0]
    assert psnr_db(exact[1]) > 30 and psnr_db(wrong[1]) < psnr_db(exact[1]) - 5
    assert exact[2] > wrong[2] + 0.1


def test_compare_heads_of_a_network_repeats_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_view_consistency, "PAIRS_PER_HEAD", 1)
    network = tiny_network("dual_spherical", img_resolution=128, neural_rendering_resolution=16)
    evaluation = tiny_evaluation(tmp_path, network, count=4, side=128)
    cameras = evaluation.cameras(evaluation.generated(2))
    first, second = (compare_heads(evaluation, np.arange(2), cameras) for _ in range(2))
    assert first.shape == (2, 5) and np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


def test_compare_heads_of_a_broken_network_is_an_error(tmp_path):
    class Broken(RayTracedGenerator):
        def render(self, *args, **kwargs):
            out = super().render(*args, **kwargs)
            return {**out, "image": out["image"] * float("nan")}

    evaluation = tiny_evaluation(tmp_path, Broken(16), count=4, side=16)
    with pytest.raises(ValueError, match="expected finite pixel values, came NaN or infinity in sample 0 of seed 0"):
        compare_heads(evaluation, np.arange(2), evaluation.cameras(evaluation.generated(2)))
