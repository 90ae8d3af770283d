"""Perceptual path length, where it is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metrics.perceptual_path_length import PUBLISHED_SAMPLES, step_lengths, trimmed_mean
from metrics.registry import parse_metric
from tests.helpers.stand_ins import RayTracedGenerator
from tests.helpers.tiny import tiny_network
from tests.helpers.tiny_evaluations import tiny_evaluation
from training.perceptual import PyramidDistance


class SquaredDistance:
    """Mean squared difference, whose path length is a derivative that can be written down."""

    name = "squared"

    def features(self, image):
        return (image,)

    def distance(self, image, target):
        return (image - target[0]).square().mean(dim=(1, 2, 3))


class Waves(RayTracedGenerator):
    """Pictures of one colour, the sine of w (or w itself) in float64; remembers cameras."""

    def __init__(self, straight=True):
        super().__init__(16)
        self.straight, self.conditions, self.cameras = straight, [], []

    def mapping(self, z, c, truncation_psi=1.0, truncation_cutoff=None, update_emas=False):
        self.conditions.append(c)
        return z[:, None].double() * truncation_psi

    def radiance_field(self, ws, ws_bcg=None, options=None):
        assert options.noise_mode == "const"
        return SimpleNamespace(ws=ws, noise=options.generator)

    def render(self, field, c, neural_rendering_resolution=None):
        self.cameras.append(c)
        colour = field.ws[:, 0, :3] if self.straight else field.ws[:, 0, :3].sin()
        jitter = torch.rand(1, generator=field.noise, dtype=torch.float64)  # the same in both pictures, or all is lost
        return {"image": (colour + jitter)[:, :, None, None].expand(-1, -1, 16, 16)}


def test_step_lengths_of_straight_ways_are_squared_distances(tmp_path):
    evaluation = tiny_evaluation(tmp_path, Waves(), side=16, truncation_psi=0.5)
    pairs, labels = np.array([[0, 1, 2], [7, 8, 9]]), evaluation.dataset.labels[:3]
    z = evaluation.latents(np.arange(10))[:, :3].double() * 0.5
    expected = (z[7:10] - z[:3]).square().mean(dim=1)
    for place in ("end", "full"):
        found = step_lengths(evaluation, SquaredDistance(), pairs, labels, place)
        # t + eps is rounded to float32 for `full`: 6e-8 of a step of 1e-4, twice.
        np.testing.assert_allclose(found, expected, rtol=3e-3)


def test_step_lengths_at_the_end_are_derivatives_there(tmp_path):
    evaluation = tiny_evaluation(tmp_path, Waves(straight=False), side=16)
    pairs, labels = np.array([[0, 1, 2], [7, 8, 9]]), evaluation.dataset.labels[:3]
    z = evaluation.latents(np.arange(10))[:, :3].double()
    expected = ((z[7:10] - z[:3]) * z[:3].cos()).square().mean(dim=1)
    end, full = (step_lengths(evaluation, SquaredDistance(), pairs, labels, place) for place in ("end", "full"))
    np.testing.assert_allclose(end, expected, rtol=2e-3)  # a step of 1e-4 is not yet a derivative
    assert not np.allclose(full, expected, rtol=0.05)


def test_step_lengths_of_nan_is_refused_with_the_sample(tmp_path):
    class Broken(Waves):
        def render(self, field, c, neural_rendering_resolution=None):
            image = super().render(field, c)["image"].clone()
            image[1] = float("nan")
            return {"image": image}

    evaluation = tiny_evaluation(tmp_path, Broken(), side=16)
    pairs, labels = np.array([[4, 5], [8, 9]]), evaluation.dataset.labels[:2]
    with pytest.raises(ValueError, match=r"network: expected finite steps .*samples \[5\]"):
        step_lengths(evaluation, SquaredDistance(), pairs, labels, "end")


def test_step_lengths_of_a_network_are_finite_and_repeat_themselves(tmp_path):
    network = tiny_network("dual_spherical", img_resolution=128)
    evaluation = tiny_evaluation(tmp_path, network, count=4, side=128)
    pairs, labels = np.array([[0], [1]]), evaluation.dataset.labels[:1]
    first, second = (step_lengths(evaluation, PyramidDistance(), pairs, labels, "end") for _ in range(2))
    assert np.isfinite(first).all() and (first > 0).all()
    np.testing.assert_array_equal(first, second)


def test_compute_conditions_on_the_camera_that_renders_and_names_the_distance(tmp_path):
    generator = Waves(straight=False)
    found = parse_metric("ppl6_wend").compute(tiny_evaluation(tmp_path, generator, side=16), {})
    assert found.details["distance"] == "pyramid" and found.details["num_pairs"] == 6
    assert list(found.values) == ["ppl6_wend", "median"] and found.values["ppl6_wend"] > 0
    assert torch.cat(generator.conditions[::2]).equal(torch.cat(generator.cameras[::2]))
    assert torch.cat(generator.conditions[1::2]).equal(torch.cat(generator.cameras[1::2]))


def test_compute_does_not_depend_on_batches(tmp_path):
    values = [
        parse_metric("ppl6_wend").compute(
            tiny_evaluation(tmp_path / str(size), Waves(straight=False), side=16, batch_size=size), {}
        )
        for size in (2, 5)
    ]
    assert dict(values[0].values) == pytest.approx(dict(values[1].values), rel=1e-3)  # float32 in the pyramid


def test_trimmed_mean_leaves_one_percent_out_at_both_ends():
    values = np.arange(1001.0)
    values[-10:] = 1e9
    shuffled = np.random.default_rng(0).permutation(values)
    assert trimmed_mean(shuffled) == np.sort(values)[10:991].mean() < 1000
    assert trimmed_mean(np.array([1.0, 2.0, 6.0])) == 3


@pytest.mark.parametrize(
    "name, canonical, num_images, place",
    [
        ("ppl2_wend", "ppl2_wend", PUBLISHED_SAMPLES, "end"),
        ("ppl10k_w", "ppl10k_wend", 10_000, "end"),
        ("ppl500_wend", "ppl500_wend", 500, "end"),
        ("ppl500-wfull", "ppl500_wfull", 500, "full"),
    ],
)
def test_parse_metric_names_of_path_lengths(name, canonical, num_images, place):
    metric = parse_metric(name)
    assert (metric.name, metric.num_images, metric.place) == (canonical, num_images, place)
