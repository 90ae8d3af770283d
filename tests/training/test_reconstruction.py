"""Terms of reconstruction, the encoder, and one step of both."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.helpers.phases import SIDE, NoHostReads, SplitDraws, batch, gradients, networks, rows, train_config
from tests.helpers.tiny import tiny_network
from training.batch_plan import BatchPlan
from training.perceptual import PyramidDistance
from training.reconstruction import (
    Encoder,
    Reconstruction,
    Views,
    gradient_scale,
    latent_divergence,
    reconstruction_terms,
    sample_latent,
    squared_error,
)
from training.schedules import ScheduleValues
from training.train_config import PrecisionConfig, WarmupConfig

VALUES = ScheduleValues(blur_sigma=1.0, swap_prob=None, neural_rendering_resolution=8, density_noise=1.0)
ADAM_EPS = 1e-8


def views(chunk, *names: str) -> Views:
    return Views({name: chunk.real[name] for name in ("image", *names)}, chunk.real_label)


def make(config, seed: int = 0, has_mask: bool = True) -> Reconstruction:
    G, _ = networks(config)
    torch.manual_seed(seed)
    return Reconstruction(G, config, has_mask)


# Terms.


def test_latent_divergence_is_that_of_normal_distributions():
    mean, log_variance = torch.randn(3, 5), torch.randn(3, 5)
    ours = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(latent_divergence(mean, log_variance), expected, rtol=1e-5, atol=1e-6)  # float32
    assert latent_divergence(torch.zeros(1, 4), torch.zeros(1, 4)) == 0


def test_sample_latent_has_mean_and_spread():
    torch.manual_seed(0)
    z = sample_latent(torch.full((4000, 2), 3.0), torch.full((4000, 2), math.log(0.25)))
    # Four standard errors of 8000 samples.
    torch.testing.assert_close(z.mean(), torch.tensor(3.0), rtol=0, atol=0.023)
    torch.testing.assert_close(z.std(), torch.tensor(0.5), rtol=0, atol=0.016)


def test_squared_error_averages_the_target_down():
    image, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    small = target.unflatten(3, (4, 2)).mean(4).unflatten(2, (4, 2)).mean(3)
    expected = (image - small).square().flatten(1).mean(1)
    torch.testing.assert_close(squared_error(image, target), expected, rtol=1e-5, atol=1e-6)  # order of sums
    assert squared_error(small, target).max() < 1e-12


def test_reconstruction_terms_have_weights_and_follow_what_is_there():
    target = {"image": torch.rand(2, 3, 32, 32), "image_mask": torch.rand(2, 1, 32, 32)}
    other = {"image": torch.rand(2, 3, 32, 32), "image_raw": torch.rand(2, 3, 16, 16)}
    other |= {"image_mask": torch.rand(2, 1, 16, 16), "image_parsing": torch.rand(2, 3, 16, 16)}
    weights = WarmupConfig(raw_weight=2.0, mask_weight=3.0, perceptual_weight=4.0)
    terms, plain = reconstruction_terms(other, target, weights), reconstruction_terms(other, target, WarmupConfig())
    assert list(terms) == ["image", "raw", "mask", "perceptual"]
    distance = PyramidDistance()
    expected = distance.distance(other["image"], distance.features(target["image"]))
    assert torch.equal(plain["perceptual"], expected)
    for name, factor in (("image", 1), ("raw", 2), ("mask", 3), ("perceptual", 4)):
        torch.testing.assert_close(terms[name], factor * plain[name], rtol=1e-6, atol=0)
    off = WarmupConfig(raw_weight=0.0, mask_weight=0.0, perceptual_weight=0.0)
    assert list(reconstruction_terms(other, target, off)) == ["image"]


def test_gradient_scale_is_a_power_of_two():
    assert [gradient_scale(side) for side in (64, 128, 256, 512)] == [2.0**6, 2.0**8, 2.0**10, 2.0**12]


# Encoder.


@pytest.mark.parametrize("side", [32, 64, 128])
def test_encoder_takes_images_of_any_size(side):
    encoder = Encoder(16, has_mask=True)
    images = {"image": torch.rand(2, 3, side, side), "image_mask": torch.rand(2, 1, side, side)}
    mean, log_variance = encoder(Views(images, torch.rand(2, 25)))
    assert mean.shape == log_variance.shape == (2, 16)


def test_encoder_depends_on_image_mask_and_camera_and_bounds_the_variance():
    encoder = Encoder(16, has_mask=True)
    images = {"image": torch.rand(1, 3, 64, 64), "image_mask": torch.rand(1, 1, 64, 64)}
    label = torch.rand(1, 25)
    before = encoder(Views(images, label))[0]
    for changed in (
        Views({**images, "image": images["image"] + 1}, label),
        Views({**images, "image_mask": images["image_mask"] + 1}, label),
        Views(images, label + 1),
    ):
        assert not torch.equal(encoder(changed)[0], before)
    log_variance = encoder(Views(images, label * 1e6))[1]
    assert log_variance.min() >= -8 and log_variance.max() <= 4
    without = Encoder(16, has_mask=False)
    assert without(Views({"image": images["image"]}, label))[0].shape == (1, 16)


# A step.


def test_reconstruction_gives_gradients_to_generator_and_encoder():
    config = train_config()
    step, chunk = make(config), batch()
    result = step.run(views(chunk, "image_mask"), views(chunk, "image_mask"), VALUES)
    got = {name: p.grad for name, p in step.named_parameters().items() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in got.values())
    names = {name for name, _ in step.encoder.named_parameters()}
    assert {f"encoder.{name}" for name in names} <= got.keys() and "backbone.mapping.fc0.weight" in got
    assert not any(value.requires_grad for value in (*result.stats.values(), result.loss, result.w_mean))
    assert step.G.config.rendering.density_noise == config.generator.rendering.density_noise


def test_reconstruction_loss_is_the_sum_of_the_reported_terms():
    config = dataclasses.replace(train_config(), warmup=WarmupConfig(kimg=1, kl_weight=0.5))
    chunk = batch()
    stats = make(config).run(views(chunk, "image_mask"), views(chunk, "image_mask"), VALUES).stats
    terms = {name.removeprefix("Loss/warmup/"): value for name, value in stats.items()}
    total = terms.pop("loss")
    expected = 0.5 * terms.pop("kl") + sum(terms.values())
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert total.shape == (4,)


def test_reconstruction_gradients_carry_weight_and_scale_which_adam_takes_back():
    config, chunk = train_config(), batch()
    ways = {}
    for scale, weight in ((gradient_scale(SIDE), 1.0), (1.0, 0.25)):
        step = make(config)
        step._scale = scale
        torch.manual_seed(1)
        step.run(views(chunk, "image_mask"), views(chunk, "image_mask"), VALUES, weight=weight)
        ways[scale] = gradients(step.encoder)
    factor = 4 * gradient_scale(SIDE)
    for name, gradient in ways[1.0].items():
        # Powers of two: the same bits.
        torch.testing.assert_close(ways[gradient_scale(SIDE)][name], gradient * factor, rtol=0, atol=0)
    assert make(config).optimizer.param_groups[0]["eps"] == ADAM_EPS * gradient_scale(SIDE)


def test_reconstruction_renders_the_latent_of_the_source_from_the_camera_of_the_target(monkeypatch):
    source, target = batch(seed=1), batch(seed=2)
    step, seen = make(train_config()), []
    synthesis = step.G.synthesis
    monkeypatch.setattr(
        step.G, "synthesis", lambda ws, c, *rest: seen.append((ws.detach(), c)) or synthesis(ws, c, *rest)
    )
    monkeypatch.setattr(step.G, "apply_delta_c", lambda z, c: (c, torch.zeros(4, 3)))
    losses = []
    for first, second in ((source, target), (source, source), (target, target)):
        torch.manual_seed(0)
        losses.append(step.run(views(first, "image_mask"), views(second), VALUES).loss)
    (ws, camera), (ws_source, _), (ws_target, _) = seen
    assert camera.equal(target.real_label)
    assert ws.equal(ws_source) and not ws.equal(ws_target)
    assert losses[0] != losses[1]


def split_gradients(batch_gpu: int, monkeypatch) -> dict[str, torch.Tensor]:
    """Return the gradients of a global batch of 8 in groups of 4, computed in chunks of `batch_gpu`."""
    step = make(train_config(batch=8, pose_offset_reg=10.0))
    values = dataclasses.replace(VALUES, swap_prob=0.5)
    step.G.double(), step.encoder.double()
    plan, whole = BatchPlan(batch_size=8, batch_gpu=batch_gpu, group_size=4), batch(8, torch.float64)
    for number in plan.chunks:
        positions = plan.positions(number)
        part = views(rows(whole, positions, plan.num_groups), "image_mask")
        with SplitDraws(positions, plan.num_groups).patched(monkeypatch):
            step.run(part, part, values, plan.num_groups, batch_gpu / 8)
    return {name: p.grad for name, p in step.named_parameters().items() if p.grad is not None}


def test_reconstruction_gradients_do_not_depend_on_the_split_of_the_batch(monkeypatch):
    """Camera offsets and swapped conditioning mix samples within groups alone."""
    one, two = split_gradients(8, monkeypatch), split_gradients(4, monkeypatch)
    assert one.keys() == two.keys() and "t_mapping.fc0.weight" in one
    for name, gradient in one.items():
        scale = gradient.abs().max().item()
        # float64: samples are added in another order, and the largest of them cancel.
        torch.testing.assert_close(two[name], gradient, rtol=1e-7, atol=1e-9 * scale + 1e-15, msg=name)


def test_reconstruction_reads_no_number_from_the_device():
    step, chunk = make(train_config("HoloDiscriminator")), batch()
    step.G.renderer.choose("reference")  # fused kernels take pointers, which this mode does not know
    pair = views(chunk, "image_mask", "image_parsing")
    with NoHostReads():
        step.run(pair, pair, dataclasses.replace(VALUES, swap_prob=0.5))


def test_reconstruction_weights_channels_last_where_asked_for():
    config = dataclasses.replace(train_config(), precision=PrecisionConfig(channels_last=True))
    step = Reconstruction(tiny_network(), config, has_mask=False)
    assert step.encoder.convs[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_reconstruction_learns_to_tell_views_apart():
    """A few steps on four images lower the loss."""
    config = train_config()
    step, chunk = make(config), batch()
    losses = []
    for seed in range(8):
        step.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        losses.append(float(step.run(views(chunk, "image_mask"), views(chunk, "image_mask"), VALUES).loss))
        step.optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses
