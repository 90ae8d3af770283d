"""Frechet distances are exact, also of singular covariances, and compare the sets of images that names say."""

import numpy as np
import pytest
import scipy.linalg

from metrics.frechet_distance import frechet_distance
from metrics.registry import NotApplicable, parse_metric
from metrics.requests import BACK, FRONT, yaw_bins
from tests.helpers.evaluations import evaluation_of, stats_of

ALL_AROUND = np.arange(-175.0, 180.0, 10.0).tolist()  # 36 views


def normal(num_features, rank=None, seed=0):
    """Return mean and covariance of a given rank, of scales from 1 to 1e-3."""
    generator = np.random.default_rng(seed)
    factor = (
        generator.standard_normal((num_features, rank or num_features + 3)) * np.logspace(0, -3, num_features)[:, None]
    )
    return generator.standard_normal(num_features), factor @ factor.T


def by_root_of_product(mean1, cov1, mean2, cov2):
    """The published formula, with the square root of a general matrix."""
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * root)


def by_symmetric_root(mean1, cov1, mean2, cov2):
    """The formula with the root of C1^(1/2) C2 C1^(1/2), from eigenvalues alone."""
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace


@pytest.mark.parametrize("formula", [by_root_of_product, by_symmetric_root])
@pytest.mark.parametrize("num_features", [1, 7, 64])
def test_distance_of_full_rank_equals_other_formulas(formula, num_features):
    parts = (*normal(num_features, seed=1), *normal(num_features, seed=2))
    # Conditions up to 1e6 per covariance: roots of products of eigenvalues are exact to about 1e-10.
    np.testing.assert_allclose(frechet_distance(*parts), formula(*parts), rtol=1e-9)


def test_distance_of_diagonal_covariances_is_that_of_standard_deviations():
    generator = np.random.default_rng(0)
    mean1, mean2 = generator.standard_normal((2, 20))
    std1, std2 = generator.random((2, 20))
    std1[:4] = std2[2:6] = 0
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((std1 - std2) ** 2)
    distance = frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2))
    np.testing.assert_allclose(distance, expected, rtol=1e-13)  # float64


def test_distance_between_scaled_copies_is_known():
    mean, cov = normal(30, seed=3)
    expected = 4 * mean @ mean + (3 - 1) ** 2 * np.trace(cov)
    np.testing.assert_allclose(frechet_distance(mean, cov, 3 * mean, 9 * cov), expected, rtol=1e-12)  # float64


@pytest.mark.parametrize("rank1", [1, 5, 40])
@pytest.mark.parametrize("rank2", [1, 5, 40])
def test_distance_of_singular_covariances_is_exact(rank1, rank2):
    # The distance does not depend on the basis, and factors of the small ones are known.
    generator = np.random.default_rng(4)
    basis = np.linalg.qr(generator.standard_normal((200, 40)))[0]
    (mean1, cov1), (mean2, cov2) = normal(40, rank1, seed=5), normal(40, rank2, seed=6)
    wide = (basis @ mean1, basis @ cov1 @ basis.T, basis @ mean2, basis @ cov2 @ basis.T)
    scales = np.logspace(0, -3, 40)[:, None]
    factor1 = np.random.default_rng(5).standard_normal((40, rank1)) * scales
    factor2 = np.random.default_rng(6).standard_normal((40, rank2)) * scales
    trace = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace
    # Eigenvalues below 200 * 2e-16 of the largest are left out: roots of that, 2e-7, times the few that there are.
    np.testing.assert_allclose(frechet_distance(*wide), expected, rtol=1e-7)


def test_distance_of_singular_covariances_leaves_out_directions_of_rounding():
    generator = np.random.default_rng(0)
    few, many = generator.standard_normal((5, 300)), generator.standard_normal((100, 300))
    trace = np.linalg.svd(few @ many.T, compute_uv=False).sum()
    expected = np.sum(few**2) + np.sum(many**2) - 2 * trace
    # Directions of rounding, 1e-8 long, next to 100 others would make an error of 3e-9.
    distance = frechet_distance(np.zeros(300), few.T @ few, np.zeros(300), many.T @ many)
    np.testing.assert_allclose(distance, expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_distance_to_itself_is_zero_with_fewer_images_than_features(seed):
    features = np.random.default_rng(seed).standard_normal((50, 300)) * 10
    mean, cov = features.mean(axis=0), np.cov(features.T, bias=True)
    # Total variance is 30,000. The published way gives -0.002: roots of 250 eigenvalues of 1e-12.
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_distance_to_itself_is_never_negative(seed):
    # Without clipping, three of these are.
    features = np.random.default_rng(seed).standard_normal((6, 3))
    cov = features.T @ features
    assert 0 <= frechet_distance(np.zeros(3), cov, np.zeros(3), cov) < 1e-12


def test_distance_ignores_rounding_of_singular_covariances():
    features = np.random.default_rng(8).standard_normal((2, 50, 300)) * 10
    exact = [part for x in features for part in (x.mean(axis=0), np.cov(x.T, bias=True))]
    rounded = [part + np.abs(part).max() * 1e-16 * _symmetric_noise(part.shape) for part in exact]
    # Other summation, as on two ranks, must give the same to 1e-6, which is what results promise.
    np.testing.assert_allclose(frechet_distance(*rounded), frechet_distance(*exact), rtol=1e-10)


def _symmetric_noise(shape):
    noise = np.random.default_rng(9).standard_normal(shape)
    return noise if noise.ndim == 1 else noise + noise.T


def test_distance_is_symmetric_and_zero_without_variance():
    parts1, parts2 = normal(10, 4, seed=1), normal(10, 20, seed=2)
    np.testing.assert_allclose(frechet_distance(*parts1, *parts2), frechet_distance(*parts2, *parts1), rtol=1e-12)
    zero = np.zeros((10, 10))
    assert frechet_distance(parts1[0], zero, parts1[0], zero) == 0
    np.testing.assert_allclose(frechet_distance(parts1[0], zero, parts1[0], parts2[1]), np.trace(parts2[1]), rtol=1e-14)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "means"),
        ((np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), r"\[2, 2\]"),
        ((np.array([0, np.nan]), np.eye(2), np.zeros(2), np.eye(2)), "means: expected finite"),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.diag([1, np.inf])), "covariance: expected finite"),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.array([[1, 1], [0, 1]])), "symmetric"),
        ((np.zeros(2), np.diag([1, -0.1]), np.zeros(2), np.eye(2)), "no negative eigenvalue"),
    ],
)
def test_distance_of_what_is_no_normal_distribution_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*parts)


# Metrics --------------------------------------------------------------------------------------------------------------


def features(num_images, offset=0.0, seed=0, width=4):
    return np.random.default_rng(seed).standard_normal((num_images, width)).astype(np.float32) + np.float32(offset)


@pytest.mark.parametrize(
    ("name", "yaw", "cameras", "num_real"),
    [
        ("fd20_full", None, "matched", None),
        ("fd20", None, "matched", 20),
        ("fd50", None, "matched", None),  # more than there are
        ("fd_random20_full", None, "random", None),
        ("fd_front20_full", FRONT, "matched", None),
        ("fd_back8", BACK, "matched", 8),
        ("fd-back8", BACK, "matched", 8),
    ],
)
def test_requests_are_for_the_images_that_the_name_says(name, yaw, cameras, num_real):
    real, generated = parse_metric(name).requests(evaluation_of(ALL_AROUND))
    assert real.detector == generated.detector == "view"
    assert real.moments and generated.moments and real.capture is generated.capture is None
    assert (real.images.kind, real.images.num_images, real.images.yaw) == ("real", num_real, yaw)
    expected = ("generated", int("".join(filter(str.isdigit, name))), yaw, cameras)
    images = generated.images
    assert (images.kind, images.num_images, images.yaw, images.cameras) == expected


def test_requests_without_a_view_are_those_of_the_mode():
    real, generated = parse_metric("fd20_full").requests(evaluation_of(ALL_AROUND, mode="back"))
    assert (real.images.yaw, generated.images.yaw, generated.images.cameras) == (BACK, BACK, "frontal")


def test_compute_is_the_distance_of_the_statistics():
    evaluation, metric = evaluation_of(ALL_AROUND), parse_metric("fd20_full")
    real, generated = metric.requests(evaluation)
    rows = {real: features(36), generated: features(20, offset=3.0, seed=1)}
    result = metric.compute(evaluation, {request: stats_of(values, request) for request, values in rows.items()})
    parts = [
        part for x in rows.values() for part in (x.mean(axis=0, dtype=float), np.cov(x.T.astype(float), bias=True))
    ]
    np.testing.assert_allclose(result.values["fd20_full"], by_symmetric_root(*parts), rtol=1e-10)  # float64
    assert result.details == {"real_images": 36, "generated_images": 20, "features": 4}


@pytest.mark.parametrize("name", ["fid20_full", "fid_yaw20_full", "fid_back20"])
def test_fid_is_of_inception_and_refuses_others(name):
    metric = parse_metric(name)
    assert {request.detector for request in metric.requests(evaluation_of(ALL_AROUND))} == {"inception"}
    assert metric.requests(evaluation_of(ALL_AROUND, detector="inception"))
    with pytest.raises(ValueError, match=f"detector of {name}: expected inception, .* is called fd, got 'dinov2'"):
        metric.requests(evaluation_of(ALL_AROUND, detector="dinov2"))


def test_fd_takes_the_detector_of_the_settings():
    requests = parse_metric("fd_yaw20_full").requests(evaluation_of(ALL_AROUND, detector="dinov2"))
    assert {request.detector for request in requests} == {"dinov2"}


def test_side_without_real_images_is_not_applicable():
    evaluation, metric = evaluation_of([-20.0, 5.0, 30.0, 100.0]), parse_metric("fd_back20_full")
    with pytest.raises(NotApplicable, match="1 images with an absolute yaw of 90 to 180 degrees, of which it needs 2"):
        metric.requests(evaluation)


def test_mode_without_real_images_is_not_applicable():
    evaluation = evaluation_of([-20.0, 5.0, 30.0, 100.0], mode="back")
    with pytest.raises(NotApplicable, match="1 images with an absolute yaw of 90 to 180 degrees, of which it needs 2"):
        parse_metric("fd20").requests(evaluation)


# Over the yaw ---------------------------------------------------------------------------------------------------------


def test_yaw_images_are_split_evenly_over_the_ranges():
    requests = parse_metric("fd_yaw27_full").requests(evaluation_of(ALL_AROUND, num_yaw_bins=4))
    generated = [request.images for request in requests if request.images.kind == "generated"]
    assert [images.num_images for images in generated] == [7, 7, 7, 6]
    assert [images.yaw for images in generated] == list(yaw_bins(4))
    assert [request.images.yaw for request in requests if request.images.kind == "real"] == list(yaw_bins(4))


def test_yaw_value_is_the_mean_of_a_curve_without_empty_ranges():
    yaws = [*np.linspace(-170, -100, 9), *np.linspace(10, 80, 9), 120.0]  # ranges of 9, 0, 9 and 1 views
    evaluation, metric = evaluation_of(yaws, num_yaw_bins=4), parse_metric("fd_yaw40_full")
    requests = metric.requests(evaluation)
    assert len(requests) == 4
    offsets = [0.0, 1.0, 0.0, 5.0]  # of real and generated images of the ranges that there are
    sets = {
        r: features(r.images.num_images or 9, offset, seed) for seed, (r, offset) in enumerate(zip(requests, offsets))
    }
    result = metric.compute(evaluation, {request: stats_of(values, request) for request, values in sets.items()})
    assert result.curve.x == (-135.0, -45.0, 45.0, 135.0)
    first, second = result.curve.y[0], result.curve.y[2]
    assert result.curve.y[1] is result.curve.y[3] is None
    assert result.values == {"fd_yaw40_full": (first + second) / 2}
    assert 4 < first < 15 and 100 < second < 130  # offsets of 1 and 5 in 4 features, and few images
    assert [entry["real_images"] for entry in result.details["ranges"]] == [9, 0, 9, 1]
    assert [entry["generated_images"] for entry in result.details["ranges"]] == [10, 0, 10, 0]


def test_yaw_without_any_pair_of_images_is_not_applicable():
    evaluation, metric = evaluation_of([-100.0, 10.0], num_yaw_bins=4), parse_metric("fd_yaw40")
    with pytest.raises(NotApplicable, match="no range of yaws"):
        metric.requests(evaluation)


def test_yaw_with_fewer_than_two_images_per_range_is_refused():
    with pytest.raises(ValueError, match="fd_yaw15_full: expected 16 images or more in 8 yaw bins, got 15"):
        parse_metric("fd_yaw15_full").requests(evaluation_of(ALL_AROUND))
