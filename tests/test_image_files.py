"""Pictures on disk by reference: exact, named by content, never trusted for their name alone, written together."""

import errno
import os
import pickle
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug._internal import files
from artaug.image_files import image_digest

MODES = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr", "1", "I;16", "HSV", "LAB")
BYTES_PER_PIXEL = {"RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4, "YCbCr": 3, "I;16": 2, "HSV": 3, "LAB": 3}


@st.composite
def pictures(draw):
    """Noise of any 8-bit mode and any small size."""
    mode, width, height = draw(st.sampled_from(MODES)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    stride = (width + 7) // 8 if mode == "1" else width * BYTES_PER_PIXEL.get(mode, 1)
    return Image.frombytes(mode, (width, height), draw(st.randoms(use_true_random=False)).randbytes(stride * height))


def noise(seed, size=(16, 12)):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def as_seen(image):
    """The pixels of a picture by PIL alone: over white where it is transparent."""
    if image.mode == "LA" or image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


@given(pictures())
def test_a_stored_picture_comes_back_to_the_pixel(tmp_path_factory, picture):
    folder = aa.ImageFolder(tmp_path_factory.mktemp("images"))
    file = folder.add(picture)
    loaded = file.load()
    assert (loaded.mode, loaded.size, loaded.info) == ("RGB", picture.size, {})
    if picture.mode not in {"LAB", "I;16"}:  # which PIL converts by a profile, or clips
        assert loaded.tobytes() == as_seen(picture).tobytes()
    assert file == folder.get(image_digest(picture)) == folder.get(file.digest, size=picture.size)
    assert image_digest(loaded) == file.digest


def test_a_picture_larger_than_webp_allows_is_a_png(tmp_path):
    folder = aa.ImageFolder(tmp_path)
    for size, suffix in (((16_383, 1), ".webp"), ((16_384, 1), ".png"), ((1, 16_384), ".png")):
        file = folder.add(noise(1, size))
        assert file.path.suffix == suffix
        assert file.load().tobytes() == noise(1, size).tobytes()
        assert folder.get(file.digest) == file


def test_a_file_is_named_by_its_pixels_and_stored_once(tmp_path):
    picture = noise(1)
    first, second, third = aa.ImageFolder(tmp_path).add_all([picture, picture, picture.copy()])
    assert first == second == third
    assert first.path == tmp_path / first.digest[:2] / f"{first.digest}.webp"
    before = first.path.stat().st_mtime_ns
    assert aa.ImageFolder(tmp_path).add(picture.convert("RGBA")) == first
    assert first.path.stat().st_mtime_ns == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [first.path]


def test_the_files_of_a_folder_are_not_read_again_to_be_added(tmp_path):
    folder = aa.ImageFolder(tmp_path / "one")
    file = folder.add(noise(1))
    file.path.write_bytes(b"not read")
    assert folder.add(file) is file
    with pytest.raises(aa.StorageError):
        aa.ImageFolder(tmp_path / "two").add(file)


def test_a_file_of_another_folder_is_copied_by_content(tmp_path):
    file = aa.ImageFolder(tmp_path / "one").add(noise(1))
    copied = aa.ImageFolder(tmp_path / "two").add(file)
    assert (copied.digest, copied.path.read_bytes()) == (file.digest, file.path.read_bytes())


@pytest.mark.parametrize("keep", [0, 1, 30, -1])
def test_a_damaged_file_is_refused_by_name_and_made_whole_by_the_next_add(tmp_path, keep):
    folder = aa.ImageFolder(tmp_path)
    file = folder.add(noise(1))
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:keep])
    with pytest.raises(aa.StorageError, match=rf"{file.digest}\.webp cannot be used: .* Put back a copy"):
        file.load()
    assert folder.add(noise(1)) == file
    assert file.path.read_bytes() == whole


def test_a_missing_file_and_one_with_other_pixels_are_refused_by_name(tmp_path):
    folder = aa.ImageFolder(tmp_path)
    file, other = folder.add_all([noise(1), noise(2)])
    file.path.write_bytes(other.path.read_bytes())
    with pytest.raises(aa.StorageError, match="it holds another picture than the one that was stored in it"):
        file.load()
    file.path.unlink()
    for read in (file.load, lambda: folder.get(file.digest), lambda: aa.ImageFile.open(file.path)):
        with pytest.raises(aa.StorageError, match="there is no such file"):
            read()


def test_a_picture_of_another_program_is_read_by_its_header_and_has_no_digest(tmp_path):
    noise(1).save(tmp_path / "one.png")
    file = aa.ImageFile.open(tmp_path / "one.png")
    assert (file.size, file.digest) == ((16, 12), None)
    assert image_digest(file) == image_digest(Image.open(tmp_path / "one.png"))
    noise(1, (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(aa.StorageError, match="another picture"):
        file.load()


def test_a_file_is_small_to_send_and_to_print(tmp_path):
    file = aa.ImageFolder(tmp_path).add(noise(1, (256, 256)))
    assert len(pickle.dumps(file)) < 600
    assert pickle.loads(pickle.dumps(file)) == file
    assert len({file, pickle.loads(pickle.dumps(file))}) == 1
    assert repr(file).endswith(".webp', 256 x 256 pixels)")
    assert len(repr(aa.ImageFile(tmp_path / ("a" * 200), None, (1, 1)))) < 120


def test_a_batch_is_flushed_before_any_of_it_is_placed_and_each_folder_once(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files, "sync_file", lambda _path: events.append("file"))
    monkeypatch.setattr(files, "sync_folder", events.append)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    stored = aa.ImageFolder(tmp_path).add_all([noise(seed) for seed in range(6)])
    assert events[:12] == ["file"] * 6 + ["replace"] * 6
    assert sorted(events[12:]) == sorted({tmp_path, *(file.path.parent for file in stored)})


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
def test_a_full_disk_leaves_no_picture_of_the_batch_and_names_the_folder(tmp_path, monkeypatch):
    def full(_path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync_file", full)
    with pytest.raises(aa.StorageError, match=r"a picture in .* could not be written: .*No space left.* Make room"):
        aa.ImageFolder(tmp_path).add_all([noise(1), noise(2)])
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("value", [None, "a.png", b""])
def test_what_is_no_picture_is_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(aa.InvalidValueError, match=r"ImageFolder\.add_all\(images\[1\]="):
        aa.ImageFolder(tmp_path / "images").add_all([noise(1), value])
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("digest", ["", "../../secret", "AB" * 32])
def test_what_is_no_digest_leads_to_no_path(tmp_path, digest):
    with pytest.raises(aa.InvalidValueError, match="expected 64 hexadecimal digits"):
        aa.ImageFolder(tmp_path).get(digest, size=(1, 1))
