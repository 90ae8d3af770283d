"""The options of `train.py` that set fields of the configuration: one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click

from dnnlib import cli
from training.dual_discriminator import VARIANTS as DISCRIMINATORS

NOT_NEGATIVE = cli.FiniteFloat(min=0)
SHARE = cli.FiniteFloat(min=0, max=1)
NOT_NEGATIVE_INT = click.IntRange(min=0)
_SUPERRESOLUTION_PREFIX = "training.superresolution."


class DepthLimit(click.ParamType):
    """A distance from the camera, or 'auto'."""

    name = "distance"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Return the number, or 'auto'."""
        return value if value == "auto" else cli.FiniteFloat(min=0).convert(value, param, ctx)


class Setting(NamedTuple):
    """An option that sets fields of the configuration where it is given; otherwise the preset's value holds."""

    flags: str
    """Names, separated by blanks."""
    fields: str
    """Dotted paths in `TrainConfig`, separated by blanks."""
    type: Any
    help: str
    convert: Callable[[Any], Any] = lambda value: value
    """From the option's value to that of the fields."""

    @property
    def parameter(self) -> str:
        """Name of the parameter, made from the first flag."""
        return self.flags.split()[0].lstrip("-").replace("-", "_")


SETTINGS = (
    # data
    Setting("--mirror", "data.mirror", bool, "Add left-right flipped images, with the cameras flipped too."),
    Setting("--min-yaw", "data.min_yaw_deg", NOT_NEGATIVE, "Leave out images with a smaller absolute yaw, degrees."),
    Setting("--max-yaw", "data.max_yaw_deg", NOT_NEGATIVE, "Leave out images with a larger absolute yaw, degrees."),
    Setting(
        "--max-pitch", "data.max_pitch_deg", NOT_NEGATIVE, "Leave out images with a larger absolute pitch, degrees."
    ),
    Setting("--published-angles", "data.published_angles", bool, "Filter by the published yaw and pitch formula."),
    Setting("--back-repeat", "data.back_repeat", cli.POSITIVE_INT, "How often images from behind appear."),
    Setting("--max-images", "data.max_images", cli.POSITIVE_INT, "Use a random part of the data."),
    Setting("--skip-bad", "data.skip_bad", bool, "Leave out, count and report images that cannot be used."),
    Setting("--workers", "loop.workers", NOT_NEGATIVE_INT, "Processes that read images, for each training process."),
    # batch and length
    Setting("--batch", "loop.batch_size", cli.POSITIVE_INT, "Images per step, over all processes."),
    Setting("--batch-gpu", "loop.batch_gpu", cli.POSITIVE_INT, "Images that a process computes at a time."),
    Setting("--kimg", "loop.total_kimg", NOT_NEGATIVE, "Thousand images to train on."),
    Setting("--seed", "loop.seed", NOT_NEGATIVE_INT, "Random seed."),
    # networks
    Setting("--cbase", "generator.synthesis.channel_base discriminator.channel_base", cli.POSITIVE_INT, "Capacity."),
    Setting("--cmax", "generator.synthesis.channel_max discriminator.channel_max", cli.POSITIVE_INT, "Most channels."),
    Setting("--map-depth", "generator.mapping.num_layers", cli.POSITIVE_INT, "Layers of the mapping network."),
    Setting(
        "--g-architecture", "generator.synthesis.architecture", click.Choice(["orig", "skip", "resnet"]), "Backbone."
    ),
    Setting("--triplane-size", "generator.plane_resolution", cli.POSITIVE_INT, "Side of the planes, texels."),
    Setting("--triplane-depth", "generator.plane_depth", cli.POSITIVE_INT, "Depth of a tri-grid."),
    Setting(
        "--representation",
        "generator.representation",
        click.Choice(["dual_spherical", "tri_grid", "tri_plane"]),
        "Planes in which the volume is stored.",
    ),
    Setting(
        "--decoder-activation",
        "generator.decoder.activation",
        click.Choice(["sigmoid", "lrelu", "none"]),
        "Of colours.",
    ),
    Setting("--decoder-lr-mul", "generator.decoder.lr_multiplier", cli.POSITIVE_FLOAT, "Learning rate of the decoder."),
    Setting("--use-torgb-raw", "generator.raw_torgb", bool, "Make the raw image by a learned layer."),
    Setting("--use-background", "generator.background", bool, "Synthesise a background image behind the volume."),
    Setting("--pose-offset", "generator.pose_offset", bool, "Learn a camera offset for each latent."),
    Setting(
        "--sr-module",
        "generator.superresolution.variant",
        str,
        "Super-resolution module; by default that of the resolution.",
        lambda name: name.removeprefix(_SUPERRESOLUTION_PREFIX),
    ),
    Setting(
        "--sr-noise-mode", "generator.superresolution.noise_mode", click.Choice(["none", "random"]), "Its layer noise."
    ),
    Setting("--disc-module", "discriminator.variant", click.Choice(list(DISCRIMINATORS)), "Discriminator."),
    Setting(
        "--seg-resolution", "discriminator.seg_resolution", cli.POSITIVE_INT, "Of MaskDualDiscriminator's mask tower."
    ),
    Setting("--mbstd-group", "discriminator.mbstd_group_size", cli.POSITIVE_INT, "Minibatch-std group, images."),
    Setting("--freezed", "discriminator.freeze_layers", NOT_NEGATIVE_INT, "Freeze-D: layers that do not train."),
    Setting("--disc-c-noise", "discriminator.disc_c_noise", NOT_NEGATIVE, "Label noise of the discriminator."),
    # conditioning
    Setting(
        "--gen-pose-cond", "generator.conditioning.zero", bool, "Tell the generator the camera.", lambda on: not on
    ),
    Setting("--c-scale", "generator.conditioning.scale", NOT_NEGATIVE, "Factor on the conditioning label."),
    Setting("--gpc-reg-prob", "loss.conditioning_swap_prob", SHARE, "Probability of another sample's camera."),
    Setting("--gpc-reg-fade-kimg", "loss.conditioning_swap_fade_kimg", NOT_NEGATIVE, "... to which it falls from 1."),
    # rendering
    Setting("--depth-samples", "generator.rendering.depth_resolution", cli.POSITIVE_INT, "Stratified samples per ray."),
    Setting(
        "--depth-samples-importance",
        "generator.rendering.depth_resolution_importance",
        NOT_NEGATIVE_INT,
        "Samples per ray where the first found matter.",
    ),
    Setting("--ray-start", "generator.rendering.ray_start", DepthLimit(), "Nearest sample; a distance or auto."),
    Setting("--ray-end", "generator.rendering.ray_end", DepthLimit(), "Farthest sample; a distance or auto."),
    Setting(
        "--neural-rendering-resolution-initial",
        "loss.neural_rendering_resolution_initial",
        cli.POSITIVE_INT,
        "Side of the volume-rendered image, pixels.",
    ),
    Setting(
        "--neural-rendering-resolution-final",
        "loss.neural_rendering_resolution_final",
        cli.POSITIVE_INT,
        "... after the fade.",
    ),
    Setting(
        "--neural-rendering-resolution-fade-kimg",
        "loss.neural_rendering_resolution_fade_kimg",
        NOT_NEGATIVE,
        "Length of the fade.",
    ),
    # loss
    Setting("--gamma", "loss.r1_gamma", NOT_NEGATIVE, "Weight of R1."),
    Setting("--gamma-seg", "loss.r1_gamma_mask", NOT_NEGATIVE, "Weight of R1 on masks."),
    Setting("--gamma-parsing", "loss.r1_gamma_parsing", NOT_NEGATIVE, "Weight of R1 on parsing maps."),
    Setting("--blur-init-sigma", "loss.blur_init_sigma", NOT_NEGATIVE, "Blur of images at the start, pixels."),
    Setting("--blur-fade-kimg", "loss.blur_fade_kimg", NOT_NEGATIVE, "Fade of the blur, for a batch of 32."),
    Setting("--density-reg", "loss.density_reg", NOT_NEGATIVE, "Weight of the density regulariser."),
    Setting("--density-reg-every", "optimizer.generator_reg_interval", cli.POSITIVE_INT, "Iterations between them."),
    Setting(
        "--density-reg-p-dist", "loss.density_reg_perturbation", NOT_NEGATIVE, "Distance of its points, world units."
    ),
    Setting(
        "--reg-type",
        "loss.density_reg_type",
        click.Choice(["l1", "monotonic-detach", "monotonic-fixed", "total-variation"]),
        "Density regulariser.",
    ),
    Setting("--density-noise-fade-kimg", "loss.density_noise_fade_kimg", NOT_NEGATIVE, "Fade of noise on the density."),
    Setting("--bcg-reg-prob", "loss.background_swap_prob", SHARE, "Probability of another sample's background."),
    Setting("--trans-reg", "loss.pose_offset_reg", NOT_NEGATIVE, "Weight of the penalty on the mean camera offset."),
    Setting("--style-mixing-prob", "loss.style_mixing_prob", SHARE, "Probability of style mixing."),
    # view-image consistency
    Setting("--vico", "vico.mode", click.Choice(["none", "label", "head", "both"]), "View-image consistency."),
    Setting("--vico-weight", "vico.weight", NOT_NEGATIVE, "Its weight in the discriminator."),
    Setting("--vico-source", "vico.source", click.Choice(["real", "fake", "both"]), "Images shown with wrong cameras."),
    Setting("--vico-min-angle", "vico.min_angle_deg", cli.POSITIVE_FLOAT, "Least angle to a wrong camera, degrees."),
    Setting("--vico-hard-share", "vico.hard_share", SHARE, "Share of wrong cameras opposite in yaw."),
    Setting("--vico-generator-weight", "vico.generator_weight", NOT_NEGATIVE, "Weight in the generator (head)."),
    # reconstruction before adversarial training
    Setting("--warmup-kimg", "warmup.kimg", NOT_NEGATIVE, "Thousand images to reconstruct first; 0 does not."),
    Setting("--warmup-other-views", "warmup.other_view_share", SHARE, "Share of targets that show the head otherwise."),
    Setting("--warmup-kl", "warmup.kl_weight", NOT_NEGATIVE, "Weight of the divergence of its latents."),
    Setting("--warmup-glr", "warmup.generator_lr", cli.POSITIVE_FLOAT, "Learning rate of the generator in it."),
    Setting(
        "--warmup-after-interval",
        "warmup.after_interval",
        NOT_NEGATIVE_INT,
        "Go on with it after the warm-up, every so many iterations; 0 ends it.",
        lambda interval: interval or None,
    ),
    # augmentation
    Setting("--aug", "augment.mode", click.Choice(["noaug", "ada", "fixed"]), "Augmentation."),
    Setting("--p", "augment.p", SHARE, "Strength of --aug fixed."),
    Setting("--target", "augment.target", SHARE, "What --aug ada holds the mean sign of real logits at."),
    # optimisation
    Setting("--glr", "optimizer.generator_lr", cli.POSITIVE_FLOAT, "Learning rate of the generator."),
    Setting("--dlr", "optimizer.discriminator_lr", cli.POSITIVE_FLOAT, "Learning rate of the discriminator."),
    Setting("--ema-kimg", "loop.ema_kimg", NOT_NEGATIVE, "Half-life of the moving average of weights."),
    # precision and speed
    Setting(
        "--g-num-fp16-res",
        "generator.synthesis.num_fp16_res",
        NOT_NEGATIVE_INT,
        "Highest resolutions of the backbone in half precision.",
    ),
    Setting(
        "--sr-num-fp16-res",
        "generator.superresolution.num_fp16_res",
        NOT_NEGATIVE_INT,
        "Above 0: super-resolution in half precision.",
    ),
    Setting(
        "--d-num-fp16-res",
        "discriminator.num_fp16_res",
        NOT_NEGATIVE_INT,
        "Highest resolutions of the discriminator in half precision.",
    ),
    Setting(
        "--bf16",
        "generator.synthesis.half_precision generator.superresolution.half_precision discriminator.half_precision",
        bool,
        "Take bfloat16 as half precision, instead of float16.",
        lambda on: "bfloat16" if on else "float16",
    ),
    Setting("--tf32", "precision.tf32", bool, "Let CUDA multiply float32 in TF32."),
    Setting("--nobench", "precision.cudnn_benchmark", bool, "Do not let cuDNN time its algorithms.", lambda on: not on),
    Setting("--channels-last", "precision.channels_last", bool, "Keep images channels-last."),
    Setting("--compile", "precision.compile", bool, "Compile the generator with torch.compile."),
    # what is kept
    Setting("--tick", "loop.tick_kimg", cli.POSITIVE_FLOAT, "Thousand images between lines of statistics."),
    Setting(
        "--snap", "loop.snapshot_ticks loop.image_ticks", cli.POSITIVE_INT, "Ticks between snapshots and pictures."
    ),
    Setting("--image-ticks", "loop.image_ticks", cli.POSITIVE_INT, "Ticks between pictures."),
    Setting("--state-ticks", "loop.state_ticks", cli.POSITIVE_INT, "Ticks between training states."),
    Setting("--keep-states", "loop.keep_states", cli.POSITIVE_INT, "Training states that are kept."),
    Setting(
        "--metrics",
        "loop.metrics",
        str,
        "Metrics after every snapshot: names joined by commas, quick, full or none; calc_metrics.py --list shows them.",
        lambda names: tuple(name.strip() for name in names.split(",")),
    ),
    Setting("--max-skipped", "loop.max_skipped_steps", cli.POSITIVE_INT, "Skipped steps in a row that end training."),
)


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each of `SETTINGS`; without a value, yes/no options mean yes."""
    for setting in reversed(SETTINGS):
        flags = setting.flags.split()
        if setting.type is bool:
            attributes = {"type": click.BOOL, "is_flag": False, "flag_value": True}
        else:
            attributes = {"type": setting.type}
        command = cli.option(*flags, **attributes, default=None, show_default=False, help=setting.help)(command)
    return command


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the given options set, values by dotted path; later settings win."""
    fields: dict[str, Any] = {}
    for setting in SETTINGS:
        value = options[setting.parameter]
        if value is not None:
            fields |= dict.fromkeys(setting.fields.split(), setting.convert(value))
    for network, path in (
        ("generator.synthesis", "generator.synthesis.num_fp16_res"),
        ("discriminator", "discriminator.num_fp16_res"),
    ):
        if path in fields:  # half precision overflows without a bound
            fields[f"{network}.conv_clamp"] = 256 if fields[path] > 0 else None
    return fields
