"""A head of a published network, and one of the bundled one, comes back from one picture of it."""

import pytest
import torch

from dnnlib.sources import DEMO_NAME, DEMO_PATH
from inference import Head, load_generator
from inference.inversion import InversionSettings, PivotalTuning, Projection, ProjectionSettings, TuningSettings
from tests.helpers.inversion import photo_of, view_label, view_psnrs
from training.perceptual import load_perceptual_distance
from training.triplane import TriPlaneGenerator

YAWS_DEG = (20.0, 80.0, -40.0, -160.0)  # the photo; 60 degrees to either side of it; from behind


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, projected, tuned",
    [
        # the published schedule, shortened: PSNR rises from 8.6 to 16 and 18 dB
        ({}, 5, 1),
        # weights are random, whose landscape is rougher than that of a trained network: from 8.6 to 18 and 23 dB
        ({"space": "w", "learning_rate": 0.02, "w_noise": 0.01}, 7, 2),
    ],
    ids=["published", "gentle"],
)
def test_round_trip_on_a_published_network_brings_the_head_back(shared_dir, fields, projected, tuned):
    psnrs = round_trip(load_generator(shared_dir / "golden" / "spherehead_128.pkl"), fields, (100, 30))
    for start, w, last in zip(*psnrs):
        assert w > start + projected and last > w + tuned, psnrs


@pytest.mark.slow
@pytest.mark.skipif(not DEMO_PATH.is_file(), reason="the bundled network is not there")
def test_round_trip_on_the_bundled_network_brings_the_head_back():
    start, w, last = round_trip(load_generator(DEMO_NAME), {}, (300, 150))
    assert last[0] > max(w[0], start[0] + 6), (start, w, last)  # the photo
    for before, after in zip(start[1:], last[1:]):  # sides that it does not show
        assert after > before + 4, (start, w, last)


def round_trip(generator: TriPlaneGenerator, fields: dict, num_steps: tuple[int, int]) -> list[list[float]]:
    """Invert a picture of a known head; return PSNRs by view at the start, after the search and after tuning, in dB."""
    z = torch.randn(1, generator.z_dim, generator=torch.Generator().manual_seed(5))
    ws = generator.mapping(z, view_label(0), truncation_psi=0.7)
    photo = photo_of(generator, ws, view_label(YAWS_DEG[0]))
    targets = {yaw_deg: Head(generator, ws).render(view_label(yaw_deg))["image"] for yaw_deg in YAWS_DEG}
    settings = InversionSettings(
        projection=ProjectionSettings(num_steps=num_steps[0], **fields), tuning=TuningSettings(num_steps=num_steps[1])
    )
    distance = load_perceptual_distance(None)
    stage = Projection(generator, photo, distance, settings)
    psnrs = [view_psnrs(generator, stage.ws, targets)]
    while not stage.finished:
        stage.step()
    psnrs.append(view_psnrs(generator, stage.ws, targets))
    stage = PivotalTuning(generator, photo, distance, settings, stage.ws, stage.label)
    while not stage.finished:
        stage.step()
    psnrs.append(view_psnrs(stage.generator, stage.ws, targets))
    print([[round(value, 1) for value in row] for row in psnrs])
    return psnrs
