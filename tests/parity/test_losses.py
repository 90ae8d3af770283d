"""Every training phase gives the published loss values, gradient norms and running mean of w."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import camera_utils
from tests.helpers.published import fill_weights, tiny_generator
from tests.helpers.vectors import read_json_gz
from training.config import DiscriminatorConfig
from training.dual_discriminator import Discriminator
from training.phases import Chunk, Phase, PhaseResult, PhaseRunner, update_w_avg
from training.schedules import ScheduleValues, schedule_values
from training.train_config import DataConfig, LoopConfig, LossConfig, TrainConfig
from training.triplane import TriPlaneGenerator

pytestmark = pytest.mark.usefixtures("kernels")

VECTORS: dict[str, dict[str, Any]] = read_json_gz("losses")
SEED = 11
BATCH = 4
TOLERANCE = 1e-3  # relative: float32 sums of both networks, forward and backward, in another order of operations


def unique_cases() -> list[Any]:
    """Return (configuration, key) of the reference values, without those that repeat another configuration's."""
    cases, seen = [], []
    for name, entries in VECTORS.items():
        for key, entry in entries.items():
            identity = (name.startswith("pano"), key, entry)
            if identity not in seen:
                seen.append(identity)
                # EG3D's backbone has 256 pixels in every configuration: half of its cases will do by default.
                marks = [pytest.mark.slow] if name.startswith("eg3d") and key.startswith("0/") else []
                cases.append(pytest.param(name, key, marks=marks, id=f"{name}-{key.replace('/', '-')}"))
    return cases


def train_config(name: str) -> TrainConfig:
    """Return the configuration of a reference: `<system>[_<density_reg>_<reg_type>]`."""
    system, *density = name.split("_")
    is_pano = system == "pano"
    generator = tiny_generator(system, parsing=False).config
    return TrainConfig(
        preset="test",
        data=DataConfig(images=("unused",), resolution=128),
        generator=generator,
        discriminator=DiscriminatorConfig(
            variant="MaskDualDiscriminatorV2" if is_pano else "DualDiscriminator",
            img_resolution=128,
            channel_base=1024,
            channel_max=32,
        ),
        loss=LossConfig(
            r1_gamma=1,
            r1_gamma_mask=1,
            density_reg=float(density[0].replace("p", ".")) if density else 0,
            density_reg_type=density[1] if density else "l1",
            pose_offset_reg=10 if is_pano else 0,
            conditioning_swap_prob=0.7,
            background_swap_prob=0.2,
            density_noise_fade_kimg=200 if is_pano else 0,
            neural_rendering_resolution_initial=16,
            neural_rendering_resolution_final=32,
        ),
        loop=LoopConfig(batch_size=BATCH, batch_gpu=BATCH),
    )


def chunk() -> Chunk:
    """Return the inputs of the reference."""
    yaw = np.pi / 2 + np.random.RandomState(7).uniform(-3, 3, 8)
    sample = camera_utils.LookAtPoseSampler.sample
    poses = torch.cat([sample(angle, np.pi / 2, torch.zeros(3), radius=2.7) for angle in yaw])
    labels = camera_utils.camera_label(poses, camera_utils.intrinsics_from_focal(4.2647))
    float32 = lambda array: torch.from_numpy(array.astype(np.float32))  # noqa: E731
    real = {
        "image": float32(np.random.RandomState(1).randn(BATCH, 3, 128, 128)).clamp(-1, 1),
        "image_mask": float32(np.random.RandomState(3).uniform(size=(BATCH, 1, 128, 128))),
    }
    z = float32(np.random.RandomState(9).randn(BATCH, 64))
    return Chunk(real=real, real_label=labels[:BATCH], z=z, label=labels[BATCH:])


class Setup(NamedTuple):
    """Networks of one configuration with filled weights."""

    G: TriPlaneGenerator
    D: Discriminator
    config: TrainConfig
    w_avg: torch.Tensor


@functools.cache
def build(name: str) -> Setup:
    """Build the networks of a configuration; `run` restores what a phase changes."""
    config = train_config(name)
    G, D = TriPlaneGenerator.from_config(config.generator).train(), Discriminator(config.discriminator).train()
    fill_weights(G)
    fill_weights(D)
    return Setup(G, D, config, G.backbone.mapping.w_avg.clone())


def run(setup: Setup, key: str, gain: int) -> tuple[PhaseResult, ScheduleValues, float]:
    """Run a phase of the reference; return its result, the schedules and the gradient norm."""
    cur_nimg, name = key.split("/")
    values = schedule_values(setup.config.loss, int(cur_nimg))
    setup.G.zero_grad()
    setup.D.zero_grad()
    setup.G.backbone.mapping.w_avg.copy_(setup.w_avg)
    inputs = chunk()  # making it draws from the generator that is seeded next
    torch.manual_seed(SEED)
    phase = Phase(name, name[0], gain)
    result = PhaseRunner(setup.G, setup.D, setup.config).run(phase, inputs, values)
    gradients = [p.grad for p in (setup.G if name[0] == "G" else setup.D).parameters() if p.grad is not None]
    norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt().item() if gradients else 0.0
    return result, values, norm


@pytest.mark.parametrize(("name", "key"), unique_cases())
def test_phase_equals_published(name, key, kernels, request):
    if name.startswith("eg3d") and kernels != "plain PyTorch" and not request.config.getoption("--runslow"):
        pytest.skip("slow; runs with --runslow")
    expected = VECTORS[name][key]
    setup = build(name)
    result, values, norm = run(setup, key, expected["gain"])
    got = {report: result.stats[report].double().mean().item() for report in expected["reports"]}
    assert got == pytest.approx({k: v[0] for k, v in expected["reports"].items()}, rel=TOLERANCE)
    assert norm == pytest.approx(expected["grad_l2"], rel=TOLERANCE, abs=1e-9)
    if result.w_mean is not None:
        update_w_avg(setup.G, result.w_mean)
    assert setup.G.backbone.mapping.w_avg[:3].tolist() == pytest.approx(expected["w_avg_first3"], rel=TOLERANCE)
    assert values.neural_rendering_resolution == expected["neural_rendering_resolution"]
    assert values.density_noise == (expected["density_noise"] or 0)
