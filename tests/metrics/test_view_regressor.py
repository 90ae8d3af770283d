"""The detector `view` learns directions, says how well, and refuses data from which it cannot."""

import pytest
import torch

from metrics.detectors import load_detector
from metrics.directions import view_directions
from metrics.registry import NotApplicable
from metrics.training_examples import Examples, to_float
from metrics.view_regressor import ViewNetwork, ViewTask, load_view_detector
from tests.helpers.head_data import head_labels
from tests.helpers.toy_views import QUICK, ball, toy_context, toy_dataset

YAW_DEG = [-150.0, -60.0, 0.0, 45.0, 120.0, 178.0]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    dataset = toy_dataset(tmp_path_factory.mktemp("data"), 256)
    return load_view_detector(toy_context(dataset), QUICK)


@pytest.fixture
def images():
    return torch.stack([torch.from_numpy(ball(yaw)[0]).permute(2, 0, 1) for yaw in YAW_DEG])


def directions_of(yaw_deg):
    return torch.from_numpy(view_directions(head_labels(yaw_deg))).float()


def test_directions_are_learnt(detector, images):
    directions = detector(images, "directions")
    expected = directions_of(YAW_DEG)
    angle = torch.rad2deg(torch.acos((directions * expected).sum(1).clamp(-1, 1)))
    assert angle.max() < 35  # 90 by chance
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(6), rtol=1e-5, atol=0)  # float32


def test_directions_of_mirrored_images_are_mirrored(detector, images):
    mirrored = detector(images.flip(3), "directions") * torch.tensor([-1.0, 1.0, 1.0])
    torch.testing.assert_close(mirrored, detector(images, "directions"), rtol=0, atol=1e-5)  # sums in another order


def test_report_is_about_images_held_out(detector):
    report = detector.info.held_out
    assert set(report) == {"num_images", "median_deg", "mean_deg", "above_30_deg", "back_taken_for_front"}
    assert report["median_deg"] < 20 and report["back_taken_for_front"] == 0
    assert detector.info.name == f"view (trained on this data: {256 - int(report['num_images'])} images)"
    assert detector.info.resize == "area average, to 32" and detector.info.sha256 is None
    assert detector.info.to_json()["held_out"] == report


def test_features_have_their_formula(detector, images):
    features = detector(images, "features")
    assert features.shape == (6, 352) and features.dtype == torch.float32
    with torch.no_grad():
        layers = detector._network.activations(to_float(images))
    torch.testing.assert_close(features[:, :16], layers[0].mean((2, 3)), rtol=1e-4, atol=1e-5)  # another memory layout
    std = layers[2].double().var((2, 3), correction=0).sqrt().float()
    torch.testing.assert_close(features[:, 160:224], std, rtol=1e-4, atol=2e-4)  # 1e-8 is added under the root
    torch.testing.assert_close(features[:, 224:], layers[-1].mean((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output", ["directions", "features"])
def test_rows_do_not_depend_on_the_batch(detector, images, output):
    together, alone = detector(images, output), detector(images[3:4], output)
    torch.testing.assert_close(together[3:4], alone, rtol=1e-4, atol=1e-5)  # sums in another order


def test_images_of_another_size_are_averaged_down(detector, images):
    larger = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    exact = detector(images, "directions")
    torch.testing.assert_close(detector(larger, "directions"), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_other_images_are_an_error(detector, bad):
    with pytest.raises(ValueError, match=r"images: expected 'uint8 \[B, 3, H, W\]|images: expected uint8"):
        detector(bad, "directions")


def test_other_outputs_are_an_error(detector, images):
    with pytest.raises(ValueError, match="one of the outputs directions, features, got 'probabilities'"):
        detector(images, "probabilities")


def test_cameras_in_one_place_are_not_applicable(tmp_path):
    frontal = toy_dataset(tmp_path, yaw_deg=[i / 20 for i in range(100)])
    with pytest.raises(NotApplicable, match="cameras all around, or at least 5 degrees from their middle"):
        load_detector("view", toy_context(frontal))


def test_data_without_cameras_are_an_error(tmp_path):
    dataset = toy_dataset(tmp_path, conditional=False)
    with pytest.raises(ValueError, match="expected cameras of the images, got 'none'"):
        load_detector("view", toy_context(dataset))


@pytest.mark.parametrize("size", [32, 64])
def test_network_has_the_same_features_at_both_sizes(size):
    layers = ViewNetwork(size).activations(torch.zeros(1, 3, size, size))
    assert [layer.shape[1:] for layer in layers] == [
        (16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 8, 8), (128, 4, 4), (128, 4, 4),
    ]  # fmt: skip


def test_rare_views_come_more_often():
    directions = directions_of([0.0] * 90 + [178.0] * 10)
    weights = ViewTask().sampling_weights(Examples(images=torch.zeros(100, 1), directions=directions))
    assert (weights[-1] / weights[0]).item() == pytest.approx(3)  # the root of 90 / 10


class Fixed(torch.nn.Module):
    """Always answers with the same directions, and knows mirrored images by their bright right half."""

    def __init__(self, directions):
        super().__init__()
        self.directions = directions

    def forward(self, images):
        mirrored = (images[..., -1] > images[..., 0]).all()
        return self.directions * (torch.tensor([-0.3, 0.3, 0.3]) if mirrored else 0.3)


def evaluated(yaw_deg, predicted_deg):
    images = torch.zeros(len(yaw_deg), 3, 4, 4, dtype=torch.uint8)
    images[..., :2] = 200
    examples = Examples(images=images, directions=directions_of(yaw_deg))
    return ViewTask().evaluate(Fixed(directions_of(predicted_deg)), examples)


def test_evaluate_measures_angles_and_faces_behind():
    report = evaluated([0.0, 90.0, 150.0, -150.0, 130.0], [10.0, 90.0, 30.0, -150.0, 65.0])
    assert report["median_deg"] == pytest.approx(10, abs=1e-3)
    assert report["mean_deg"] == pytest.approx((10 + 0 + 120 + 0 + 65) / 5, abs=1e-3)
    assert report["above_30_deg"] == pytest.approx(2 / 5)
    assert report["back_taken_for_front"] == pytest.approx(1 / 3)


def test_evaluate_without_views_from_behind_says_nothing_about_them():
    assert "back_taken_for_front" not in evaluated([0.0, 90.0], [0.0, 90.0])
