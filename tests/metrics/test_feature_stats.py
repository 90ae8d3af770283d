"""Statistics of features are those of all images, whatever batches and ranks they came in."""

import json

import numpy as np
import pytest
import torch

from metrics import feature_stats
from metrics.feature_stats import FeatureStats
from tests.helpers.ranks import Launch

NUM_FEATURES = 5


def some_features(num_images=40, num_features=NUM_FEATURES, seed=0):
    return torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def stats_of(features, *, batch=7, order=None, moments=True, capture=None):
    stats = FeatureStats(moments=moments, capture=capture)
    order = np.arange(len(features)) if order is None else order
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        stats.add(features[torch.from_numpy(indices)], indices)
    stats.reduce()
    return stats


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(feature_stats, "_BLOCK_BYTES", 4 * NUM_FEATURES * 3)  # 3 rows


def test_mean_cov_are_those_of_numpy_in_float64():
    features = some_features()
    mean, cov = stats_of(features).mean_cov()
    assert mean.dtype == cov.dtype == np.float64
    # Rounding of float64 alone; that of float32 would be 1e-7.
    np.testing.assert_allclose(mean, features.double().numpy().mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy().T, bias=True), rtol=1e-12, atol=1e-13)


def test_cov_is_symmetric_to_the_bit():
    _, cov = stats_of(some_features()).mean_cov()
    assert np.array_equal(cov, cov.T)


def test_cov_of_features_far_from_zero_loses_nothing():
    features = some_features().double() * 1e-3 + 1e6
    _, cov = stats_of(features).mean_cov()
    # E[xx^T] - mu mu^T taken from 0 would be wrong by 1e12 * 1e-16 = 1e-4, ten times the covariance itself.
    np.testing.assert_allclose(cov, np.cov(features.numpy().T, bias=True), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 8, 40])
def test_mean_cov_do_not_depend_on_batches_and_order(batch):
    features = some_features()
    mean, cov = stats_of(features).mean_cov()
    other_mean, other_cov = stats_of(features, batch=batch, order=np.random.default_rng(0).permutation(40)).mean_cov()
    np.testing.assert_allclose(other_mean, mean, rtol=1e-13)  # float64, another order of summation
    np.testing.assert_allclose(other_cov, cov, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("capture", [1, 13, 40, 1000])
def test_rows_are_those_of_the_first_images_in_their_order(small_blocks, capture):
    features = some_features()
    order = np.random.default_rng(1).permutation(40)
    stats = stats_of(features, order=order, capture=capture)
    assert stats.rows().dtype == np.float32
    np.testing.assert_array_equal(stats.rows(), features[:capture].numpy())
    np.testing.assert_array_equal(stats.row_indices(), np.arange(min(capture, 40)))


def test_rows_of_an_incomplete_set_know_their_images(small_blocks):
    features = some_features()
    stats = stats_of(features, order=np.array([30, 2, 39, 5]), capture=35)
    assert stats.num_items == 4 and stats.row_indices().tolist() == [2, 5, 30]
    np.testing.assert_array_equal(stats.rows(), features[[2, 5, 30]].numpy())


def test_half_precision_features_are_summed_in_float64():
    features = some_features().half()
    mean, _ = stats_of(features).mean_cov()
    np.testing.assert_allclose(mean, features.double().numpy().mean(axis=0), rtol=1e-13)  # float64


def test_reduce_frees_blocks_while_it_fills_the_rows(monkeypatch):
    monkeypatch.setattr(feature_stats, "_rows_per_block", lambda num_features: 100)
    held = []
    original = feature_stats._broadcast

    def spy(block, shape, src):
        held.append(len(stats._blocks))
        return original(block, shape, src)

    monkeypatch.setattr(feature_stats, "_broadcast", spy)
    stats = FeatureStats(moments=False, capture=1000)
    stats.add(some_features(1000), np.arange(1000))
    stats.reduce()
    assert held == list(range(9, -1, -1))


def test_rows_are_not_copied_when_asked_for():
    stats = stats_of(some_features(), capture=40)
    assert np.shares_memory(stats.rows(), stats.rows())


def test_reduce_twice_changes_nothing():
    stats = stats_of(some_features(), capture=10)
    before = [*stats.mean_cov(), stats.rows(), stats.row_indices()]
    stats.reduce()
    for value, other in zip(before, [*stats.mean_cov(), stats.rows(), stats.row_indices()]):
        np.testing.assert_array_equal(value, other)


def test_empty_batch_is_nothing():
    stats = FeatureStats(moments=True, capture=3)
    stats.add(torch.empty(0, 4), np.empty(0, np.int64))
    stats.reduce()
    assert (stats.num_items, stats.num_features, stats.rows().shape) == (0, None, (0, 0))
    with pytest.raises(ValueError, match="at least one image"):
        stats.mean_cov()


def test_one_image_has_no_covariance_but_a_finite_one():
    mean, cov = stats_of(some_features(1)).mean_cov()
    np.testing.assert_array_equal(cov, np.zeros((NUM_FEATURES, NUM_FEATURES)))
    np.testing.assert_array_equal(mean, some_features(1).double().numpy()[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_add_features_not_finite_names_the_image(value):
    features = some_features(4)
    features[2, 1] = value
    with pytest.raises(ValueError, match="image 12: expected finite"):
        FeatureStats(moments=True, capture=None).add(features, np.arange(10, 14))


@pytest.mark.parametrize(
    ("features", "indices", "message"),
    [
        (torch.zeros(2, 6), [5, 6], "5 per image as before"),
        (torch.zeros(2), [5, 6], r"\[2, F\]"),
        (torch.zeros(2, 5), [5], r"\[1, F\]"),
        (torch.zeros(2, 0), [5, 6], r"\[2, F\]"),
        (torch.zeros(2, 5), [-1, 6], "integers of at least 0"),
        (torch.zeros(2, 5), [0.5, 6], "integers of at least 0"),
    ],
)
def test_add_mismatched_features_and_indices_are_refused(features, indices, message):
    stats = FeatureStats(moments=True, capture=2)
    stats.add(some_features(1), np.arange(1))
    with pytest.raises(ValueError, match=message):
        stats.add(features, np.array(indices))


def test_reduce_image_that_came_twice_is_named():
    stats = FeatureStats(moments=True, capture=None)
    stats.add(some_features(2), np.array([3, 7]))
    stats.add(some_features(2), np.array([7, 8]))
    with pytest.raises(ValueError, match=r"every index once, got \[7\]"):
        stats.reduce()


def test_calls_in_wrong_order_are_refused():
    stats = FeatureStats(moments=True, capture=3)
    for question in (stats.mean_cov, stats.rows, stats.row_indices):
        with pytest.raises(RuntimeError, match="expected reduce first"):
            question()
    stats.reduce()
    with pytest.raises(RuntimeError, match="before reduce"):
        stats.add(some_features(1), np.arange(1))


def test_mean_cov_without_moments_is_refused():
    with pytest.raises(ValueError, match="statistics with moments"):
        stats_of(some_features(), moments=False, capture=2).mean_cov()


def test_capture_below_one_is_refused():
    with pytest.raises(ValueError, match="capture: expected a number of images, or None, got 0"):
        FeatureStats(moments=False, capture=0)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("capture", [None, 11])
@pytest.mark.parametrize("num_images", [0, 40])
def test_save_and_load_give_the_same(tmp_path, moments, capture, num_images):
    stats = stats_of(some_features(num_images), moments=moments, capture=capture)
    stats.save(tmp_path / "a.safetensors")
    other = FeatureStats.load(tmp_path / "a.safetensors")
    for name in ("moments", "capture", "num_items", "num_features"):
        assert getattr(other, name) == getattr(stats, name)
    np.testing.assert_array_equal(other.rows(), stats.rows())
    np.testing.assert_array_equal(other.row_indices(), stats.row_indices())
    if moments and num_images:
        for value, expected in zip(other.mean_cov(), stats.mean_cov()):
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("position", [30, -20])
def test_load_damaged_file_is_named(tmp_path, position):
    path = tmp_path / "a.safetensors"
    stats_of(some_features(), capture=4).save(path)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.safetensors: "):
        FeatureStats.load(path)


def test_load_file_cut_off_or_of_another_kind_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    stats_of(some_features(), capture=4).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.safetensors: expected .* bytes"):
        FeatureStats.load(path)
    feature_stats.write_tensor_file(path, "other", {}, None)
    with pytest.raises(ValueError, match=r"a\.safetensors: expected contents of kind"):
        FeatureStats.load(path)


def test_load_file_with_other_tensors_is_refused(tmp_path):
    header = {"moments": True, "capture": None, "num_items": 3, "num_features": 2}
    for tensors, name in (({}, "its tensors"), ({"mean": torch.zeros(2), "cov": torch.zeros(2, 2)}, "its tensors")):
        feature_stats.write_tensor_file(tmp_path / "a", feature_stats.KIND, tensors, header)
        with pytest.raises(ValueError, match=name):
            FeatureStats.load(tmp_path / "a")
    feature_stats.write_tensor_file(tmp_path / "a", feature_stats.KIND, {}, {"moments": True})
    with pytest.raises(ValueError, match="its header is damaged"):
        FeatureStats.load(tmp_path / "a")


def test_save_before_reduce_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="expected reduce first"):
        FeatureStats(moments=True, capture=None).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# Several ranks --------------------------------------------------------------------------------------------------------

# Even batches on one rank and odd ones on the other; then all on one of them; then widths that differ.
_OF_A_RANK = f"""
import hashlib, json, sys, numpy as np, torch
from metrics import feature_stats
from torch_utils import distributed
feature_stats._BLOCK_BYTES = 4 * {NUM_FEATURES} * 3
features = torch.randn(40, {NUM_FEATURES}, generator=torch.Generator().manual_seed(0)) * 3 + 1
with distributed.session("cpu"):
    rank, digests, found = distributed.rank(), [], None
    for share in (lambda batch: batch % 2 == rank, lambda batch: rank == 1, lambda batch: False):
        stats = feature_stats.FeatureStats(moments=True, capture=33)
        for batch in filter(share, range(6)):
            indices = np.arange(batch * 7, min(batch * 7 + 7, 40))
            stats.add(features[torch.from_numpy(indices)], indices)
        stats.reduce()
        results = [stats.rows(), stats.row_indices()] + ([*stats.mean_cov()] if stats.num_items else [])
        digests.append(hashlib.md5(b"".join(result.tobytes() for result in results)).hexdigest())
        found = found or [stats.num_items, *(result.tolist() for result in results)]
    stats = feature_stats.FeatureStats(moments=True, capture=None)
    stats.add(torch.zeros(1, 3 + rank), np.array([rank]))
    try:
        stats.reduce()
    except ValueError as error:
        digests.append(str(error))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, digests)
    if rank == 0:
        print(json.dumps([everyone, found]))
"""


def test_two_ranks_have_the_same_statistics_as_one():
    outcome = Launch(_OF_A_RANK, environment={"OMP_NUM_THREADS": "1"}).finish()
    assert outcome.status == 0, outcome.err
    everyone, found = json.loads(outcome.out.strip().splitlines()[-1])
    assert everyone[0] == everyone[1]
    assert everyone[0][-1] == "features: expected as many per image on all ranks, got [3, 4]"
    num_items, rows, indices, mean, cov = found
    features = some_features()
    expected = stats_of(features, capture=33)
    assert num_items == 40 and indices == list(range(33))
    np.testing.assert_array_equal(np.array(rows, np.float32), features[:33].numpy())
    np.testing.assert_allclose(mean, expected.mean_cov()[0], rtol=1e-13)  # float64, another order of summation
    np.testing.assert_allclose(cov, expected.mean_cov()[1], rtol=1e-12, atol=1e-13)
