"""Directions from which heads are seen."""

import numpy as np
import pytest

from metrics.directions import angle_deg, view_directions, yaw_of
from tests.helpers.head_data import head_labels, spread_yaw_deg
from training.head_labels import view_angles_deg


@pytest.mark.parametrize("yaw_deg, expected", [(0, (0, 0, 1)), (90, (1, 0, 0)), (180, (0, 0, -1)), (-90, (-1, 0, 0))])
def test_view_directions_known_yaws(yaw_deg, expected):
    # float32 labels
    np.testing.assert_allclose(view_directions(head_labels([yaw_deg])), [expected], atol=1e-6)


def test_view_directions_point_to_the_camera():
    labels = head_labels(spread_yaw_deg(7), 0.3)
    np.testing.assert_allclose(view_directions(labels), labels[:, [3, 7, 11]] / 2.7, atol=1e-6)  # float32


def test_angle_deg_known_angles_of_any_length():
    x, y = np.array([1.0, 0, 0]), np.array([0, 2.0, 0])
    first = np.stack([x, x, x, x])
    second = np.stack([x * 3, y, -x, x + 1e-9 * y])
    np.testing.assert_allclose(angle_deg(first, second), [0, 90, 180, np.rad2deg(2e-9)], rtol=1e-12, atol=1e-15)


def test_angle_deg_of_a_vector_without_direction_is_refused():
    with pytest.raises(ValueError, match="directions: expected vectors of a length above 0"):
        angle_deg(np.zeros((1, 3)), np.ones((1, 3)))


def test_view_directions_are_those_of_yaw_and_pitch():
    labels = head_labels([0.0, 90.0, -135.0], pitch_deg=20.0)
    x, y, z = view_directions(labels).T
    angles = np.stack([np.rad2deg(np.arctan2(x, z)), np.rad2deg(np.arcsin(y))], 1)
    np.testing.assert_allclose(angles, view_angles_deg(labels)[:, :2], atol=1e-4)  # float32 degrees
    np.testing.assert_allclose(angles[:, 0], [0, 90, -135], atol=1e-4)


def test_yaw_of_known_directions():
    directions = np.array([[0, 0, 2.0], [1, 0, 0], [0, 0.5, -1], [-1, 3, -1]])
    np.testing.assert_allclose(yaw_of(directions), [0, 90, 180, -135], rtol=1e-12)


def test_angle_deg_takes_one_vector_for_many():
    np.testing.assert_allclose(angle_deg(np.eye(3), np.array([[0, 0, 1.0]])), [90, 90, 0], rtol=1e-12)
