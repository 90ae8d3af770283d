"""Kernel distances are unbiased, equal the sums of their definition, and do not depend on who computes which subset."""

import numpy as np
import pytest
import torch

from metrics import kernel_inception_distance
from metrics.kernel_inception_distance import kernel_distances
from metrics.registry import NotApplicable, parse_metric
from tests.helpers.evaluations import evaluation_of, stats_of
from torch_utils import distributed
from torch_utils.rng import derive_seed


def features(num_images, offset=0.0, seed=0, width=5):
    return (np.random.default_rng(seed).standard_normal((num_images, width)) + offset).astype(np.float32)


def by_loops(x, y):
    """The definition, pair by pair."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    size, width = x.shape
    same = sum((a[i] @ a[j] / width + 1) ** 3 for a in (x, y) for i in range(size) for j in range(size) if i != j)
    cross = sum((x[i] @ y[j] / width + 1) ** 3 for i in range(size) for j in range(size))
    return same / (size * (size - 1)) - 2 * cross / size**2


def test_distance_of_whole_sets_equals_the_definition():
    real, generated = features(9), features(9, offset=0.5, seed=1)
    expected = by_loops(real, generated)
    np.testing.assert_allclose(kernel_distances(real, generated), [expected], rtol=1e-12)  # float64


@pytest.mark.parametrize(("num_real", "num_generated"), [(9, 30), (30, 9), (30, 30)])
def test_distances_of_subsets_equal_the_definition_of_each(num_real, num_generated):
    real, generated = features(num_real), features(num_generated, offset=0.5, seed=1)
    found = kernel_distances(real, generated, num_subsets=4, max_subset_size=9, seed=7)
    for subset, value in enumerate(found):
        generator = np.random.default_rng(derive_seed(7, subset))
        parts = [rows[generator.choice(len(rows), 9, replace=False)] for rows in (real, generated)]
        np.testing.assert_allclose(value, by_loops(*parts), rtol=1e-11)  # float64, with cancellation
    assert len(set(found)) == 4


def test_distances_of_one_distribution_have_mean_zero_and_of_two_have_not():
    real, same, other = features(4000), features(4000, seed=1), features(4000, offset=0.3, seed=2)
    settings = {"num_subsets": 50, "max_subset_size": 200}
    of_same, of_other = kernel_distances(real, same, **settings), kernel_distances(real, other, **settings)
    # 50 subsets out of 4000 images are nearly independent; a biased estimate would be 20 standard errors off.
    assert abs(of_same.mean()) < 4 * of_same.std() / np.sqrt(50)
    assert of_other.mean() > 20 * of_other.std() / np.sqrt(50)


def test_distances_depend_on_the_seed_alone(monkeypatch):
    real, generated = features(30), features(40, seed=1)
    first = kernel_distances(real, generated, num_subsets=3, max_subset_size=9)
    np.random.seed(5)
    torch.manual_seed(5)
    np.testing.assert_array_equal(kernel_distances(real, generated, num_subsets=3, max_subset_size=9), first)
    assert (kernel_distances(real, generated, num_subsets=3, max_subset_size=9, seed=1) != first).all()


def test_ranks_compute_each_subset_once(monkeypatch):
    real, generated = features(30), features(40, seed=1)
    whole = kernel_distances(real, generated, num_subsets=7, max_subset_size=9)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "shard", lambda items, rank=rank: list(items)[rank::3])
        monkeypatch.setattr(kernel_inception_distance, "sum_of_ranks", lambda tensor: shares.append(tensor) or tensor)
        kernel_distances(real, generated, num_subsets=7, max_subset_size=9)
    np.testing.assert_array_equal(sum(shares).numpy(), whole)
    assert [int((share != 0).sum()) for share in shares] == [3, 2, 2]


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 4)), r"features: expected \[N, F\]"),
        (np.zeros((3, 2)), np.zeros(3), r"features: expected \[N, F\]"),
        (np.zeros((1, 2)), np.zeros((3, 2)), "at least 2 images of either kind, got 1"),
    ],
)
def test_distances_of_unfit_features_are_refused(real, generated, message):
    with pytest.raises(ValueError, match=message):
        kernel_distances(real, generated)


# Metric ---------------------------------------------------------------------------------------------------------------

ALL_AROUND = np.arange(-175.0, 180.0, 10.0).tolist()  # 36 views


@pytest.mark.parametrize(
    ("name", "detector", "num_real"),
    [("kid20_full", "inception", None), ("kd20_full", "view", None), ("kd20", "view", 20), ("kd40", "view", None)],
)
def test_requests_capture_the_images_that_the_name_says(name, detector, num_real):
    real, generated = parse_metric(name).requests(evaluation_of(ALL_AROUND))
    assert real.detector == generated.detector == detector
    assert (real.images.kind, real.images.num_images, real.capture) == ("real", num_real, num_real or 36)
    assert (generated.images.kind, generated.images.num_images) == ("generated", generated.capture)


def test_kid_refuses_other_detectors_and_kd_takes_them():
    evaluation = evaluation_of(ALL_AROUND, detector="dinov2")
    with pytest.raises(ValueError, match="is called kd"):
        parse_metric("kid20").requests(evaluation)
    assert parse_metric("kd20").requests(evaluation)[0].detector == "dinov2"


def test_compute_is_the_mean_over_subsets_of_the_requested_rows():
    evaluation, metric = evaluation_of(ALL_AROUND, seed=3), parse_metric("kd20_full")
    real, generated = metric.requests(evaluation)
    rows = {real: features(36), generated: features(30, offset=1.0, seed=1)}
    stats = {real: stats_of(rows[real], real)}
    more = type(generated)(images=generated.images, detector="view", moments=True, capture=30)  # of another metric
    stats[generated] = stats_of(rows[generated], more)
    result = metric.compute(evaluation, stats)
    expected = kernel_distances(rows[real], rows[generated][:20], seed=3)
    assert result.values == {"kd20_full": expected.mean()}
    assert result.details["subset_size"] == 20 and result.details["subsets"] == 100
    assert result.details["std_of_subsets"] == expected.std()


def test_data_of_one_image_are_not_applicable():
    evaluation, metric = evaluation_of([0.0]), parse_metric("kd20")
    with pytest.raises(NotApplicable, match="1 images, of which it needs 2"):
        metric.requests(evaluation)
