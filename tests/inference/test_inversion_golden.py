"""A head of a published network comes back from one picture of it."""

import pytest
import torch

from inference import Head, load_generator
from inference.inversion import InversionSettings, PivotalTuning, Projection, ProjectionSettings, TuningSettings
from inference.perceptual import load_perceptual_distance
from tests.helpers.inversion import photo_of, view_label, view_psnrs

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
    generator = load_generator(shared_dir / "golden" / "spherehead_128.pkl")
    z = torch.randn(1, generator.z_dim, generator=torch.Generator().manual_seed(5))
    ws = generator.mapping(z, view_label(0), truncation_psi=0.7)
    photo = photo_of(generator, ws, view_label(YAWS_DEG[0]))
    targets = {yaw_deg: Head(generator, ws).render(view_label(yaw_deg))["image"] for yaw_deg in YAWS_DEG}
    settings = InversionSettings(
        projection=ProjectionSettings(num_steps=100, **fields), tuning=TuningSettings(num_steps=30)
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
    for start, w, last in zip(*psnrs):
        assert w > start + projected and last > w + tuned, psnrs
