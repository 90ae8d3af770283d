"""Signed distances of synthetic heads."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from training.synthetic_head_geometry import BOX, CLOTH, HAIR, HAT, SKIN, HeadField, length, smooth_max, smooth_min
from training.synthetic_head_parameters import (
    GLASSES_STYLES,
    HAIR_STYLES,
    HAT_STYLES,
    TOP_STYLES,
    FaceShape,
    Hair,
    HeadParameters,
    Wear,
)
from training.synthetic_head_sampling import sample_identity
from training.synthetic_head_tracing import _RELAX


def kinds() -> list[HeadParameters]:
    """Return a head of every cut, hat, top, and kind of glasses."""
    heads = [HeadParameters(hair=Hair(style=style)) for style in HAIR_STYLES]
    heads += [HeadParameters(wear=Wear(hat=style)) for style in HAT_STYLES[1:]]
    heads += [HeadParameters(wear=Wear(glasses=style, earrings=True)) for style in GLASSES_STYLES[1:]]
    return heads + [HeadParameters(wear=Wear(top=style, necklace=True)) for style in TOP_STYLES[1:]]


def places(count: int, seed: int = 0) -> torch.Tensor:
    """Draw places [3, 1, count] evenly in the box."""
    low, high = torch.tensor(BOX).T[:, :, None]
    share = torch.rand(3, count, generator=torch.Generator().manual_seed(seed))
    return torch.lerp(low, high, share)[:, None]


def test_smooth_min_is_the_documented_polynomial():
    a, b = (torch.linspace(-0.1, 0.1, 41, dtype=torch.float64), torch.full((41,), 0.02, dtype=torch.float64))
    expected = torch.minimum(a, b) - (0.03 - (a - b).abs()).clamp_min(0.0) ** 2 / (4 * 0.03)
    torch.testing.assert_close(smooth_min(a, b, 0.03), expected)  # two forms of one formula in float64
    torch.testing.assert_close(smooth_min(b, a, 0.03), expected)
    torch.testing.assert_close(smooth_max(-a, -b, 0.03), -expected)
    assert smooth_min(a, b, 0.03)[0] == a[0], "nothing changes away from the seam"


def test_length_is_that_of_vectors():
    vectors = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.vector_norm(vectors.double(), dim=1, keepdim=True).float()
    torch.testing.assert_close(length(vectors), expected, rtol=2e-7, atol=0)  # two roundings in float32


@pytest.mark.parametrize("count", [3, 11, 12, 700])
def test_distance_does_not_depend_on_the_batch(count):
    heads = kinds()[:13:3] + kinds()[13:]
    points = places(count)
    together = HeadField(heads, "cpu").distance(*points.expand(3, len(heads), count))
    more = HeadField(heads[:2], "cpu").distance(*torch.cat([points, places(40, 1)], dim=2).expand(3, 2, -1))
    for i, head in enumerate(heads):
        assert HeadField([head], "cpu").distance(*points)[0].equal(together[i]), head
    assert more[:, :count].equal(together[:2]), "nor on the number of places"


def test_distance_a_step_of_the_march_stays_outside_but_for_rare_places():
    # Unions, bumps and ellipsoids are no exact distances: a step to anywhere within the distance that is walked at most
    # must not end inside. Flat brims of caps break that now and then: 1 in 10,000 overall.
    generator, inside, count = torch.Generator().manual_seed(0), 0, 0
    for i, head in enumerate([*kinds(), *(sample_identity(0, i) for i in range(12))]):
        field, points = HeadField([head], "cpu"), places(3000, i)
        distance = field.distance(*points)
        outside = distance > 0.002
        points, distance = points[:, outside][:, None], distance[outside]
        step = torch.randn(points.shape, generator=generator)
        step *= _RELAX * distance / torch.linalg.vector_norm(step, dim=0)
        inside += int((field.distance(*(points + step)) < 0.0).sum())
        count += len(distance)
    assert count > 50_000 and inside < 5e-4 * count


def test_distance_grows_at_most_as_fast_as_space_nearly_everywhere():
    h = 1e-4
    for i in range(6):
        field, points = HeadField([sample_identity(1, i)], "cpu"), places(3000, i)
        steps = h * torch.eye(3)[:, :, None, None]
        slopes = [(field.distance(*(points + s)) - field.distance(*(points - s))) / (2 * h) for s in steps]
        steepness = torch.stack(slopes).square().sum(dim=0).sqrt()
        assert 0.9 < steepness.median() < 1.05 and steepness.quantile(0.9) < 1.3


def test_distance_nothing_of_any_head_leaves_the_box():
    # The six sides, on a grid finer than the thinnest things. The bust of one head in thirty reaches 0.0015 below.
    axes = [torch.linspace(low, high, 90) for low, high in BOX]
    sides = []
    for axis in range(3):
        for place in BOX[axis]:
            lines = [torch.tensor([place]) if i == axis else line for i, line in enumerate(axes)]
            sides.append(torch.stack([t.flatten() for t in torch.meshgrid(*lines, indexing="ij")]))
    points = torch.cat(sides, dim=1)[:, None]
    assert torch.tensor(BOX).abs().max() <= 0.5 and torch.tensor(BOX)[[0, 2]].abs().max() <= 0.4
    for head in [*kinds(), *(sample_identity(0, i) for i in range(30))]:
        assert (HeadField([head], "cpu").distance(*points) > -0.002).all(), head


def test_materials_are_those_of_the_parameters():
    def materials(head: HeadParameters) -> set[int]:
        return set(HeadField([head], "cpu").materials(*places(1))[0])

    assert materials(HeadParameters(hair=Hair(style="bald"))) == {SKIN, CLOTH}
    assert materials(HeadParameters(wear=Wear(hat="beanie"))) == {SKIN, CLOTH, HAIR, HAT}


def test_materials_a_bald_head_among_others_has_no_hair():
    bald, hairy = HeadParameters(hair=Hair(style="bald", thickness=0.02)), HeadParameters()
    hair = HeadField([bald, hairy], "cpu").materials(*places(500).expand(3, 2, -1))[0][HAIR]
    assert (hair[0] > 1.0).all() and (hair[1] < 0.0).any()


@pytest.mark.parametrize("name", ["head_width", "ear_size", "nose_depth", "jaw_width", "neck_radius"])
def test_distance_follows_the_shape_of_the_face(name):
    plain = HeadParameters(hair=Hair(style="bald"))
    value = getattr(plain.face, name)
    larger = dataclasses.replace(plain, face=FaceShape(**{name: 1.1 * value}))
    points = places(4000)
    before, after = (HeadField([head], "cpu").distance(*points) for head in (plain, larger))
    assert (before - after).max() > 1e-3  # somewhere there is more of it


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hair(style="perm"), r"hair.style: expected one of bald, .*got 'perm'"),
        (lambda: Wear(hat="fez"), r"wear.hat: expected one of none, .*got 'fez'"),
        (lambda: Wear(glasses="x"), r"wear.glasses: .*got 'x'"),
        (lambda: Wear(top="x"), r"wear.top: .*got 'x'"),
    ],
)
def test_parameters_unknown_style_raises_value_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
