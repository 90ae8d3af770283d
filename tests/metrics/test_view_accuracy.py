"""View accuracy, on pictures that say in their colours from where they were taken."""

import numpy as np
import pytest
import torch

from metrics.directions import view_directions
from metrics.registry import parse_metric
from metrics.stats_pipeline import collect_stats
from tests.helpers.evaluations import evaluation_of, stats_of
from tests.helpers.head_data import spread_yaw_deg
from tests.helpers.stand_ins import Compass, ReadCompass
from tests.helpers.tiny_evaluations import tiny_evaluation


def computed(folder, generator, name, **settings):
    evaluation = tiny_evaluation(folder, generator, detectors={"view": ReadCompass()}, **settings)
    metric = parse_metric(name)
    return metric.compute(evaluation, collect_stats(evaluation, metric.requests(evaluation)))


def test_compute_values_of_known_errors():
    evaluation = evaluation_of(spread_yaw_deg(12), num_yaw_bins=4)
    evaluation.use_detectors({"view": ReadCompass()})
    metric = parse_metric("view-accuracy4")
    (request,) = metric.requests(evaluation)
    seen = view_directions(evaluation.cameras(request.images)[1])
    seen[1] = -seen[1]
    seen[2] = np.cross(seen[2], [0, 1, 0])
    found = metric.compute(evaluation, {request: stats_of(seen, request)})
    # float32 directions
    assert found.values["view_accuracy4"] == pytest.approx((180 + 90) / 4, abs=1e-4)
    assert found.values["median"] == pytest.approx(45, abs=1e-4) and found.values["above_30_deg"] == 0.5
    assert next(iter(found.values)) == metric.name == "view_accuracy4"


def test_compute_of_exact_views_finds_the_rounding_of_pixels_alone(tmp_path):
    found = computed(tmp_path, Compass(), "view_accuracy20")
    assert found.values["view_accuracy20"] < 1 and found.values["above_30_deg"] == 0
    assert found.details["held_out"] == {"median_deg": 0.5} and found.details["num_images"] == 20


def test_compute_of_turned_views_finds_the_angle_in_every_bin(tmp_path):
    found = computed(tmp_path, Compass(error_deg=40), "view_accuracy20", num_yaw_bins=4)
    assert found.values["view_accuracy20"] == pytest.approx(40, abs=1)  # the rounding of pixels
    assert found.values["above_30_deg"] == 1
    assert found.curve.y == pytest.approx([40] * 4, abs=1) and found.curve.x == (-135, -45, 45, 135)


def test_compute_of_mirrored_views_finds_twice_the_yaw_at_the_sides(tmp_path):
    class Mirrored(Compass):
        def render(self, field, c, neural_rendering_resolution=None):
            image = super().render(field, c)["image"]
            return {"image": image * torch.tensor([-1.0, 1, 1])[:, None, None]}

    evaluation = tiny_evaluation(tmp_path, Mirrored(), detectors={"view": ReadCompass()}, yaw_deg=[90.0] * 12)
    metric = parse_metric("view_accuracy5")
    found = metric.compute(evaluation, collect_stats(evaluation, metric.requests(evaluation)))
    assert found.values["view_accuracy5"] == pytest.approx(180, abs=1)
    assert [y is None for y in found.curve.y].count(False) == 1
