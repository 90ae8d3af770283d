"""Back-face rate: a generator with faces on both sides is caught, one with real backs is not."""

import numpy as np
import pytest
import torch

from metrics.back_face_rate import BEHIND, is_frontal
from metrics.directions import view_directions
from metrics.registry import NotApplicable, parse_metric
from metrics.stats_pipeline import collect_stats
from tests.helpers.evaluations import evaluation_of, stats_of
from tests.helpers.head_data import head_labels, spread_yaw_deg
from tests.helpers.stand_ins import Compass, RayTracedGenerator, ReadCompass, TwoFacedGenerator, reflect_depth
from tests.helpers.tiny_evaluations import tiny_evaluation


class TwoFacedCompass(TwoFacedGenerator, Compass):
    """Pictures from behind say that they are from the front."""


def test_is_frontal_threshold_and_sides():
    directions = view_directions(head_labels([0, 59, -59, 61, -61, 120, 180, -150]))
    assert is_frontal(directions).tolist() == [True, True, True, False, False, False, False, False]


def test_compute_counts_frontal_pictures_of_each_set():
    evaluation = evaluation_of(spread_yaw_deg(40))
    metric = parse_metric("back_face_rate8")
    requests = metric.requests(evaluation)
    assert [(r.images.kind, r.images.cameras, r.images.yaw) for r in requests] == [
        ("generated", "matched", BEHIND),
        ("generated", "random", BEHIND),
        ("real", "matched", BEHIND),
    ]
    front, back = view_directions(head_labels([10, 175]))
    stats = {}
    for request, num_frontal in zip(requests, (2, 8, 0)):
        stats[request] = stats_of(np.stack([front] * num_frontal + [back] * (8 - num_frontal)), request)
    found = metric.compute(evaluation, stats)
    assert dict(found.values) == {"back_face_rate8": 0.25, "random": 1.0, "real": 0.0}
    assert found.details["num_images"] == 8 and len(found.curve.x) == 4


@pytest.mark.parametrize("generator, expected", [(Compass(), 0.0), (TwoFacedCompass(), 1.0)])
def test_compute_catches_faces_on_both_sides(tmp_path, generator, expected):
    evaluation = tiny_evaluation(tmp_path, generator, detectors={"view": ReadCompass()}, count=24)
    metric = parse_metric("back_face_rate10")
    requests = [r for r in metric.requests(evaluation) if r.images.kind == "generated"]
    stats = collect_stats(evaluation, requests)
    (real,) = set(metric.requests(evaluation)) - set(requests)
    stats[real] = stats_of(np.array([[0.0, 0.0, -1.0]]), real)
    found = metric.compute(evaluation, stats)
    assert found.values["back_face_rate10"] == found.values["random"] == expected
    assert {y for y in found.curve.y if y is not None} == {expected}


def test_compute_without_views_from_behind_is_not_applicable():
    evaluation = evaluation_of([-110.0, 0.0, 110.0])
    metric = parse_metric("back_face_rate8")
    with pytest.raises(NotApplicable, match="no images with an absolute yaw of 120 to 180 degrees"):
        metric.requests(evaluation)


def test_two_faced_generator_shows_the_mirrored_front_at_the_back():
    z = torch.ones(2, 8)
    behind = torch.from_numpy(head_labels([180.0, -150.0], 0.2))
    front = torch.from_numpy(head_labels([0.0, -30.0], 0.2))
    torch.testing.assert_close(reflect_depth(behind), front, atol=1e-6, rtol=0)  # float32 of an angle near pi
    honest, two_faced = RayTracedGenerator(16), TwoFacedGenerator(16)
    pictures, expected = two_faced(z, behind), honest(z, reflect_depth(behind))
    for name, picture in pictures.items():
        assert picture.flip(3).equal(expected[name]), name
    assert two_faced(z, front)["image"].equal(honest(z, front)["image"])
    assert not pictures["image"].equal(honest(z, behind)["image"])
