"""Precision and recall equal a count of all pairs, in whatever blocks and on whatever ranks they are computed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from metrics import precision_recall as module
from metrics.precision_recall import precision_recall
from metrics.registry import NotApplicable, parse_metric
from tests.helpers.evaluations import evaluation_of, stats_of
from torch_utils import distributed


def features(num_images, offset=0.0, seed=0, width=3):
    return (np.random.default_rng(seed).standard_normal((num_images, width)) + offset).astype(np.float32)


def by_pairs(real, generated, num_neighbors):
    """Count, with distances from differences."""

    def squared_distances(x, y):
        return ((x[:, None].astype(np.float64) - y[None]) ** 2).sum(axis=2)

    def share(points, centers):
        radii = np.sort(squared_distances(centers, centers), axis=1)[:, num_neighbors]  # the first is the point itself
        return (squared_distances(points, centers) <= radii).any(axis=1).mean()

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("block_size", [1, 7, 64])
@pytest.mark.parametrize("num_neighbors", [1, 3, 8])
@pytest.mark.parametrize(("num_real", "num_generated"), [(20, 15), (9, 25)])
def test_shares_equal_a_count_of_all_pairs(block_size, num_neighbors, num_real, num_generated):
    real, generated = features(num_real), features(num_generated, offset=0.8, seed=1)
    found = precision_recall(real, generated, num_neighbors=num_neighbors, block_size=block_size)
    assert found == by_pairs(real, generated, num_neighbors)
    if num_neighbors == 1:
        assert 0 < found.precision < 1 and 0 < found.recall < 1


@pytest.mark.parametrize("num_neighbors", [1, 2, 5])
def test_shares_of_points_on_a_grid_count_borders_as_inside(num_neighbors):
    # Many distances are equal, and exact in float64, also through products.
    generator = np.random.default_rng(0)
    real = generator.integers(0, 4, (30, 3)).astype(np.float32)
    generated = generator.integers(1, 6, (30, 3)).astype(np.float32)
    expected = by_pairs(real, generated, num_neighbors)
    assert precision_recall(real, generated, num_neighbors=num_neighbors, block_size=11) == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_points", "width"), [(17, 50), (50, 512)])
def test_copies_are_inside_balls_of_radius_zero(seed, num_points, width):
    # Products round differently by where in a matrix they stand; most of these seeds have one that does.
    points = features(num_points, seed=seed, width=width)
    real = np.random.default_rng(seed).permutation(np.repeat(points, 4, axis=0))
    assert precision_recall(real, points) == (1.0, 1.0)
    moved = points + np.float32(0.001)
    assert precision_recall(real, moved).precision == 0.0


def test_shares_of_a_set_with_itself_are_one_and_of_distant_sets_zero():
    assert precision_recall(features(30), features(30)) == (1.0, 1.0)
    assert precision_recall(features(30), features(30, offset=100.0)) == (0.0, 0.0)


def test_one_kind_of_images_has_precision_without_recall():
    real = features(200)
    found = precision_recall(real, real[0] + features(20, seed=1) * np.float32(0.01))
    assert found.precision == 1.0 and found.recall < 0.05


def test_features_beyond_half_precision_count():
    real, generated = features(30) * 1e5, features(30, seed=1) * 1e5
    assert precision_recall(real, generated) == precision_recall(real / 1e5, generated / 1e5)


def test_three_ranks_share_rows_of_blocks_and_agree_with_one(monkeypatch):
    real, generated = features(40), features(25, offset=0.8, seed=1)
    local, barrier, parts, num_blocks = threading.local(), threading.Barrier(3, timeout=30), [None] * 3, []

    def sum_of_ranks(tensor):
        parts[local.rank] = tensor
        barrier.wait()
        total = parts[0] + parts[1] + parts[2]
        barrier.wait()
        return total

    def shard(items):
        share = list(items)[local.rank :: 3]
        num_blocks.append(len(share))
        return share

    def run(rank):
        local.rank = rank
        return precision_recall(real, generated, block_size=7)

    expected = precision_recall(real, generated, block_size=7)
    monkeypatch.setattr(module, "sum_of_ranks", sum_of_ranks)
    monkeypatch.setattr(distributed, "shard", shard)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [expected] * 3
    assert sorted(num_blocks) == [1] * 4 + [2] * 8  # 6 blocks of one set, 4 of the other, each computed twice


@pytest.mark.parametrize(
    ("real", "generated", "num_neighbors", "message"),
    [
        (np.zeros((9, 2)), np.zeros((9, 4)), 3, r"features: expected \[N, F\]"),
        (np.zeros((9, 2)), np.zeros(9), 3, r"features: expected \[N, F\]"),
        (np.zeros((9, 2)), np.zeros((3, 2)), 3, "more than 3 images of either kind, got 3"),
        (np.zeros((9, 2)), np.zeros((9, 2)), 0, "neighbours: expected at least 1"),
    ],
)
def test_shares_of_unfit_features_are_refused(real, generated, num_neighbors, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, num_neighbors=num_neighbors)


# Metric ---------------------------------------------------------------------------------------------------------------

ALL_AROUND = np.arange(-175.0, 180.0, 10.0).tolist()  # 36 views


@pytest.mark.parametrize(
    ("name", "num_images", "num_neighbors", "num_real"),
    [
        ("pr1k3_full", 1000, 3, None),
        ("pr1k3", 1000, 3, None),
        ("pr1k12", 1000, 12, None),
        ("pr1k_5_full", 1000, 5, None),
        ("pr20_5_full", 20, 5, None),
        ("pr20_full", 20, 3, None),
        ("pr20", 20, 3, 20),
    ],
)
def test_names_tell_images_and_neighbours(name, num_images, num_neighbors, num_real):
    metric = parse_metric(name)
    assert (metric.name, metric.num_neighbors) == (name, num_neighbors)
    real, generated = metric.requests(evaluation_of(ALL_AROUND))
    assert real.detector == generated.detector == "vgg16"
    assert (real.images.kind, real.images.num_images, real.capture) == ("real", num_real, num_real or 36)
    assert (generated.images.kind, generated.images.num_images, generated.capture) == (
        "generated",
        num_images,
        num_images,
    )


@pytest.mark.parametrize("name", ["pr50k0", "pr20_0_full"])
def test_name_without_neighbours_is_refused(name):
    with pytest.raises(ValueError, match="expected from 1 neighbour to"):
        parse_metric(name)


def test_real_images_are_at_most_those_of_the_published_metric(monkeypatch):
    evaluation = evaluation_of(ALL_AROUND)
    monkeypatch.setattr(evaluation, "num_real", lambda yaw: 300_000)
    real, _ = parse_metric("pr20_full").requests(evaluation)
    assert real.images.num_images == real.capture == 200_000


def test_detector_of_the_settings_is_taken():
    real, _ = parse_metric("pr20").requests(evaluation_of(ALL_AROUND, detector="view"))
    assert real.detector == "view"


def test_compute_has_the_published_names_and_the_shares_of_the_rows():
    evaluation, metric = evaluation_of(ALL_AROUND), parse_metric("pr20_5_full")
    real, generated = metric.requests(evaluation)
    rows = {real: features(36), generated: features(20, offset=0.5, seed=1)}
    result = metric.compute(evaluation, {request: stats_of(values, request) for request, values in rows.items()})
    precision, recall = by_pairs(rows[real], rows[generated], 5)
    assert result.values == {"pr20_5_full_precision": precision, "pr20_5_full_recall": recall}
    assert result.details == {"real_images": 36, "generated_images": 20, "features": 3, "neighbors": 5}


def test_too_few_real_images_are_not_applicable():
    with pytest.raises(NotApplicable, match="the data have 3 images, of which it needs 4"):
        parse_metric("pr20").requests(evaluation_of(ALL_AROUND[:3]))
    assert len(parse_metric("pr20").requests(evaluation_of(ALL_AROUND[:4]))) == 2
