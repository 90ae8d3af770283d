"""Both stages of an inversion: the published loops, resume, and heads that come back."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from camera_utils import yaw_pitch_roll_deg
from inference import Head
from inference.inversion import (
    CameraSettings,
    InversionDiverged,
    InversionSettings,
    PivotalTuning,
    Projection,
    ProjectionSettings,
    TuningSettings,
    learning_rate_ramp,
    w_noise_scale,
)
from inference.inversion_noise import initial_noise
from inference.inversion_stepper import Stepper
from tests.helpers.inversion import AreaDistance, head_network, known_ws, photo_of, psnr, view_label, view_psnrs
from tests.helpers.tiny import latents, tiny_network
from torch_utils.rng import derive_seed
from training.config import SuperresolutionConfig

# In float64 two ways to compute the same differ by rounding alone, which a few steps of Adam amplify.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
SMALL = {
    "img_resolution": 64,
    "superresolution": SuperresolutionConfig(variant="Superresolution2XSmall"),
    "neural_rendering_resolution": 8,
}
FEW_SAMPLES = 100


@pytest.fixture(scope="module")
def network():
    """Return a small generator with all parts, in float32."""
    return tiny_network(parsing_classes=4, **SMALL).requires_grad_(False)


@pytest.fixture(scope="module")
def exact():
    """Return a small generator in float64."""
    return tiny_network(**SMALL).double().requires_grad_(False)


@pytest.fixture(scope="module")
def head():
    """Return a generator of opaque heads."""
    return head_network()


def settings(steps: int = 8, tuning_steps: int = 6, camera: CameraSettings | None = None, **fields):
    """Return few steps; `fields` are of any of the settings."""
    names = {cls: {field.name for field in dataclasses.fields(cls)} for cls in (ProjectionSettings, TuningSettings)}
    projection = {"num_steps": steps, "num_w_samples": FEW_SAMPLES}
    tuning = {"num_steps": tuning_steps}
    for name in list(fields):
        for cls, chosen in ((ProjectionSettings, projection), (TuningSettings, tuning)):
            if name in names[cls] and (name not in names[ProjectionSettings] or cls is ProjectionSettings):
                chosen[name] = fields.pop(name)
    return InversionSettings(
        projection=ProjectionSettings(**projection),
        tuning=TuningSettings(**tuning),
        camera=camera or CameraSettings(),
        **fields,
    )


def a_photo(generator, **fields):
    """Photograph a random head from the side."""
    label = view_label(20, 5).to(generator.backbone.mapping.fc0.weight.dtype)
    return photo_of(generator, known_ws(generator), label, **fields)


def project(generator, photo, chosen, **arguments) -> Projection:
    """Run a whole projection."""
    return run(Projection(generator, photo, AreaDistance(), chosen, **arguments))


def run(stepper: Stepper, until: int | None = None) -> Stepper:
    """Run all steps, or until so many are done."""
    while not stepper.finished and stepper.step_index != until:
        stepper.step()
    return stepper


def clone_state(stepper: Stepper) -> dict[str, torch.Tensor]:
    """Copy a state, as a file does."""
    return {name: value.clone() for name, value in stepper.state_dict().items()}


# ---- the published loops ----


@pytest.mark.parametrize(
    "step, ramp, noise",
    [
        (0, 0.0, 0.05),
        (1, 0.02 / 0.5, 0.05 * (1 - 1 / 375) ** 2),  # 1/500 over 0.05
        (25, 1.0, 0.05 * (14 / 15) ** 2),
        (375, 1.0, 0.0),
        (450, 0.5 - 0.5 * math.cos(math.pi * 0.4), 0.0),
        (499, 0.5 - 0.5 * math.cos(math.pi * 0.008), 0.0),
    ],
)
def test_schedules_of_500_steps_are_the_published(step, ramp, noise):
    chosen = ProjectionSettings()
    assert learning_rate_ramp(chosen, step) == pytest.approx(ramp, abs=1e-12)
    assert w_noise_scale(chosen, step) == pytest.approx(noise, abs=1e-12)


def published_projection(generator, photo, num_steps: int, seed: int) -> torch.Tensor:
    """Run the published loop, written straightforwardly: w [1, L, 512]."""
    generator = copy.deepcopy(generator).eval()
    generator.rendering_kwargs["ray_start"] = 2.35
    z = torch.from_numpy(np.random.RandomState(123).randn(FEW_SAMPLES, generator.z_dim))
    frontal = view_label(0).double()
    frontal[0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]] = published_frontal_pose().double().flatten()[:12]
    samples = generator.mapping(z, frontal.expand(FEW_SAMPLES, -1))[:, :1]
    w_avg = samples.mean(dim=0, keepdim=True)
    w_std = float(((samples - w_avg).square().sum() / FEW_SAMPLES).sqrt())
    w_opt = w_avg.repeat(1, generator.backbone.num_ws, 1).requires_grad_(True)
    optimizer = torch.optim.Adam([w_opt], betas=(0.9, 0.999))
    for step in range(num_steps):
        t = step / num_steps
        ramp = min(1, (1 - t) / 0.25)
        ramp = 0.5 - 0.5 * math.cos(math.pi * ramp)
        optimizer.param_groups[0]["lr"] = 0.1 * ramp * min(1, t / 0.05)
        random = torch.Generator().manual_seed(derive_seed(seed, 1, step, 2))
        noise = torch.randn(w_opt.shape, generator=random).double() * w_std * 0.05 * max(0, 1 - t / 0.75) ** 2
        jitter = torch.Generator().manual_seed(derive_seed(seed, 1, step, 0))
        image = generator.synthesis(w_opt + noise, photo.label, noise_mode="const", generator=jitter)["image"]
        perceptual = sum((F.avg_pool2d(image, k) - F.avg_pool2d(photo.image, k)).abs().mean() for k in (2, 4, 8))
        loss = 0.1 * (image - photo.image).square().mean() + perceptual + (w_opt - w_avg).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return w_opt.detach()


def published_frontal_pose() -> torch.Tensor:
    """Return the camera [4, 4] of the w statistics, from the published formula with 3.14 for pi."""
    horizontal, vertical = 3.14 / 2, 3.14 / 2
    polar = math.acos(1 - 2 * vertical / math.pi)
    x, z = math.sin(polar) * math.cos(math.pi - horizontal), math.sin(polar) * math.sin(math.pi - horizontal)
    origin = 2.7 * torch.tensor([x, math.cos(polar), z], dtype=torch.float64)
    forward = -origin / origin.norm()
    right = -torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), forward)
    right = right / right.norm()
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = torch.stack([right, torch.linalg.cross(forward, right), forward, origin], dim=1)
    return pose.float()


def test_projection_computes_the_published_loop(exact):
    photo = a_photo(exact)
    ours = project(exact, photo, settings(4, seed=11)).ws
    # The pose of the mean w is float32 here and there, but not rounded in the same order.
    torch.testing.assert_close(ours, published_projection(exact, photo, 4, 11), rtol=1e-5, atol=1e-5)


def test_tuning_computes_the_published_loop(exact):
    photo, ws = a_photo(exact), known_ws(exact, seed=6)
    ours = run(PivotalTuning(exact, photo, AreaDistance(), settings(tuning_steps=3, seed=12), ws, photo.label))
    plain = copy.deepcopy(exact).train().requires_grad_(True)
    plain.rendering_kwargs["ray_start"] = 2.35
    optimizer = torch.optim.Adam(plain.parameters(), betas=(0.9, 0.999), lr=3e-4)
    for step in range(3):
        jitter = torch.Generator().manual_seed(derive_seed(12, 2, step, 0))
        image = plain.synthesis(ws, photo.label, noise_mode="const", generator=jitter)["image"]
        perceptual = sum((F.avg_pool2d(image, k) - F.avg_pool2d(photo.image, k)).abs().mean() for k in (2, 4, 8))
        optimizer.zero_grad()
        (0.1 * (image - photo.image).square().mean() + perceptual).backward()
        optimizer.step()
    expected = plain.state_dict()
    moved = 0
    for name, value in ours.generator.state_dict().items():
        torch.testing.assert_close(value, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        moved += not torch.equal(value, exact.state_dict()[name])
    assert moved > 50
    assert ours.generator.rendering_kwargs["ray_start"] == 2.35


def test_searched_layer_noise_stays_normal_and_reaches_the_tuned_network(network):
    chosen = settings(3, 2, optimize_noise=True)
    projection = Projection(network, a_photo(network), AreaDistance(), chosen)
    first = {name: value.clone() for name, value in projection.noise_buffers.items()}
    run(projection)
    assert len(first) == len([name for name, _ in network.backbone.synthesis.named_buffers() if "noise" in name]) > 3
    for name, value in projection.noise_buffers.items():
        assert not torch.equal(value, first[name]) and not torch.equal(value, network.state_dict()[name])
        assert float(value.mean()) == pytest.approx(0, abs=1e-6)
        assert float(value.square().mean()) == pytest.approx(1, abs=1e-5)
    arguments = (network, a_photo(network), AreaDistance(), chosen, projection.ws, projection.label)
    tuning = run(PivotalTuning(*arguments, projection.noise_buffers))
    for name, value in projection.noise_buffers.items():
        assert torch.equal(tuning.generator.state_dict()[name], value)


# ---- starts, spaces, cameras ----


def test_projection_in_w_keeps_one_w_for_all_layers(network):
    projection = project(network, a_photo(network), settings(3, space="w"))
    assert torch.equal(projection.ws, projection.ws[:, :1].expand_as(projection.ws))


def test_projection_starts_at_the_given_latent_or_at_the_mean(network):
    photo, ws = a_photo(network), known_ws(network)
    assert torch.equal(Projection(network, photo, AreaDistance(), settings(), ws).ws, ws)
    assert torch.equal(Projection(network, photo, AreaDistance(), settings(), ws[:, :1]).ws, ws)
    start = Projection(network, photo, AreaDistance(), settings())
    assert torch.equal(start.ws, start._statistics.mean.expand_as(ws))


def test_published_pose_offset_shifts_the_camera_once(network):
    photo = a_photo(network)
    projection = Projection(network, photo, AreaDistance(), settings(pose_offset="published"))
    z = np.random.RandomState(123).randn(FEW_SAMPLES, network.z_dim).mean(axis=0, keepdims=True)
    offset = network.t_mapping(torch.from_numpy(z).float(), photo.label)[0, 0]
    shift = projection.label - photo.label
    torch.testing.assert_close(shift[0, 3:12:4], offset, rtol=1e-4, atol=1e-6)  # a difference of float32 numbers
    assert float(offset.abs().max()) > 1e-3
    tuning = PivotalTuning(
        network, photo, AreaDistance(), settings(pose_offset="published"), projection.ws, photo.label
    )
    assert torch.equal(tuning.label, photo.label)


def test_camera_that_is_wrong_by_some_degrees_comes_back(head):
    ws = known_ws(head)
    photo = photo_of(head, ws, view_label(0), claimed_label=view_label(5, -3))
    camera = CameraSettings(refine=True, learning_rate=0.35, start=0)
    chosen = settings(12, camera=camera, space="w", learning_rate=1e-3, w_noise=0.0, w_norm_weight=0.0)
    projection = Projection(head, photo, AreaDistance(), chosen, ws)
    assert torch.equal(projection.label, photo.label)
    run(projection)
    yaw_deg, pitch_deg, roll_deg = yaw_pitch_roll_deg(projection.label)[0].tolist()
    assert abs(yaw_deg) < 1.7 and abs(pitch_deg) < 1.2 and abs(roll_deg) < 1.2, (yaw_deg, pitch_deg, roll_deg)
    fixed = Projection(head, photo, AreaDistance(), settings(1), ws)
    run(fixed)
    assert torch.equal(fixed.label, photo.label)


def test_camera_is_refined_in_tuning_too(head):
    ws = known_ws(head)
    photo = photo_of(head, ws, view_label(0))
    camera = CameraSettings(refine=True, tuning_learning_rate=0.2)
    chosen = settings(camera=camera)
    # Weights stay almost as they are, so that the camera must do it.
    slow = TuningSettings(num_steps=15, learning_rate=1e-12, parts=("superresolution",))
    wrong = view_label(4)
    tuning = run(PivotalTuning(head, photo, AreaDistance(), dataclasses.replace(chosen, tuning=slow), ws, wrong))
    assert abs(float(yaw_pitch_roll_deg(tuning.label)[0, 0])) < 2.5
    still = PivotalTuning(
        head,
        photo,
        AreaDistance(),
        settings(1, 2, camera=dataclasses.replace(camera, in_tuning=False)),
        ws,
        wrong,
    )
    assert torch.equal(run(still).label, wrong)


# ---- masks ----


def test_background_of_the_photo_without_weight_has_no_influence(network):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    photo = a_photo(network, mask=mask)
    other = dataclasses.replace(photo, image=torch.where(mask == 1, photo.image, -photo.image))
    same = [project(network, p, settings(3, background_weight=0.0)).ws for p in (photo, other)]
    different = [project(network, p, settings(3, background_weight=1.0)).ws for p in (photo, other)]
    # x = target + m (image - target): what is rounded away in the sum differs
    torch.testing.assert_close(*same, rtol=0, atol=2e-3)
    assert float((different[0] - different[1]).abs().max()) > 0.05
    unmasked = project(network, dataclasses.replace(photo, mask=None), settings(3, background_weight=0.0)).ws
    assert torch.equal(unmasked, different[0])


def test_silhouette_pulls_the_opacity_to_the_mask(network):
    photo = a_photo(network, mask=torch.zeros(1, 1, 64, 64))
    weights = (0.0, 1000.0)
    opacity = []
    for weight in weights:
        ws = project(network, photo, settings(5, silhouette_weight=weight, space="w", learning_rate=0.1)).ws
        opacity.append(float(Head(network, ws).render(photo.label)["image_mask"].mean()))
    assert opacity[1] < opacity[0] - 0.01
    with pytest.raises(ValueError, match="silhouette_weight: expected 0 for a photo without mask, got 1.0"):
        Projection(network, a_photo(network), AreaDistance(), settings(silhouette_weight=1.0))


# ---- resume ----


def make_stepper(network, stage: str) -> Stepper:
    """Make a stepper with everything that has a state."""
    photo, camera = a_photo(network), CameraSettings(refine=True, start=0.3)
    chosen = settings(5, 4, camera=camera, optimize_noise=True, locality_weight=0.1, locality_interval=2)
    if stage == "projection":
        return Projection(network, photo, AreaDistance(), chosen)
    noise = initial_noise(network, 1)
    return PivotalTuning(network, photo, AreaDistance(), chosen, known_ws(network, seed=6), photo.label, noise)


@pytest.fixture(scope="module", params=["projection", "tuning"])
def whole_run(request, network):
    """Return a stage, its state after 0 and 3 steps, and the stepper after the last."""
    stepper, states = make_stepper(network, request.param), {}
    for step in (0, 3):
        states[step] = clone_state(run(stepper, until=step))
    return request.param, states, run(stepper)


@pytest.mark.parametrize("step", [0, 3])
def test_resumed_stage_is_the_uninterrupted_one_bit_for_bit(network, whole_run, step):
    stage, states, whole = whole_run
    torch.randn(3)  # whatever the process does with its own random numbers
    resumed = make_stepper(network, stage)
    run(resumed, until=1)  # what was there before must not show
    resumed.load_state_dict(states[step])
    assert resumed.step_index == step
    state, expected = run(resumed).state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(resumed.label, whole.label)
    assert torch.equal(resumed.render(), whole.render())


@pytest.fixture(scope="module")
def steppers(network):
    """Return both stages after a step; nobody's to change."""
    return {stage: run(make_stepper(network, stage), until=1) for stage in ("projection", "tuning")}


@pytest.mark.parametrize(
    "stage, change, message",
    [
        ("projection", lambda s: s.pop("w"), "expected an entry 'w', got 'none'"),
        ("projection", lambda s: s.update(extra=s["w"]), "expected no other entries than its own, got 'extra'"),
        ("projection", lambda s: s.update(w=s["w"][:, :1]), "'w': expected shape"),
        ("projection", lambda s: s.update(step=torch.tensor(9)), "'step': expected 0 to 5, got 9"),
        ("projection", lambda s: s.update(base_label=s["base_label"] + 1), "'base_label': expected that of this photo"),
        ("projection", lambda s: s.update(photo=s["photo"] + 1), "'photo': expected that of this photo"),
        ("projection", lambda s: s.pop("adam.w.exp_avg"), "expected an entry 'adam.w.exp_avg'"),
        ("tuning", lambda s: s.update(ws=s["ws"] + 1), "'ws': expected that of this photo"),
        ("tuning", lambda s: s.pop("decoder.net.0.weight"), "expected an entry 'decoder.net.0.weight'"),
    ],
)
def test_state_that_does_not_fit_raises_and_changes_nothing(steppers, stage, change, message):
    stepper = steppers[stage]
    state = clone_state(stepper)
    change(state)
    before = clone_state(stepper)
    with pytest.raises(ValueError, match=message):
        stepper.load_state_dict(state)
    after = stepper.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()) and before.keys() == after.keys()


# ---- what is shared, computed once, and left alone ----


def test_stages_leave_the_generator_and_global_random_numbers_alone(network):
    before = copy.deepcopy(network.state_dict())
    config, training, random = network.config, network.training, torch.get_rng_state()
    for stage in ("projection", "tuning"):
        run(make_stepper(network, stage), until=1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.config == config and network.training == training and network.toparsing is not None
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_tuned_network_shares_the_memory_of_frozen_parts(network):
    chosen = settings(parts=("decoder", "superresolution"))
    photo = a_photo(network)
    tuning = PivotalTuning(network, photo, AreaDistance(), chosen, known_ws(network), photo.label)
    base = network.state_dict()
    run(tuning, until=2)
    own = {name for name, value in tuning.generator.state_dict().items() if value.data_ptr() != base[name].data_ptr()}
    parameters = {name for name, _ in network.named_parameters()}
    assert own == {name for name in parameters if name.startswith(("decoder.", "superresolution.", "torgb."))}
    with_state = {name for name in tuning.state_dict() if name.startswith("adam.")}
    assert all(name.split(".", 1)[1].startswith(("decoder.", "superresolution.", "torgb.")) for name in with_state)


@pytest.mark.parametrize(
    "parts, backbone_calls, background_calls",
    [
        (("superresolution",), 1, 1),
        (("background", "decoder"), 1, 3),
        (("backbone",), 3, 1),
        (("backbone", "decoder", "background", "superresolution"), 3, 3),
    ],
)
def test_tuning_computes_what_is_frozen_once(network, monkeypatch, parts, backbone_calls, background_calls):
    from training.networks_stylegan2 import SynthesisNetwork, ToRGBLayer

    outputs = []
    forward, to_rgb = SynthesisNetwork.forward, ToRGBLayer.forward
    monkeypatch.setattr(SynthesisNetwork, "forward", lambda s, *a, **k: (outputs.append(s.b4), forward(s, *a, **k))[1])
    classes = []
    monkeypatch.setattr(
        ToRGBLayer, "forward", lambda s, *a, **k: (classes.append(s.weight.shape[0]), to_rgb(s, *a, **k))[1]
    )
    photo = a_photo(network)
    outputs.clear(), classes.clear()
    tuning = PivotalTuning(
        network, photo, AreaDistance(), settings(tuning_steps=3, parts=parts), known_ws(network), photo.label
    )
    run(tuning)
    backbone = sum(block is tuning.generator.backbone.synthesis.b4 for block in outputs)
    background = sum(block is tuning.generator.bcg_synthesis.b4 for block in outputs)
    assert (backbone, background) == (backbone_calls, background_calls) and len(outputs) == backbone + background
    assert 4 not in classes  # the semantic head
    assert tuning.generator.toparsing is not None


@pytest.mark.parametrize("stage", ["projection", "tuning"])
def test_target_features_are_computed_once(network, stage):
    photo, distance = a_photo(network), AreaDistance()
    if stage == "projection":
        run(Projection(network, photo, distance, settings(2)))
    else:
        run(PivotalTuning(network, photo, distance, settings(tuning_steps=2), known_ws(network), photo.label))
    assert distance.num_features == 1


def test_frozen_parts_give_the_same_images_as_computing_all(network):
    photo = a_photo(network)
    tuning = PivotalTuning(network, photo, AreaDistance(), settings(parts=("decoder",)), known_ws(network), photo.label)
    tuning.step()
    seed = derive_seed(tuning.settings.seed, 1)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        expected = tuning.generator.synthesis(tuning.ws, tuning.label, noise_mode="const", generator=random)["image"]
    # the same formula with styles multiplied into weights or into activations, in float32
    torch.testing.assert_close(tuning.render(), expected, rtol=1e-4, atol=1e-4)


def test_locality_is_zero_before_anything_changed_and_positive_after(network):
    photo = a_photo(network)
    chosen = settings(tuning_steps=3, locality_weight=0.1, locality_interval=2, locality_alpha=3.0)
    tuning = PivotalTuning(network, photo, AreaDistance(), chosen, known_ws(network, 6), photo.label)
    losses = [tuning.step() for _ in range(3)]
    assert losses[0]["locality"] < 1e-4 and "locality" not in losses[1] and losses[2]["locality"] > 1e-3


def test_locality_keeps_other_heads_closer(network):
    photo, ws = a_photo(network), known_ws(network, 6)
    other = known_ws(network, 7)
    target = Head(network, other).render(photo.label)["image"]
    changes = []
    for weight in (0.0, 5.0):
        chosen = settings(tuning_steps=3, locality_weight=weight, locality_alpha=8.0, ray_start=2.25)
        tuning = run(PivotalTuning(network, photo, AreaDistance(), chosen, ws, photo.label))
        changes.append(float((Head(tuning.generator, other).render(photo.label)["image"] - target).abs().mean()))
    assert changes[1] < 0.8 * changes[0]


# ---- failures ----


class BrokenDistance(AreaDistance):
    """Gives NaN, or NaN gradients, from a step on."""

    def __init__(self, good_steps: int, gradient: bool) -> None:
        super().__init__()
        self.good_steps, self.gradient = good_steps, gradient

    def distance(self, image, target):
        """Return `[B]`."""
        value = super().distance(image, target)
        self.good_steps -= 1
        if self.good_steps >= 0:
            return value
        return value + (image.mean() * 0).sqrt() * 0 if self.gradient else value * float("nan")


@pytest.mark.parametrize("gradient, what", [(False, "loss"), (True, "gradient")])
@pytest.mark.parametrize("stage", ["projection", "tuning"])
def test_loss_that_is_not_finite_stops_and_keeps_the_state(network, stage, gradient, what):
    photo, distance = a_photo(network), BrokenDistance(1, gradient)
    if stage == "projection":
        stepper = Projection(network, photo, distance, settings())
    else:
        stepper = PivotalTuning(network, photo, distance, settings(), known_ws(network), photo.label)
    run(stepper, until=1)
    before = clone_state(stepper)
    with pytest.raises(InversionDiverged, match=f"{stage}, step 1: expected a finite {what}, got"):
        stepper.step()
    after = stepper.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_step_after_the_last_raises(network):
    projection = project(network, a_photo(network), settings(1))
    with pytest.raises(ValueError, match="projection, step: expected one of 1, got 1"):
        projection.step()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"image": torch.zeros(1, 3, 32, 32)},
            r"photo 'known', image: expected shape \(1, 3, 64, 64\), got \(1, 3, 32",
        ),
        ({"image": torch.full((1, 3, 64, 64), math.nan)}, "photo 'known', image: expected finite numbers"),
        ({"mask": torch.zeros(1, 1, 32, 32)}, r"photo 'known', mask: expected shape \(1, 1, 64, 64\)"),
        ({"label": torch.zeros(1, 25)}, "label 0"),
        ({"label": torch.zeros(25)}, r"photo 'known', label: expected shape \(1, 25\)"),
    ],
)
def test_photo_that_does_not_fit_raises(network, change, message):
    photo = dataclasses.replace(a_photo(network), **change)
    with pytest.raises(ValueError, match=message):
        Projection(network, photo, AreaDistance(), settings())
    with pytest.raises(ValueError, match=message):
        PivotalTuning(network, photo, AreaDistance(), settings(), known_ws(network), view_label(0))


def test_latents_and_settings_that_do_not_fit_raise(network):
    photo, ws = a_photo(network), known_ws(network)
    mixed = torch.cat([ws[:, :1] + 1, ws[:, 1:]], dim=1)
    start = "latent to start from: expected"
    cases = [
        (settings(), ws[:, :2], f"{start} shape"),
        (settings(), ws * math.nan, f"{start} finite numbers"),
        (settings(space="w"), mixed, f"{start} the same w in all layers, in space 'w'"),
        (settings(ray_start=5.0), ws, "expected start before end"),
    ]
    for chosen, latent, message in cases:
        with pytest.raises(ValueError, match=message):
            Projection(network, photo, AreaDistance(), chosen, latent)
    with pytest.raises(ValueError, match="latent to tune around: expected shape"):
        PivotalTuning(network, photo, AreaDistance(), settings(), ws[0], photo.label)
    plain = tiny_network("tri_plane", **SMALL)
    with pytest.raises(ValueError, match="pose_offset: expected 'none' for a network without learned offset"):
        Projection(plain, a_photo(plain), AreaDistance(), settings(pose_offset="published"))
    with pytest.raises(ValueError, match="tuning.parts: expected a part that the network has, got 'background'"):
        PivotalTuning(plain, a_photo(plain), AreaDistance(), settings(parts=("background",)), ws, photo.label)


# ---- the honest test ----


def test_round_trip_brings_the_head_back_from_all_sides(head):
    ws, yaws = known_ws(head), (0.0, 60.0, -60.0, 180.0)
    targets = {yaw_deg: Head(head, ws).render(view_label(yaw_deg))["image"] for yaw_deg in yaws}
    # The landscape of random weights is rougher than that of a trained network: smaller steps, less noise.
    chosen = settings(24, 8, space="w", learning_rate=0.03, w_noise=0.01, ray_start=2.25)
    photo = photo_of(head, ws, view_label(0))
    projection = Projection(head, photo, AreaDistance(), chosen)
    start = view_psnrs(head, projection.ws, targets)
    run(projection)
    found = view_psnrs(head, projection.ws, targets)
    tuning = run(PivotalTuning(head, photo, AreaDistance(), chosen, projection.ws, projection.label))
    tuned = view_psnrs(tuning.generator, tuning.ws, targets)
    flat = [psnr(targets[0.0], targets[yaw_deg]) for yaw_deg in yaws]  # of a picture that looks the same from all sides
    assert found[0] > start[0] + 6
    assert all(after > before + 3 for before, after in zip(start, found)), (start, found)
    assert all(view > seen_everywhere + 5 for view, seen_everywhere in zip(found[1:], flat[1:])), (found, flat)
    assert tuned[0] > found[0] + 1, (found, tuned)
    assert all(view > seen_everywhere + 5 for view, seen_everywhere in zip(tuned[1:], flat[1:])), (tuned, flat)


@pytest.mark.parametrize("representation", ["tri_grid", "tri_plane"])
def test_other_representations_are_inverted(representation):
    generator = tiny_network(representation, **SMALL).requires_grad_(False)
    label = view_label(10)
    ws = generator.mapping(latents(1, 5), label)
    photo = photo_of(generator, ws, label)
    chosen = settings(7, 3, learning_rate=0.1)
    projection = Projection(generator, photo, AreaDistance(), chosen)
    found = [projection.step()["loss"] for _ in range(7)]
    tuning = PivotalTuning(generator, photo, AreaDistance(), chosen, projection.ws, projection.label)
    tuned = [tuning.step()["loss"] for _ in range(3)]
    assert found[-1] < 0.7 * found[0] and tuned[-1] < tuned[0]
