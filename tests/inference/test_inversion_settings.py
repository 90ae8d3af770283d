"""Settings of an inversion are strict, and their defaults are the published numbers."""

import pytest

from dnnlib.serialize import dumps, from_json, loads, to_json
from inference.inversion_settings import CameraSettings, InversionSettings, ProjectionSettings, TuningSettings


def test_defaults_are_the_published_numbers():
    published = {
        "projection": {
            "num_steps": 500,
            "space": "w+",
            "learning_rate": 0.1,
            "rampup": 0.05,
            "rampdown": 0.25,
            "w_noise": 0.05,
            "w_noise_length": 0.75,
            "mse_weight": 0.1,
            "perceptual_weight": 1.0,
            "w_norm_weight": 1.0,
            "optimize_noise": False,
            "noise_weight": 1e5,
            "num_w_samples": 10000,
            "w_sample_seed": 123,
        },
        "tuning": {
            "num_steps": 350,
            "learning_rate": 3e-4,
            "mse_weight": 0.1,
            "perceptual_weight": 1.0,
            "parts": ["backbone", "decoder", "background", "superresolution"],
            "locality_weight": 0.0,
        },
    }
    data = to_json(InversionSettings())
    assert data["seed"] == 303 and data["camera"]["refine"] is False and data["pose_offset"] == "none"
    for stage, expected in published.items():
        assert {name: data[stage][name] for name in expected} == expected


def test_settings_survive_json():
    settings = InversionSettings(
        projection=ProjectionSettings(space="w", num_steps=3),
        tuning=TuningSettings(parts=("decoder",), locality_weight=0.1),
        camera=CameraSettings(refine=True, log_focal=0.0),
        ray_start=2.3,
    )
    assert loads(InversionSettings, dumps(settings)) == settings
    data = to_json(settings)
    del data["tuning"]["parts"]
    with pytest.raises(ValueError, match="config.tuning.parts: missing key"):
        from_json(InversionSettings, data)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ProjectionSettings(num_steps=0), "projection.num_steps: expected above 0, got 0"),
        (lambda: ProjectionSettings(space="z"), "projection.space: expected 'w\\+' or 'w', got 'z'"),
        (lambda: ProjectionSettings(w_noise=-1.0), "projection.w_noise: expected at least 0"),
        (lambda: ProjectionSettings(rampdown=0.0), "projection.rampdown: expected above 0"),
        (lambda: TuningSettings(parts=()), "tuning.parts: expected some of backbone, decoder"),
        (lambda: TuningSettings(parts=("decoder", "decoder")), "tuning.parts: expected .* each once"),
        (
            lambda: TuningSettings(parts=("mapping",)),
            "tuning.parts: expected some of backbone, .* got \\('mapping',\\)",
        ),
        (lambda: TuningSettings(locality_interval=0), "tuning.locality_interval: expected above 0"),
        (lambda: CameraSettings(start=1.0), "camera.start: expected 0 to below 1"),
        (
            lambda: CameraSettings(refine=True, rotation_deg=0, translation=0, log_focal=0),
            "camera: expected a unit above 0",
        ),
        (lambda: InversionSettings(seed=-1), "seed: expected at least 0"),
        (lambda: InversionSettings(background_weight=1.5), "background_weight: expected 0 to 1"),
        (lambda: InversionSettings(silhouette_weight=-1.0), "silhouette_weight: expected at least 0"),
        (lambda: InversionSettings(pose_offset="both"), "pose_offset: expected 'none' or 'published'"),
        (lambda: InversionSettings(ray_start=0.0), "ray_start: expected above 0"),
        (lambda: InversionSettings(ray_start=float("nan")), "ray_start: expected above 0"),
    ],
)
def test_values_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
