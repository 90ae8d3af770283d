"""Discriminators assemble their inputs as promised, leave them alone and freeze the right layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_utils.ops.upfirdn2d import setup_filter
from training.config import DiscriminatorConfig
from training.dual_discriminator import (
    VARIANTS,
    Discriminator,
    DiscriminatorBlock,
    MinibatchStdLayer,
    filtered_resizing,
)

MASK_VARIANTS = [name for name in VARIANTS if "Mask" in name or name == "HoloDiscriminator"]
REORDERED = {"rtol": 1e-10, "atol": 1e-10}  # float64, the same products summed in another order


def build(variant: str = "HoloDiscriminator", **fields: Any) -> Discriminator:
    torch.manual_seed(0)
    defaults = {
        "img_resolution": 32,
        "channel_base": 256,
        "channel_max": 8,
        "parsing_channels": 5,
        "seg_resolution": 16,
    }
    return Discriminator(DiscriminatorConfig(variant=variant, **{**defaults, **fields})).double().eval()


def images(batch: int = 4, raw: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return {
        "image": rand(batch, 3, 32, 32) * 2 - 1,
        "image_raw": rand(batch, 3, raw, raw) * 2 - 1,
        "image_mask": rand(batch, 1, raw, raw),
        "image_parsing": rand(batch, 5, raw, raw).softmax(dim=1),
    }


def labels(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# Inputs.


@pytest.mark.parametrize("variant", VARIANTS)
def test_discriminator_every_variant_gives_one_finite_logit_per_sample(variant):
    logits = build(variant)(images(), labels())
    assert logits.shape == (4, 1) and logits.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_discriminator_depends_on_exactly_the_images_of_its_variant(variant):
    discriminator, inputs = build(variant), {k: v.requires_grad_() for k, v in images().items()}
    gradients = torch.autograd.grad(discriminator(inputs, labels()).sum(), list(inputs.values()), allow_unused=True)
    used = {name for name, gradient in zip(inputs, gradients, strict=True) if gradient is not None}
    assert used == set(VARIANTS[variant].stacked) | ({"image_mask"} if VARIANTS[variant].mask_tower else set())


@pytest.mark.parametrize("variant", VARIANTS)
def test_discriminator_leaves_its_inputs_alone(variant):
    inputs, c = images(), labels()
    before = {k: v.clone() for k, v in inputs.items()}, c.clone()
    build(variant, disc_c_noise=1.0).train()(inputs, c)
    assert all(inputs[k].equal(v) for k, v in before[0].items()) and set(inputs) == set(before[0])
    assert c.equal(before[1])


def test_assemble_stacks_resized_images_in_the_range_of_the_first():
    inputs = images()
    stacked = build().assemble(inputs)
    assert stacked.shape == (4, 3 + 3 + 1 + 5, 32, 32)
    assert stacked[:, :3].equal(inputs["image"])
    resized = filtered_resizing(inputs["image_mask"], 32, None) * 2 - 1
    torch.testing.assert_close(stacked[:, 6:7], resized, **REORDERED)
    sums = (stacked[:, 7:].sum(dim=1) + 5) / 2
    torch.testing.assert_close(sums, torch.ones_like(sums), **REORDERED)  # still probabilities, before the shift


@pytest.mark.parametrize("variant", VARIANTS)
def test_discriminator_missing_image_raises_value_error_that_names_it(variant):
    needed = set(VARIANTS[variant].stacked) | ({"image_mask"} if VARIANTS[variant].mask_tower else set())
    for name in needed:
        inputs = {k: v for k, v in images().items() if k != name}
        with pytest.raises(ValueError, match=f"'{name}'"):
            build(variant)(inputs, labels())


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 3, 16, 32), (4, 3, 32, 16)])
def test_discriminator_image_of_another_size_raises_value_error(shape):
    inputs = images() | {"image": torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"'image'.*32.*16"):
        build()(inputs, labels())


def test_discriminator_raw_image_that_is_not_square_is_resized():
    inputs = images() | {"image_raw": torch.zeros(4, 3, 16, 32, dtype=torch.float64)}
    assert build("DualDiscriminator")(inputs, labels()).shape == (4, 1)


def test_discriminator_label_of_another_width_raises_value_error():
    with pytest.raises(ValueError, match=r"^c: expected shape \[B, 25\]"):
        build()(images(), labels()[:, :24])


def test_discriminator_without_labels_ignores_them():
    discriminator = build(c_dim=0)
    assert not hasattr(discriminator, "mapping")
    assert discriminator(images(), labels()).equal(discriminator(images(), None))


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_discriminator_every_architecture_runs(architecture):
    assert build(architecture=architecture)(images(), labels()).isfinite().all()


# Batches.


@pytest.mark.parametrize(("batch", "group"), [(3, 2), (6, 4), (5, 4)])
def test_discriminator_batch_that_groups_do_not_divide_raises_value_error(batch, group):
    with pytest.raises(ValueError, match=rf"batch size.*multiple.*{group}.*got {batch}"):
        build(mbstd_group_size=group)(images(batch), labels(batch))


@pytest.mark.parametrize(("batch", "group"), [(1, 4), (2, 4), (3, 4), (8, 4), (3, None), (6, 3), (4, 1)])
def test_discriminator_batch_that_groups_divide_runs(batch, group):
    assert build(mbstd_group_size=group)(images(batch), labels(batch)).isfinite().all()


def test_minibatch_std_statistic_is_shared_by_strided_members():
    x = torch.randn(6, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = MinibatchStdLayer(3, 2)(x)
    assert out.shape == (6, 6, 2, 2) and out[:, :4].equal(x)
    for sample in range(6):
        group = x[[sample % 2, sample % 2 + 2, sample % 2 + 4]]
        for part in range(2):
            channels = group[:, 2 * part : 2 * part + 2]
            expected = (channels.var(dim=0, correction=0) + 1e-8).sqrt().mean()
            torch.testing.assert_close(out[sample, 4 + part], expected.expand(2, 2), **REORDERED)


# Label noise.


def test_disc_c_noise_adds_normal_numbers_in_batch_deviations(monkeypatch):
    discriminator, seen = build(disc_c_noise=0.5), []
    monkeypatch.setattr(
        discriminator.mapping, "forward", lambda _z, c: seen.append(c) or torch.zeros(len(c), 8).double()
    )
    c = labels()
    discriminator(images(), c, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(4, 25, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(seen[0], c + 0.5 * noise * c.std(dim=0), **REORDERED)


def test_disc_c_noise_has_the_deviation_of_the_group(monkeypatch):
    discriminator, seen = build(disc_c_noise=0.5, mbstd_group_size=2), []
    monkeypatch.setattr(
        discriminator.mapping, "forward", lambda _z, c: seen.append(c) or torch.zeros(len(c), 8).double()
    )
    c = labels(6)
    discriminator(images(6), c, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(6, 25, generator=torch.Generator().manual_seed(3))
    for group in range(3):  # strided members
        members = c[group::3]
        expected = members + 0.5 * noise[group::3] * members.std(dim=0)
        torch.testing.assert_close(seen[0][group::3], expected, **REORDERED)


def test_disc_c_noise_of_groups_of_one_raises_value_error():
    with pytest.raises(ValueError, match=r"discriminator\.disc_c_noise.*0\.5"):
        build(disc_c_noise=0.5, mbstd_group_size=1)


def test_disc_c_noise_of_a_single_sample_is_left_out():
    plain, noisy = build(), build(disc_c_noise=0.5)
    logits = noisy(images(1), labels(1))
    assert logits.isfinite().all() and logits.equal(plain(images(1), labels(1)))


def test_disc_c_noise_differs_between_calls_and_repeats_with_a_generator():
    discriminator = build(disc_c_noise=0.5)
    assert not discriminator(images(), labels()).equal(discriminator(images(), labels()))
    seeded = [discriminator(images(), labels(), generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert seeded[0].equal(seeded[1])


# Images and labels apart.


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_features_equal_forward(variant):
    discriminator, inputs = build(variant), images()
    features = discriminator.features(inputs)
    assert discriminator.logits(features, labels()).equal(discriminator(inputs, labels()))
    assert features.trunk.shape[2:] == (4, 4)


def test_one_batch_of_features_serves_several_labels():
    discriminator, inputs = build(), images()
    features, others = discriminator.features(inputs), labels().roll(1, dims=0)
    assert discriminator.logits(features, others).equal(discriminator(inputs, others))


def test_features_without_labels_are_logits():
    discriminator = build(c_dim=0)
    features = discriminator.features(images())
    assert discriminator.logits(features, None).equal(features.embedding)


def test_groups_do_not_depend_on_the_rest_of_the_batch():
    discriminator, inputs, c = build(mbstd_group_size=2), images(6), labels(6)
    together = discriminator(inputs, c)
    for group in range(3):
        alone = discriminator({name: image[group::3] for name, image in inputs.items()}, c[group::3])
        torch.testing.assert_close(alone, together[group::3], **REORDERED)


# View-image consistency head.


def test_head_leaves_other_initial_weights_and_logits_alone():
    plain, with_head = build(), build(view_head_features=6)
    own = with_head.state_dict()
    assert all(own[name].equal(tensor) for name, tensor in plain.state_dict().items())
    assert list(own)[: len(plain.state_dict())] == list(plain.state_dict())
    assert {name.split(".")[0] for name in own.keys() - plain.state_dict().keys()} == {"view_head"}
    assert with_head(images(), labels()).equal(plain(images(), labels()))


def test_discriminator_without_head_has_no_consistency():
    discriminator = build()
    assert discriminator.view_head is None
    with pytest.raises(ValueError, match="view_head_features above 0"):
        discriminator.consistency(discriminator.features(images()), labels())


def test_head_without_labels_raises_value_error():
    with pytest.raises(ValueError, match=r"discriminator\.view_head_features.*4"):
        build(c_dim=0, view_head_features=4)


def test_consistency_is_a_scaled_cosine_for_each_sample():
    discriminator = build(view_head_features=6)
    head, features, c = discriminator.view_head, discriminator.features(images()), labels()
    logits = discriminator.consistency(features, c)
    cosine = torch.cosine_similarity(head.embed_image(features.trunk), head.embed_view(c), dim=1)
    torch.testing.assert_close(logits, (4 * cosine)[:, None], rtol=1e-6, atol=1e-6)  # the scale is stored in float32
    first = {name: image[:1] for name, image in images().items()}
    alone = discriminator.consistency(discriminator.features(first), c[:1])
    torch.testing.assert_close(alone, logits[:1], **REORDERED)


def test_consistency_scale_is_bounded():
    discriminator = build(view_head_features=6)
    with torch.no_grad():
        discriminator.view_head.log_scale.fill_(100.0)
    logits = discriminator.consistency(discriminator.features(images()), labels())
    assert logits.isfinite().all() and logits.abs().max() <= 30


def test_consistency_depends_on_the_rotation_of_the_camera_alone():
    discriminator, c = build(view_head_features=6), labels().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator.consistency(discriminator.features(images()), c).sum(), c)
    used = gradient.abs().amax(dim=0).nonzero().flatten().tolist()
    assert used == [0, 1, 2, 4, 5, 6, 8, 9, 10]


# Fading of the raw image.


def test_dummy_dual_fades_the_raw_image_in_training_mode_only():
    discriminator, inputs = build("DummyDualDiscriminator"), images()
    for _ in range(3):
        discriminator(inputs, labels())
    assert discriminator.raw_fade == 1.0
    torch.testing.assert_close(
        discriminator(inputs, labels()), build("DualDiscriminator")(inputs, labels()), **REORDERED
    )
    discriminator.train()
    for step in range(1, 4):
        discriminator(inputs, labels())
        assert discriminator.raw_fade == pytest.approx(1 - step * 32 / 500_000, abs=1e-12)
    discriminator.eval()
    faded = inputs | {"image_raw": inputs["image_raw"] * discriminator.raw_fade}
    expected = build("DualDiscriminator")(faded, labels())
    torch.testing.assert_close(discriminator(inputs, labels()), expected, **REORDERED)


def test_dummy_dual_fade_ends_at_zero():
    discriminator = build("DummyDualDiscriminator").train()
    discriminator.raw_fade = 1e-6
    discriminator(images(), labels())
    assert discriminator.raw_fade == 0
    assert discriminator(images(), labels()).equal(
        discriminator(images() | {"image_raw": torch.ones(4, 3, 8, 8).double()}, labels())
    )


# Freeze-D.


def layers_in_order(discriminator: Discriminator, prefix: str = "b") -> list[str]:
    """Return the names of the layers of a tower from the highest resolution down, in the published count."""
    names = []
    for resolution in discriminator.block_resolutions:
        block = getattr(discriminator, f"{prefix}{resolution}")
        names += [f"{prefix}{resolution}.{n}" for n in ("fromrgb", "conv0", "conv1", "skip") if hasattr(block, n)]
    return names


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
@pytest.mark.parametrize("freeze_layers", [0, 1, 2, 4, 5, 7, 99])
def test_freeze_layers_turns_the_first_layers_into_buffers(architecture, freeze_layers):
    discriminator = build(freeze_layers=freeze_layers, architecture=architecture)
    frozen = set(layers_in_order(discriminator)[:freeze_layers])
    parameters = {name.rpartition(".")[0] for name, _ in discriminator.named_parameters()}
    trainable = {name for name in layers_in_order(discriminator) if name in parameters}
    assert trainable == set(layers_in_order(discriminator)) - frozen
    assert {"b4.conv", "b4.fc", "b4.out"} <= parameters  # the epilogue always trains
    unfrozen = build(architecture=architecture)
    assert set(discriminator.state_dict()) == set(unfrozen.state_dict())
    discriminator.load_state_dict(unfrozen.state_dict())
    assert discriminator(images(), labels()).equal(unfrozen(images(), labels()))


def test_freeze_layers_of_two_towers_count_by_the_mask_tower_where_there_is_one():
    discriminator = build("MaskDualDiscriminator", freeze_layers=6)
    parameters = {name.rpartition(".")[0] for name, _ in discriminator.named_parameters()}
    frozen = {n for n in [*layers_in_order(discriminator)] if n not in parameters}
    # b32 has 4 layers, b16 as well as sb16 begins at 4; sb16 has a fromrgb, and so one layer more than b16.
    assert frozen == {"b32.fromrgb", "b32.conv0", "b32.conv1", "b32.skip", "b16.conv0", "b16.conv1"}
    mask_layers = {n for n, module in discriminator.named_modules() if n.startswith("sb") and "." in n}
    assert {n for n in mask_layers if n not in parameters} == {"sb16.fromrgb", "sb16.conv0"}


# Blocks, resizing, configuration.


def test_discriminator_block_residual_equals_its_formula():
    config = DiscriminatorConfig(img_resolution=8, conv_clamp=None)
    torch.manual_seed(0)
    block = DiscriminatorBlock(4, 4, 6, 8, 3, 0, config, use_fp16=False).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    out, image = block(x, None)
    expected = (block.skip(x) + block.conv1(block.conv0(x))) * 0.5**0.5
    torch.testing.assert_close(out, expected, **REORDERED)
    assert image is None and out.shape == (2, 6, 4, 4)


@pytest.mark.parametrize("mode", ["antialiased", "none", "classic", 0.25])
def test_filtered_resizing_keeps_a_constant(mode):
    x = torch.full((1, 2, 12, 12), 3.0)
    out = filtered_resizing(x, 7, setup_filter((1, 3, 3, 1)), mode)
    inside = out[..., 2:-2, 2:-2]  # 'classic' sees zeros outside
    torch.testing.assert_close(inside, torch.full_like(inside, 3.0), rtol=1e-5, atol=0)  # float32


@pytest.mark.parametrize("mode", ["nearest", 0.0, 1.0, -0.5, None, 1])
def test_filtered_resizing_unknown_mode_raises_value_error(mode):
    with pytest.raises(ValueError, match="^mode: "):
        filtered_resizing(torch.zeros(1, 1, 4, 4), 2, None, mode)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "TripleDiscriminator"}, r"discriminator\.variant.*HoloDiscriminator.*'TripleDiscriminator'"),
        ({"img_resolution": 48}, r"discriminator\.img_resolution.*power of two.*48"),
        ({"img_resolution": 4}, r"discriminator\.img_resolution.*4"),
        ({"seg_resolution": 12}, r"discriminator\.seg_resolution.*12"),
        ({"variant": "MaskDualDiscriminator", "seg_resolution": None}, r"discriminator\.seg_resolution"),
        ({"variant": "MaskDualDiscriminator", "seg_resolution": 64}, r"discriminator\.seg_resolution.*64"),
        ({"disc_c_noise": -1.0}, r"discriminator\.disc_c_noise.*-1"),
        ({"mbstd_group_size": 0}, r"discriminator\.mbstd_group_size.*0"),
        ({"channel_base": 16}, r"discriminator\.channel_base.*32.*16"),
        ({"mapping_layers": 0}, r"mapping\.num_layers.*0"),
    ],
)
def test_discriminator_impossible_configuration_raises_value_error_that_names_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


def test_discriminator_gradients_are_right_to_second_order():
    discriminator = build("DualDiscriminator", img_resolution=8, channel_base=32, channel_max=2)
    raw = images(2)["image_raw"]
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    c = labels(2)
    assert torch.autograd.gradcheck(lambda x: discriminator({"image": x, "image_raw": raw}, c), image, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda x: discriminator({"image": x, "image_raw": raw}, c), image, fast_mode=True, atol=1e-4
    )
