"""The emoji: packages as npm packs them, an autoencoder that is linear, a base that resumes, and a fair exam."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks import _emoji_arms as arms
from benchmarks import _emoji_packages as packages
from benchmarks import emoji
from benchmarks._emoji_base import BaseSize, train_base
from benchmarks._emoji_codec import CHANNELS, PatchComponents
from benchmarks._emoji_exam import Exam

import artaug as aa
from support.emoji_packages import SHAPES, write_package, write_packages

TINY = arms.Settings(
    test_names=2,
    tuning_names=2,
    sizes=(1,),
    seeds=(0,),
    passes=96,
    scales=(1.0,),
    draw_steps=1,
    base=BaseSize(steps=2, heads=1, batch_size=2),
    with_google=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with stand-ins for the packages."""
    where = tmp_path_factory.mktemp("emoji")
    write_packages(where / "packages")
    return where


@pytest.fixture(scope="module")
def pictures(folder):
    return packages.load_pictures(folder / "packages")


def test_subjects_are_matched_by_their_characters_whatever_the_variation_selector(pictures):
    assert sorted(pictures.names) == sorted([*(name.replace("-", " ") for name in SHAPES), "right half"])
    assert pictures.flat.shape == pictures.solid.shape == (5, 3, packages.SIDE, packages.SIDE)


def test_a_flat_picture_is_what_its_svg_says(pictures):
    square = pictures.names.index("blue square")
    inside, outside = pictures.flat[square, :, 32, 32], pictures.flat[square, :, 1, 1]

    assert inside.tolist() == pytest.approx([0, 0x74 / 255, 0xBA / 255], abs=0.01)
    assert outside.tolist() == pytest.approx([packages.BACKGROUND] * 3, abs=0.01)
    covered = (pictures.flat[square] - packages.BACKGROUND).abs().amax(0) > 0.4
    assert float(covered.float().mean()) == pytest.approx((28 / 32) ** 2, abs=0.01)


def test_an_alias_is_its_parent_turned_over(pictures):
    left, right = (pictures.flat[pictures.names.index(name)] for name in ("left half", "right half"))

    assert torch.allclose(left.flip(2), right, atol=0.01)
    assert not torch.allclose(left, right, atol=0.1)


@pytest.mark.parametrize(("turns", "corner"), [(0, (0, 0)), (1, (0, -1)), (2, (-1, -1)), (3, (-1, 0))])
def test_an_alias_is_rotated_clockwise(turns, corner):
    icons = {
        "prefix": "test",
        "width": 16,
        "height": 16,
        "icons": {"corner": {"body": '<path d="M0 0h8v8H0z"/>'}},
        "aliases": {"turned": {"parent": "corner", "rotate": turns}},
    }

    alpha = packages.draw_icon(icons, "turned").getchannel("A").resize((4, 4))

    size = (alpha.width, alpha.height)
    opaque = {(x, y) for x in range(size[0]) for y in range(size[1]) if alpha.getpixel((x, y)) > 128}
    assert (corner[1] % 4, corner[0] % 4) in opaque
    assert len(opaque) == 4


def test_google_has_pictures_and_no_sheets(folder):
    assert packages.load_google(folder / "packages").shape == (len(SHAPES), 3, packages.SIDE, packages.SIDE)


def test_an_archive_of_another_version_is_refused(tmp_path):
    write_package(tmp_path, packages.FLAT, {}, version="0.0.1")

    with pytest.raises(
        packages.PackageError, match=r"holds @iconify-json/fluent-emoji-flat 0\.0\.1, expected .* 1\.2\.6"
    ):
        packages.fetch(tmp_path, packages.FLAT)


def test_without_npm_the_error_says_what_to_copy_where(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(packages.PackageError, match=r"npm is missing.*lobehub-fluent-emoji-3d-1\.1\.0\.tgz"):
        packages.fetch(tmp_path, packages.SOLID)


def test_what_npm_says_when_it_fails_is_passed_on(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such registry')\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(packages.PackageError, match=r"could not fetch .*no such registry"):
        packages.fetch(tmp_path / "cache", packages.SOLID)


def test_the_autoencoder_is_the_best_linear_one_of_its_size():
    drawn = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    codec = PatchComponents.fit(drawn)
    blocks = (drawn * 2 - 1).reshape(8, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(512, 192)
    centered = blocks - blocks.mean(0)
    _, _, axes = torch.linalg.svd(centered, full_matrices=False)
    best = (centered - centered @ axes[:CHANNELS].T @ axes[:CHANNELS]).square().mean()

    latents = codec.encode(drawn * 2 - 1).latent_dist.mode()
    (decoded,) = codec.decode(latents, return_dict=False)

    assert float((decoded - (drawn * 2 - 1)).square().mean()) == pytest.approx(float(best), rel=1e-4)
    assert float((latents * codec.config.scaling_factor).square().mean()) == pytest.approx(1, rel=1e-3)


def test_a_base_that_was_stopped_ends_as_one_that_was_not(pictures, tmp_path, monkeypatch):
    codec = PatchComponents.fit(torch.cat([pictures.flat, pictures.solid]))
    monkeypatch.setattr("benchmarks._emoji_base._SAVE_EVERY", 2)

    def stop(*_):
        raise KeyboardInterrupt

    ended = train_base(pictures.names, pictures.flat, codec, tmp_path / "at once", size=replace(TINY.base, steps=4))
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks._emoji_base._logger.info", stop)  # right after the checkpoint of step 2
        with pytest.raises(KeyboardInterrupt):
            train_base(pictures.names, pictures.flat, codec, tmp_path / "twice", size=replace(TINY.base, steps=4))
    resumed = train_base(pictures.names, pictures.flat, codec, tmp_path / "twice", size=replace(TINY.base, steps=4))

    for one, other in zip(ended.transformer.parameters(), resumed.transformer.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def exam(pictures):
    return Exam(flat=pictures.flat, solid=pictures.solid, base=pictures.flat, candidates=pictures.flat, features={})


def test_the_base_has_gone_no_way_and_the_true_picture_all_of_it(exam):
    base, truth, half = (exam.row(drawn) for drawn in (exam.base, exam.solid, (exam.flat + exam.solid) / 2))

    assert (base["progress"], base["beside"], base["distance"], base["subject"]) == pytest.approx((0, 0, 1, 1))
    assert (truth["progress"], truth["beside"], truth["distance"]) == pytest.approx((1, 0, 0), abs=1e-6)
    assert (half["progress"], half["beside"], half["distance"]) == pytest.approx((0.5, 0, 0.5), abs=1e-6)
    assert (base["nearer_3d"], truth["nearer_3d"]) == (0, 1)


def test_a_picture_of_another_subject_is_not_recognized(exam):
    assert exam.row(exam.flat.roll(1, 0))["subject"] == 0


def test_a_judge_of_features_is_asked_too(exam):
    row = replace(exam, features={"mean": lambda drawn: drawn.mean((2, 3))}).row(exam.solid)

    assert row["mean_progress"] == pytest.approx(1, abs=1e-4)
    assert "mean_subject" in row


def test_arms_have_equal_passes():
    steps = {name: emoji.Settings().steps(arm) * arm.passes for name, arm in arms.ARMS.items()}

    assert max(steps.values()) <= 1.03 * min(steps.values())


@pytest.mark.parametrize("name", arms.ARMS)
def test_a_step_of_an_arm_costs_the_passes_that_it_says(name, pictures, folder):
    bench, _ = emoji.prepare(folder, folder / "packages", TINY)
    passes = []
    hook = bench.base.pipeline.transformer.register_forward_pre_hook(
        lambda _, __, given: passes.append(len(given["hidden_states"]) * (3 if torch.is_grad_enabled() else 1)),
        with_kwargs=True,
    )

    arm = arms.ARMS[name]
    trainer = aa.DifferentialLoRATrainer(objective=arm.objective, echo=1, rank=2, steps=4, batch_size=1)
    pair = aa.ImagePair(
        prompt="red circle", before=packages.to_image(pictures.flat[0]), after=packages.to_image(pictures.solid[0])
    )
    trainer.train([pair], bench.base, seed=0, progress=False)
    hook.remove()

    assert sum(passes) == 4 * arm.passes


def test_no_3d_picture_of_a_tested_or_paired_name_is_seen_before_the_pairs(pictures, folder, monkeypatch):
    seen = []

    def stop(drawn):
        seen.append(drawn)
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji.PatchComponents, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        emoji.prepare(folder, folder / "packages", TINY)

    known = pictures.solid[: TINY.subjects]
    assert not any(torch.equal(one, other) for one in known for other in seen[0])


def test_what_was_drawn_is_not_drawn_again(folder, monkeypatch):
    two = {name: replace(arms.ARMS[name], learning_rates=(1e-3,)) for name in ("PairedDifference", "NegativeAware")}
    monkeypatch.setattr(emoji, "ARMS", two)
    bench, codec = emoji.prepare(folder, folder / "packages", TINY)

    rows = list(emoji.measure(bench, codec, {}))
    again = list(emoji.measure(replace(bench, base=None), codec, {}))

    assert json.dumps(rows) == json.dumps(again)
    trained = [row for row in rows if "pairs" in row and not row["tuning"]]
    assert {(row["arm"], row["pairs"]) for row in trained} == {(name, 1) for name in two}
    assert emoji.plot(rows).axes
    sheet = emoji.contact_sheet(bench, emoji.cells_to_show(rows))
    assert len(sheet.axes) == (3 + len(two)) * TINY.test_names
