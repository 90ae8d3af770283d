"""Inception scores are those of their definition, and of probabilities alone."""

import numpy as np
import pytest

from metrics.inception_score import inception_scores
from metrics.registry import parse_metric
from tests.helpers.evaluations import evaluation_of, stats_of


def probabilities(num_images, num_classes=6, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(num_classes, 0.3), num_images).astype(np.float32)


def by_entropies(part):
    """exp(H(mean) - mean H), the score as mutual information."""

    def entropy(p):
        return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)

    part = part.astype(np.float64)
    part /= part.sum(axis=1, keepdims=True)
    return np.exp(entropy(part.mean(axis=0)) - entropy(part).mean())


def test_scores_are_those_of_consecutive_parts():
    rows = probabilities(43)
    edges = [43 * part // 10 for part in range(11)]
    expected = [by_entropies(rows[low:high]) for low, high in zip(edges, edges[1:])]
    # float32 probabilities sum to 1 within 1e-7.
    np.testing.assert_allclose(inception_scores(rows), expected, rtol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 4, 10])
def test_sure_and_evenly_spread_classes_score_their_number(num_classes):
    rows = np.tile(np.eye(num_classes), (5, 1))
    np.testing.assert_allclose(inception_scores(rows, num_splits=1), [num_classes], rtol=1e-14)  # float64


def test_equal_probabilities_score_one():
    rows = np.repeat(probabilities(1), 20, axis=0)
    np.testing.assert_allclose(inception_scores(rows), np.ones(10), rtol=1e-14)  # float64


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((9, 2), 0.5), "as many images as the 10 parts, got 9"),
        (np.full((20, 2), 0.4), "with a sum of 1"),
        (np.tile([1.5, -0.5], (20, 1)), "at least 0"),
        (np.full((20, 2), np.nan), "at least 0"),
        (np.full(20, 0.5), r"\[N, C\]"),
    ],
)
def test_what_is_no_distribution_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        inception_scores(rows)


# Metric ---------------------------------------------------------------------------------------------------------------


def test_compute_gives_mean_and_deviation_of_the_parts():
    evaluation, metric = evaluation_of([0.0, 90.0]), parse_metric("is30")
    (request,) = metric.requests(evaluation)
    assert (request.detector, request.output, request.capture) == ("inception", "probabilities", 30)
    assert (request.images.kind, request.images.num_images) == ("generated", 30)
    rows = probabilities(30)
    result = metric.compute(evaluation, {request: stats_of(rows, request)})
    scores = inception_scores(rows)
    assert result.values == {"is30_mean": scores.mean(), "is30_std": scores.std()}
    assert result.details == {"generated_images": 30, "splits": 10}


def test_other_detectors_are_refused():
    with pytest.raises(ValueError, match="detector of is30: expected inception, which defines it, got 'view'"):
        parse_metric("is30").requests(evaluation_of([0.0], detector="view"))


def test_fewer_images_than_parts_are_refused():
    with pytest.raises(ValueError, match="metric is9: expected at least 10 images, got 9"):
        parse_metric("is9")
