"""Loss terms equal their formulas, and their gradients are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training import loss

FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}  # the same sums in float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Terms.


@pytest.mark.parametrize(
    ("term", "sign"),
    [(loss.generator_loss, -1), (loss.discriminator_fake_loss, 1), (loss.discriminator_real_loss, -1)],
)
def test_logistic_terms_equal_the_logarithm_of_their_probability(term, sign):
    logits = normal(5, 1) * 4
    torch.testing.assert_close(term(logits), -torch.log(torch.sigmoid(-sign * logits)), **FLOAT64)
    assert torch.autograd.gradcheck(term, logits.requires_grad_())


def test_logistic_terms_of_huge_logits_stay_finite():
    logits = torch.tensor([[-1e30], [1e30]])
    for term in (loss.generator_loss, loss.discriminator_fake_loss, loss.discriminator_real_loss):
        assert term(logits).isfinite().all()


def tiny_critic() -> nn.Module:
    """Return a smooth network from [B, 2, 4, 4] and [B, 1, 2, 2] to logits."""
    torch.manual_seed(0)

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)
            self.mask = nn.Conv2d(1, 3, 1)
            self.out = nn.Linear(3, 1)

        def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.conv(image)).mean(dim=(2, 3)) + torch.tanh(self.mask(mask)).mean(dim=(2, 3))
            return self.out(torch.tanh(x))

    return Critic().double()


def r1_of(critic: nn.Module, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    inputs = {"image": image.detach().requires_grad_(), "image_mask": mask.detach().requires_grad_()}
    penalties = loss.r1_penalties(critic(*inputs.values()), inputs)
    return 0.5 * penalties["image"].mean() + 2.0 * penalties["image_mask"].mean()


def test_r1_equals_squared_finite_differences_of_the_logits():
    critic, image, mask = tiny_critic(), normal(2, 2, 4, 4), normal(2, 1, 2, 2, seed=1)
    inputs = {"image": image.clone().requires_grad_(), "image_mask": mask.clone().requires_grad_()}
    penalties = loss.r1_penalties(critic(*inputs.values()), inputs)
    step, expected = 1e-5, torch.zeros(2, dtype=torch.float64)
    for i in range(image[0].numel()):
        shift = torch.zeros_like(image).flatten(1)
        shift[:, i] = step
        shift = shift.view_as(image)
        with torch.no_grad():
            slope = (critic(image + shift, mask) - critic(image - shift, mask)) / (2 * step)
        expected += slope.squeeze(1).square()
    torch.testing.assert_close(penalties["image"].detach(), expected, rtol=1e-8, atol=0)  # central differences
    assert penalties["image"].shape == penalties["image_mask"].shape == (2,)


def test_r1_gradient_of_the_weights_equals_finite_differences():
    critic, image, mask = tiny_critic(), normal(2, 2, 4, 4), normal(2, 1, 2, 2, seed=1)
    r1_of(critic, image, mask).backward()
    step = 1e-5
    for name, parameter in critic.named_parameters():
        if parameter.grad is None:  # the last bias has no influence on gradients
            assert name == "out.bias"
            continue
        flat, expected = parameter.data.view(-1), torch.empty_like(parameter.data).view(-1)
        for i in range(flat.numel()):
            value = flat[i].item()
            flat[i] = value + step
            above = r1_of(critic, image, mask).item()
            flat[i] = value - step
            below = r1_of(critic, image, mask).item()
            flat[i] = value
            expected[i] = (above - below) / (2 * step)
        # Central differences of a value of order 0.1 in float64.
        torch.testing.assert_close(parameter.grad.view(-1), expected, rtol=1e-6, atol=1e-9, msg=name)


def test_pose_offset_penalty_is_the_squared_mean_of_each_group():
    offsets = normal(6, 3)
    one = loss.pose_offset_penalty(offsets)
    torch.testing.assert_close(one, offsets.mean(dim=0).square().sum(), **FLOAT64)
    # Rows 0, 2, 4 are the members of group 0, rows 1, 3, 5 those of group 1.
    expected = (loss.pose_offset_penalty(offsets[::2]) + loss.pose_offset_penalty(offsets[1::2])) / 2
    torch.testing.assert_close(loss.pose_offset_penalty(offsets, num_groups=2), expected, **FLOAT64)
    assert torch.autograd.gradcheck(lambda x: loss.pose_offset_penalty(x, 2), offsets.requires_grad_())


def test_pose_offset_penalty_of_opposite_offsets_is_zero():
    assert loss.pose_offset_penalty(torch.tensor([[1.0, 2, 3], [-1, -2, -3]])) == 0


def test_density_l1_is_the_mean_distance_of_pairs():
    a, b = normal(2, 5), normal(2, 5, seed=1)
    torch.testing.assert_close(loss.density_l1(a, b), (a - b).abs().mean(), **FLOAT64)
    assert torch.autograd.gradcheck(loss.density_l1, (a.requires_grad_(), b.requires_grad_()))


def test_density_monotonic_penalises_only_density_that_falls_inwards():
    front, behind = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 2.0]])
    assert loss.density_monotonic(front, behind, detach=False) == 1.5


@pytest.mark.parametrize("detach", [True, False])
def test_density_monotonic_detach_leaves_the_front_alone(detach):
    front, behind = torch.tensor([[5.0, 1.0]], requires_grad=True), torch.tensor([[2.0, 3.0]], requires_grad=True)
    loss.density_monotonic(front, behind, detach).backward()
    assert behind.grad.tolist() == [[-0.5, 0.0]]
    assert front.grad is None if detach else front.grad.tolist() == [[0.5, 0.0]]


def test_total_variation_of_a_linear_field_is_its_slope_per_step():
    slope, step = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64), 0.125
    torch.manual_seed(0)
    points = loss.stencil_points(2, 50, box_warp=1.0, step=step, device=torch.device("cpu")).double()
    stencil = (points @ slope).unflatten(1, (-1, 4))
    # Points are float32, with a resolution of 6e-8 where the step is 0.125.
    torch.testing.assert_close(
        loss.density_total_variation(stencil), torch.tensor(3 * step, dtype=torch.float64), rtol=2e-6, atol=0
    )


def test_total_variation_of_a_constant_field_has_no_gradient():
    stencil = torch.ones(1, 3, 4, requires_grad=True)
    term = loss.density_total_variation(stencil)
    term.backward()
    assert term <= 1.1e-6 and stencil.grad.abs().max() == 0


def test_total_variation_gradient_is_right():
    assert torch.autograd.gradcheck(loss.density_total_variation, normal(2, 3, 4).requires_grad_())


# Points.


def test_near_pairs_fill_the_published_cube_and_lie_close():
    torch.manual_seed(0)
    first, second = loss.near_pairs(4, 1000, 0.004, torch.device("cpu")).chunk(2, dim=1)
    assert first.shape == (4, 1000, 3) and first.abs().max() <= 1 and first.abs().max() > 0.99
    assert (second - first).std().item() == pytest.approx(0.004, rel=0.05)  # 12000 normal numbers


def test_behind_pairs_step_towards_minus_z():
    first, second = loss.behind_pairs(2, 10, 0.25, torch.device("cpu")).chunk(2, dim=1)
    torch.testing.assert_close(
        second - first, torch.tensor([0.0, 0.0, -0.25]).expand(2, 10, 3), rtol=0, atol=1e-6
    )  # float32 subtraction at 1


def test_stencil_points_begin_inside_the_box():
    points = loss.stencil_points(2, 100, box_warp=0.5, step=0.01, device=torch.device("cpu")).unflatten(1, (-1, 4))
    assert points[:, :, 0].abs().max() <= 0.25
    offsets = points[:, :, 1:] - points[:, :, :1]
    torch.testing.assert_close(offsets, (torch.eye(3) * 0.01).expand(2, 100, 3, 3), rtol=0, atol=1e-7)  # float32


# Blur.


@pytest.mark.parametrize(("sigma", "taps"), [(10.0, 61), (1.0, 7), (0.34, 3)])
def test_blur_taps_are_powers_of_two_that_add_up_to_one(sigma, taps):
    values = loss.blur_taps(sigma)
    assert len(values) == taps
    torch.testing.assert_close(values.sum(), torch.ones([]))
    middle = taps // 2
    ratio = (values[middle + 1] / values[middle]).item()
    assert ratio == pytest.approx(2 ** (-1 / sigma**2), rel=1e-6)  # float32


def test_blur_is_separable_keeps_the_size_and_has_zeros_outside():
    image = torch.zeros(1, 2, 9, 7)
    image[0, 1, 4, 3] = 1
    taps = loss.blur_taps(1.0)
    blurred = loss.blur(image, 1.0)
    assert blurred.shape == image.shape and blurred[0, 0].abs().max() == 0
    torch.testing.assert_close(blurred[0, 1, 1:8], taps.outer(taps))
    corner = loss.blur(torch.ones(1, 1, 9, 9), 1.0)[0, 0, 0, 0]
    torch.testing.assert_close(corner, taps[3:].sum().square())


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.33])
def test_blur_of_less_than_a_third_of_a_pixel_is_nothing(sigma):
    image = torch.randn(1, 1, 5, 5)
    assert loss.blur(image, sigma) is image


# Mixing.


def test_roll_within_groups_takes_the_member_before():
    # Two groups of three, laid out member by member: a0 b0 a1 b1 a2 b2.
    rows = torch.tensor([[0], [10], [1], [11], [2], [12]])
    assert loss.roll_within_groups(rows, 2).flatten().tolist() == [2, 12, 0, 10, 1, 11]
    assert loss.roll_within_groups(rows[::2], 1).flatten().tolist() == [2, 0, 1]


@pytest.mark.parametrize("swap", [loss.swap_conditioning, loss.swap_conditioning_of_groups])
def test_swap_conditioning_at_the_limits_of_probability(swap):
    labels = torch.randn(6, 25)
    assert swap(labels, 0.0, 2).equal(labels)
    assert swap(labels, 1.0, 2).equal(loss.roll_within_groups(labels, 2))
    state = torch.get_rng_state()
    assert swap(labels, None, 2).abs().max() == 0
    assert torch.get_rng_state().equal(state)


def test_swap_conditioning_draws_for_each_sample():
    torch.manual_seed(0)
    labels = torch.randn(1000, 25)
    swapped = (loss.swap_conditioning(labels, 0.25) != labels).any(dim=1)
    assert 200 < swapped.sum() < 300  # 250, standard deviation 14


def test_swap_conditioning_of_groups_swaps_whole_groups():
    labels = torch.randn(8, 25)
    torch.manual_seed(0)
    swapped = (loss.swap_conditioning_of_groups(labels, 0.5, 4) != labels).any(dim=1).unflatten(0, (2, 4))
    assert swapped[0].equal(swapped[1]) and 0 < swapped[0].sum() < 4
    torch.manual_seed(0)
    assert swapped[0].equal(torch.rand(4) < 0.5)


def test_swap_of_one_group_draws_one_number_as_published():
    torch.manual_seed(5)
    loss.swap_conditioning_of_groups(torch.randn(4, 25, generator=torch.Generator()), 0.5)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.rand([])
    assert torch.get_rng_state().equal(after)


def test_swap_backgrounds_takes_all_layers_of_another_sample():
    ws = torch.randn(6, 4, 8)
    assert loss.swap_backgrounds(ws, 1.0, 2).equal(ws.roll(2, dims=0))
    state = torch.get_rng_state()
    assert loss.swap_backgrounds(ws, 0.0, 2) is None and torch.get_rng_state().equal(state)


def test_mixing_cutoffs_are_inside_with_their_probability():
    torch.manual_seed(0)
    cutoffs = loss.draw_mixing_cutoffs(10, 0.9, 2000, torch.device("cpu"))
    mixed = cutoffs[cutoffs < 10]
    assert mixed.min() == 1 and mixed.max() == 9 and 0.87 < len(mixed) / 2000 < 0.93
    assert loss.draw_mixing_cutoffs(10, 0.0, 5, torch.device("cpu")).tolist() == [10] * 5


def test_mix_styles_replaces_layers_from_the_cutoff_of_the_group():
    ws, other = torch.zeros(4, 5, 2), torch.ones(4, 5, 2)
    mixed = loss.mix_styles(ws, other, torch.tensor([2, 5]))
    assert mixed[:, :, 0].tolist() == [[0, 0, 1, 1, 1], [0] * 5] * 2
    assert math.isclose(mixed.mean(), 0.3, rel_tol=1e-6)
