"""Computing metrics by name: what is shared, what is not applicable, and what the rest of the list then does."""

import pytest

from metrics.metric_main import PRESETS, compute_metrics, parse_metrics
from tests.helpers.stand_ins import Compass, RayTracedGenerator, ReadCompass
from tests.helpers.tiny_evaluations import tiny_evaluation


def test_parse_metrics_expands_lists_and_keeps_each_once():
    names = [metric.name for metric in parse_metrics(["FD500-full", " quick ", "none", "kd8"])]
    assert names == ["fd500_full", *PRESETS["quick"][1:], "kd8"]


def test_metrics_that_data_do_not_allow_are_listed_and_the_others_computed(tmp_path):
    # Too few images for `view` to learn from, and none of them from behind.
    evaluation = tiny_evaluation(
        tmp_path, RayTracedGenerator(8), yaw_deg=[0.0, 30.0, 60.0], count=3, detector="colours"
    )
    names = [
        "view_accuracy4",
        "fd4_full",
        "fd_back4_full",
        "back_face_rate4",
        "kd4_full",
        "mv_consistency2",
        "pr4_full",
    ]
    found = {result.metric: result for result in compute_metrics(parse_metrics(names), evaluation)}
    assert list(found) == names
    assert {name for name, result in found.items() if result.values is not None} == {"fd4_full", "kd4_full"}
    reasons = {name: result.reason for name, result in found.items() if result.values is None}
    assert "at least 64 images to train on, and the data have 3" in reasons["view_accuracy4"]
    assert "0 images with an absolute yaw of 90 to 180 degrees" in reasons["fd_back4_full"]
    assert "no images with an absolute yaw of 120 to 180 degrees" in reasons["back_face_rate4"]
    assert "8 pixels, too few for SSIM" in reasons["mv_consistency2"]
    assert reasons["pr4_full"] == "the data have 3 images, of which it needs 4"


def test_mode_without_real_images_is_not_applicable_to_any_metric(tmp_path):
    evaluation = tiny_evaluation(
        tmp_path,
        Compass(16),
        yaw_deg=[0.0, 30.0, 60.0],
        count=3,
        side=16,
        mode="back",
        detector="colours",
        detectors={"view": ReadCompass()},
    )
    names = ["view_accuracy4", "fd4", "mv_consistency2", "ppl4_wend"]
    for result in compute_metrics(parse_metrics(names), evaluation):
        assert result.values is None and "with an absolute yaw of 90 to 180 degrees" in result.reason


def test_fault_of_a_network_is_not_taken_for_one_of_the_data(tmp_path):
    class Broken(RayTracedGenerator):
        def render(self, *args, **kwargs):
            out = super().render(*args, **kwargs)
            return {**out, "image": out["image"] * float("nan")}

    evaluation = tiny_evaluation(tmp_path, Broken(8), detector="colours")
    with pytest.raises(ValueError, match="expected finite pixel values"):
        list(compute_metrics(parse_metrics(["fd4_full"]), evaluation))
