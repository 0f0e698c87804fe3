"""Losses of attention maps: against values by hand, against finite differences, and the laws they share."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate

import artaug as aa
from artaug.regional.attention_losses import (
    Smoothing,
    attend_and_excite_loss,
    box_constraint_loss,
    box_coverage_loss,
    enhance_loss,
    high_activation_masks,
    local_attention_loss,
    mask_matching_loss,
    normalize_gradient,
    region_masks,
    retention_loss,
    segregation_loss,
    select_maps,
    separate_loss,
    sharpen,
    weakest_local_loss,
    zest_bce_loss,
    zest_loss,
)

GRID = (4, 5)
UNPLACED = {
    "attend_and_excite": partial(attend_and_excite_loss, grid=GRID),
    "enhance": partial(enhance_loss, grid=GRID),
    "separate": separate_loss,
    "segregation": segregation_loss,
}
PLACED = {
    "retention": retention_loss,
    "zest": zest_loss,
    "zest_bce": zest_bce_loss,
    "local_attention": partial(local_attention_loss, grid=GRID),
    "weakest_local": partial(weakest_local_loss, grid=GRID),
    "mask_matching": mask_matching_loss,
    "box_coverage": box_coverage_loss,
    "box_constraint": partial(box_constraint_loss, grid=GRID, corner_tokens=1),
}
BLURRED = {"attend_and_excite", "enhance", "local_attention", "weakest_local", "box_constraint"}
BOXES = region_masks([aa.Region(aa.Box(0, 0, 0.6, 0.5), "left"), aa.Region(aa.Box(0.4, 0.25, 1, 1), "right")], GRID)


def random_maps(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype)


def loss_of(name, maps, masks=BOXES, **options):
    """The loss of that name; those without masks leave them out."""
    return UNPLACED[name](maps, **options) if name in UNPLACED else PLACED[name](maps, masks, **options)


few = settings(max_examples=15)
every_loss = pytest.mark.parametrize("name", [*UNPLACED, *PLACED])


def test_attend_and_excite_is_the_distance_of_the_weakest_peak_from_one():
    maps = torch.tensor([[[0.9, 0.2, 0.1, 0.0], [0.3, 0.4, 0.1, 0.2]], [[1.0, 0.2, 0.1, 0.0], [0.3, 1.5, 0.1, 0.2]]])
    loss = attend_and_excite_loss(maps, (2, 2), smoothing=None)
    torch.testing.assert_close(loss, torch.tensor([0.6, 0.0]))


def test_enhance_takes_the_peak_over_heads_and_is_not_cut_at_zero():
    maps = torch.tensor([[[[0.1, 0.2], [0.7, 0.1]], [[0.5, 0.1], [0.2, 0.3]]], [[[1.5, 0.0]] * 2, [[0.0, 1.25]] * 2]])
    torch.testing.assert_close(enhance_loss(maps, (1, 2), smoothing=None), torch.tensor([0.5, -0.25]))


def test_separate_is_the_worst_product_over_sum_of_heads_and_tokens():
    maps = torch.tensor([[[[0.6, 0.1], [0.2, 0.4]], [[0.3, 0.1], [0.2, 0.4]]]])
    # Head 1: 0.18 / 0.9 = 0.2, 0.01 / 0.2 = 0.05. Head 2: 0.04 / 0.4 = 0.1, 0.16 / 0.8 = 0.2.
    torch.testing.assert_close(separate_loss(maps), torch.tensor([0.2]))
    three = torch.tensor([[[0.5], [0.4], [0.1]]])
    torch.testing.assert_close(separate_loss(three), torch.tensor([0.02]))


def test_segregation_sums_the_overlap_of_every_pair():
    maps = torch.tensor([[[0.6, 0.2], [0.2, 0.2], [0.0, 0.4]]])
    # min/sum of the pairs: 0.4 / 1.2, 0.2 / 1.2, 0.2 / 0.8.
    torch.testing.assert_close(segregation_loss(maps), torch.tensor([0.4 / 1.2 + 0.2 / 1.2 + 0.2 / 0.8]))


def test_retention_is_one_minus_the_overlap_with_the_step_before_summed_over_phrases():
    maps = torch.tensor([[[0.6, 0.2], [0.1, 0.5]]])
    masks = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # 1 - 0.6 / 1.8, 1 - 0.1 / 1.6
    torch.testing.assert_close(retention_loss(maps, masks), torch.tensor([2 - 0.6 / 1.8 - 0.1 / 1.6]))


def test_zest_is_the_mean_of_the_fourth_powers_beyond_the_tolerance():
    maps = torch.tensor([[[0.9, 0.5], [0.1, 0.0]]])
    masks = torch.tensor([[1.0, 0.0], [0.2, 1.0]])
    expected = ((0.5**4 - 0.2**4) + (1.0 - 0.2**4)) / 4
    torch.testing.assert_close(zest_loss(maps, masks), torch.tensor([expected]))
    weighted = ((0.5**4 - 0.2**4) * 3 + (1.0 - 0.2**4)) / 4
    torch.testing.assert_close(zest_loss(maps, masks, weights=torch.tensor([3.0, 1.0])), torch.tensor([weighted]))
    squares = (0.1**2 + 0.5**2 + 0.1**2 + 1.0**2) / 4
    torch.testing.assert_close(zest_loss(maps, masks, power=2, tolerance=0), torch.tensor([squares]))


def test_zest_has_the_gradient_of_the_published_code():
    maps, masks = random_maps(2, 2, 20).requires_grad_(), BOXES.double()

    # The code overwrites what is within the tolerance by a constant, and keeps its fourth power.
    near = ((maps - masks).abs() < 0.2).detach()
    published = (torch.where(near, masks.clip(0.2, 0.8), maps) - masks).pow(4).mean()

    ours = zest_loss(maps, masks).mean()
    (expected,), (found,) = torch.autograd.grad(published, maps), torch.autograd.grad(ours, maps)
    torch.testing.assert_close(found, expected)


def test_zest_of_a_power_below_one_has_a_finite_gradient_where_a_map_is_its_mask():
    maps = torch.tensor([[1.0, 0.5]], requires_grad=True)
    zest_loss(maps, torch.tensor([1.0, 0.0]), power=0.5, tolerance=0).sum().backward()
    assert maps.grad.isfinite().all()


def test_zest_bce_is_the_entropy_of_the_scaled_map_and_of_the_normalized_one():
    maps, masks = torch.tensor([[0.1, 0.04]], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    low, high = math.log(0.001), math.log(0.999)

    def entropy(value, mask):
        value = min(max(value, 0.001), 0.999)
        return -(mask * math.log(value) + (1 - mask) * math.log(1 - value))

    scaled = (entropy(0.5, 0.999) + entropy(0.2, 0.001)) / 2
    normalized = (entropy(0.5 / 0.5001, 0.999) + entropy(0.2 / 0.5001, 0.001)) / 2
    torch.testing.assert_close(
        zest_bce_loss(maps, masks), torch.tensor([scaled + normalized], dtype=torch.float64), rtol=1e-9, atol=0
    )
    least = -(0.999 * high + 0.001 * low)
    assert zest_bce_loss(masks[None], masks).item() == pytest.approx(2 * least, rel=1e-6)


def test_local_attention_is_the_peak_outside_minus_the_peak_inside():
    maps = torch.tensor([[[0.9, 0.2], [0.3, 0.4]]])
    masks = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = local_attention_loss(maps, masks, (1, 2), smoothing=None)
    torch.testing.assert_close(loss, torch.tensor([((0.2 - 0.9) + (0.4 - 0.3)) / 2]))
    weakest = weakest_local_loss(maps, masks, (1, 2), smoothing=None)
    torch.testing.assert_close(weakest, torch.tensor([-0.3]))


def test_mask_matching_sums_the_squared_distance_of_normalized_maps():
    maps = torch.tensor([[[0.4, 0.2], [0.0, 0.1]]])
    masks = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(mask_matching_loss(maps, masks), torch.tensor([0.25 / 2 + 1 / 2]))


def test_box_coverage_is_the_squared_part_outside():
    maps = torch.tensor([[[0.3, 0.1], [0.1, 0.1]]])
    masks = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(box_coverage_loss(maps, masks), torch.tensor([(0.25**2 + 0.5**2) / 2]))


def test_box_constraints_are_the_three_sums_of_the_published_code():
    maps = torch.tensor([[0.8, 0.4, 0.2, 0.1, 0.0, 0.3, 0.5, 0.6, 0.9]])
    masks = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    loss = box_constraint_loss(maps, masks, (3, 3), fraction=0.5, corner_tokens=0, smoothing=None)
    inner = 1 - (0.8 + 0.4) / 2  # 2 of 4 tokens inside
    outer = (0.9 + 0.6) / 2  # 2 of 5 outside, the fraction rounded down
    # Projections: columns 0.8, 0.6, 0.9 against 1, 1, 0; the edges are 0 and 2. Rows 0.8, 0.3, 0.9: the same edges.
    columns = (0.2 + 0.9) / 3
    rows = (0.2 + 0.9) / 3
    torch.testing.assert_close(loss, torch.tensor([inner + outer + columns + rows]))


def published_kernel(sigma):
    axis = np.exp(-(((np.arange(3) - 1) / (2 * sigma)) ** 2))
    kernel = np.outer(axis, axis)
    return kernel / kernel.sum()


def test_the_default_blur_is_the_kernel_of_attend_and_excite():
    maps = random_maps(3, 2, 20)
    expected = [correlate(one, published_kernel(0.5), mode="mirror") for one in maps.reshape(6, *GRID).numpy()]
    torch.testing.assert_close(Smoothing().blur(maps, GRID), torch.tensor(np.array(expected)).reshape(maps.shape))


def test_the_blur_of_udifftext_is_a_plain_gaussian_over_zeros():
    maps = random_maps(2, 20)
    axis = np.exp(-((np.arange(3) - 1) ** 2) / (2 * 0.5**2))
    kernel = np.outer(axis, axis) / axis.sum() ** 2
    expected = [correlate(one, kernel, mode="constant") for one in maps.reshape(2, *GRID).numpy()]
    found = Smoothing(sigma_tokens=0.5, edge="zeros").blur(maps, GRID)
    torch.testing.assert_close(found, torch.tensor(np.array(expected)).reshape(maps.shape))


@every_loss
def test_blurred_losses_are_those_of_blurred_maps(name):
    maps = random_maps(2, 2, 20)
    if name not in BLURRED:
        with pytest.raises(aa.InvalidValueError, match="smoothing=None"):
            loss_of(name, maps, smoothing=None)
        return
    edge = "zeros" if "local" in name else "reflect"
    blur = Smoothing(sigma_tokens=0.5, edge=edge) if "local" in name else Smoothing()
    torch.testing.assert_close(loss_of(name, maps), loss_of(name, blur.blur(maps, GRID), smoothing=None))


@every_loss
def test_the_gradient_is_that_of_finite_differences(name):
    maps = random_maps(2, 2, 20, seed=3).mul(0.9).add(0.05).requires_grad_()
    assert torch.autograd.gradcheck(partial(loss_of, name), (maps,))


@pytest.mark.parametrize("name", ["separate", "enhance"])
def test_the_gradient_of_separate_heads_is_that_of_finite_differences(name):
    maps = random_maps(2, 3, 2, 20).requires_grad_()
    assert torch.autograd.gradcheck(UNPLACED[name], (maps,))


@every_loss
def test_a_loss_of_maps_of_zeros_is_finite_and_so_is_its_gradient(name):
    maps = torch.zeros(2, 2, 20, requires_grad=True)
    loss = loss_of(name, maps)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert maps.grad.isfinite().all()


@every_loss
@few
@given(seed=st.integers(0, 10_000))
def test_a_sample_has_the_loss_that_it_has_alone(name, seed):
    maps = random_maps(3, 2, 20, seed=seed)
    alone = torch.cat([loss_of(name, one[None]) for one in maps])
    torch.testing.assert_close(loss_of(name, maps), alone)


@every_loss
def test_a_sample_has_no_gradient_of_another(name):
    maps = random_maps(3, 2, 20).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(name, maps)[1], maps)
    assert not gradient[[0, 2]].any()
    assert gradient[1].any()


@every_loss
@few
@given(seed=st.integers(0, 10_000))
def test_the_order_of_phrases_does_not_matter(name, seed):
    maps = random_maps(2, 2, 20, seed=seed)
    torch.testing.assert_close(loss_of(name, maps.flip(1), BOXES.flip(0)), loss_of(name, maps))


@pytest.mark.parametrize("name", sorted({*UNPLACED, *PLACED} - BLURRED))
@few
@given(seed=st.integers(0, 10_000))
def test_without_a_blur_the_order_of_tokens_does_not_matter(name, seed):
    maps = random_maps(2, 2, 20, seed=seed)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss_of(name, maps[..., order], BOXES[:, order]), loss_of(name, maps))


@pytest.mark.parametrize(
    "name", sorted(BLURRED - {"box_constraint"})
)  # its edges are not mirrored in the published code
@few
@given(seed=st.integers(0, 10_000))
def test_a_mirrored_picture_has_the_same_loss(name, seed):
    def mirrored(maps):
        return maps.unflatten(-1, GRID).flip(-1).flatten(-2)

    maps = random_maps(2, 2, 20, seed=seed)
    torch.testing.assert_close(loss_of(name, mirrored(maps), mirrored(BOXES)), loss_of(name, maps))


RANGES = {
    "attend_and_excite": (0, 1),
    "enhance": (0, 1),
    "separate": (0, 1 / 2),
    "segregation": (0, 1 / 2),
    "retention": (1, 2),
    "zest": (0, 1),
    "zest_bce": (0, math.inf),
    "local_attention": (-1, 1),
    "weakest_local": (-1, 0),
    "mask_matching": (0, 2),
    "box_coverage": (0, 1),
    "box_constraint": (0, 8),
}


@every_loss
@few
@given(seed=st.integers(0, 10_000), power=st.sampled_from([0.0, 0.2, 1.0, 5.0]))
def test_a_loss_of_two_maps_in_the_unit_interval_is_in_its_range(name, seed, power):
    loss = loss_of(name, random_maps(2, 2, 20, seed=seed) ** power)
    low, high = RANGES[name]
    assert ((loss >= low - 1e-12) & (loss <= high + 1e-12)).all()


@pytest.mark.parametrize("name", ["attend_and_excite", "enhance"])
def test_phrases_with_a_full_response_somewhere_cost_nothing(name):
    maps = torch.zeros(1, 2, 20)
    maps[0, 0, :10], maps[0, 1, 10:] = 1, 1  # two rows of the grid each, so that the blur reaches the full value
    assert loss_of(name, maps).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["separate", "segregation"])
def test_phrases_on_different_tokens_do_not_overlap(name):
    maps = torch.zeros(1, 2, 20)
    maps[0, 0, :10], maps[0, 1, 10:] = 0.7, 0.4
    assert loss_of(name, maps).item() == 0


@pytest.mark.parametrize("name", ["zest", "mask_matching", "box_coverage", "box_constraint"])
def test_phrases_in_their_places_cost_nothing(name):
    whole = (BOXES > 0.5).float()
    options = {"smoothing": None} if name == "box_constraint" else {}
    assert loss_of(name, whole[None], whole, **options).item() == pytest.approx(0, abs=1e-6)


@few
@given(strength=st.floats(0.01, 1))
def test_a_phrase_that_stays_in_its_place_is_lost_least_at_full_strength(strength):
    masks = (BOXES > 0.5).double()
    full, weaker = retention_loss(masks[None], masks), retention_loss(strength * masks[None], masks)
    torch.testing.assert_close(full, torch.ones(1, dtype=torch.float64))  # 1/2 for each of two phrases
    assert weaker.item() >= full.item() - 1e-12


@few
@given(scale=st.floats(1e-6, 1e3), seed=st.integers(0, 10_000))
def test_the_share_in_a_box_does_not_depend_on_the_scale_of_a_map(scale, seed):
    maps = random_maps(1, 2, 20, seed=seed)
    for loss in (box_coverage_loss, mask_matching_loss):
        torch.testing.assert_close(loss(scale * maps, BOXES), loss(maps, BOXES))
    torch.testing.assert_close(segregation_loss(scale * maps), segregation_loss(maps))


@every_loss
def test_descending_a_loss_lowers_it(name):
    maps = random_maps(1, 2, 20).mul(0.5).add(0.1).requires_grad_()
    losses = []
    for _ in range(3):
        loss = loss_of(name, maps)
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss.sum(), maps)
        maps = (maps - 1e-3 * normalize_gradient(gradient)).detach().requires_grad_()
    assert all(after < before for before, after in pairwise(losses))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    maps = random_maps(2, 2, 20, dtype=torch.float32).to(dtype)
    loss = loss_of(name, maps, BOXES.to(dtype))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(name, maps.float(), BOXES.to(dtype).float()))


@pytest.mark.parametrize("name", [*PLACED, "attend_and_excite"])
def test_one_phrase_needs_no_axis_of_phrases(name):
    maps = random_maps(2, 20)
    torch.testing.assert_close(loss_of(name, maps, BOXES[0]), loss_of(name, maps[:, None], BOXES[:1]))


@pytest.mark.parametrize("name", [*PLACED])
def test_samples_may_have_masks_of_their_own(name):
    maps, masks = random_maps(2, 2, 20), torch.stack([BOXES, BOXES.flip(0)])
    expected = torch.cat([loss_of(name, maps[:1], BOXES), loss_of(name, maps[1:], BOXES.flip(0))])
    torch.testing.assert_close(loss_of(name, maps, masks), expected)


@pytest.mark.parametrize("name", ["separate", "segregation"])
def test_one_phrase_cannot_be_kept_apart(name):
    with pytest.raises(aa.ArtAugError, match="two phrases or more"):
        loss_of(name, random_maps(2, 1, 20))


@every_loss
def test_maps_without_phrases_are_refused(name):
    with pytest.raises(aa.ArtAugError, match=r"\(2, 0, 20\)"):
        loss_of(name, torch.zeros(2, 0, 20))


@pytest.mark.parametrize("name", [*PLACED])
def test_masks_that_do_not_fit_are_refused(name):
    with pytest.raises(aa.ArtAugError, match=r"\(3, 20\) do not fit"):
        loss_of(name, random_maps(2, 2, 20), torch.ones(3, 20))


@pytest.mark.parametrize("name", sorted(BLURRED))
def test_maps_of_another_grid_are_refused(name):
    with pytest.raises(aa.ArtAugError, match="4 x 5"):
        loss_of(name, random_maps(2, 2, 21), torch.ones(2, 21))


@pytest.mark.parametrize("fields", [{"sigma_tokens": 0.0}, {"size": 2}, {"size": -1}])
def test_a_blur_that_cannot_be_is_refused(fields):
    with pytest.raises(aa.ArtAugError, match=next(iter(fields))):
        Smoothing(**fields)


def test_a_grid_too_small_to_be_reflected_is_refused():
    with pytest.raises(aa.ArtAugError, match="1 x 4 tokens"):
        Smoothing().blur(random_maps(2, 4), (1, 4))


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (zest_loss, {"power": 0.0}),
        (zest_loss, {"tolerance": -0.1}),
        (zest_loss, {"weights": torch.ones(3)}),
        (zest_bce_loss, {"margin": 0.5}),
        (PLACED["box_constraint"], {"fraction": 0.0}),
        (PLACED["box_constraint"], {"fraction": 0.05}),
    ],
)
def test_an_option_out_of_range_is_refused(loss, options):
    with pytest.raises(aa.ArtAugError, match="Give"):
        loss(random_maps(2, 2, 20), BOXES, **options)


def test_sharpening_is_a_softmax_over_text_tokens():
    maps = torch.tensor([[[0.03, 0.0], [0.01, 0.02]]])
    total = math.exp(3) + math.exp(1)
    expected = [[math.exp(3) / total, 1 / (1 + math.exp(2))], [math.exp(1) / total, 1 / (1 + math.exp(-2))]]
    torch.testing.assert_close(sharpen(maps), torch.tensor([expected]))


def test_the_maps_that_tell_most_are_averaged():
    flat, weak, strong = torch.full((20,), 0.5), torch.zeros(20), torch.zeros(20)
    weak[0], strong[0] = 0.2, 0.9
    maps = torch.stack([flat, weak, strong])[None, None]
    torch.testing.assert_close(select_maps(maps, count=1), strong[None, None])
    torch.testing.assert_close(select_maps(maps, count=9), maps.mean(dim=2))


@few
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), quantile=st.floats(0.5, 1))
def test_maps_are_selected_by_the_quantiles_of_torch(seed, count, quantile):
    maps = random_maps(2, 3, 5, 20, seed=seed)
    scores = torch.quantile(maps, quantile, dim=-1) * (1 - torch.quantile(maps, 1 - quantile, dim=-1))
    best = scores.argsort(dim=-1, descending=True)[..., :count]
    expected = torch.take_along_dim(maps, best[..., None], dim=2).mean(dim=2)
    torch.testing.assert_close(select_maps(maps, count=count, quantile=quantile), expected)


@few
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.01, 1))
def test_the_strongest_token_is_always_of_high_activation(seed, threshold):
    maps = random_maps(2, 3, 20, seed=seed).requires_grad_()
    masks = high_activation_masks(maps, threshold=threshold)
    assert not masks.requires_grad
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert (torch.take_along_dim(masks, maps.argmax(dim=-1, keepdim=True), dim=-1) == 1).all()


def test_a_map_of_zeros_has_no_high_activation():
    assert not high_activation_masks(torch.zeros(1, 20)).any()


def test_masks_of_regions_are_refused_where_there_are_none():
    with pytest.raises(aa.ArtAugError, match="no regions"):
        region_masks([], GRID)


@few
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e6))
def test_a_normalized_gradient_has_its_direction_and_size_one(seed, scale):
    gradient = scale * (random_maps(3, 2, 4, seed=seed) - 0.5)
    sizes = {"abs_max": lambda one: one.abs().amax(dim=(1, 2)), "norm": lambda one: one.flatten(1).norm(dim=1)}
    for by, size in sizes.items():
        found = normalize_gradient(gradient, by=by)
        torch.testing.assert_close(size(found), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(found * size(gradient)[:, None, None], gradient)


def test_the_signed_maximum_of_a_negative_gradient_turns_the_step_uphill():
    gradient = torch.tensor([[-4.0, -2.0]])
    assert torch.equal(normalize_gradient(gradient, by="signed_max"), torch.tensor([[2.0, 1.0]]))
    assert torch.equal(normalize_gradient(gradient), torch.tensor([[-1.0, -0.5]]))


@pytest.mark.parametrize("by", ["abs_max", "signed_max", "norm"])
def test_a_gradient_of_zeros_stays_zero(by):
    assert torch.equal(normalize_gradient(torch.zeros(2, 3), by=by), torch.zeros(2, 3))
