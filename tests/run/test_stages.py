"""Where the pictures of a run without a store are held: in memory up to a budget, else in a folder that goes with them."""

import gc
import os
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from artaug.image_files import ImageFile
from artaug.run.storage.memory import PictureMemory


def picture(number):
    return Image.new("RGB", (10, 10), (number, 0, 0))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@given(st.integers(0, 12), st.integers(0, 8))
def test_pictures_are_in_memory_up_to_the_budget_and_all_are_as_they_were(count, room):
    memory = PictureMemory(budget=room * 400)
    pictures = [picture(number) for number in range(count)]
    kept = [memory.keep(image) for image in pictures]
    assert [isinstance(image, ImageFile) for image in kept] == [number >= room for number in range(count)]
    shown = [image.load() if isinstance(image, ImageFile) else image for image in kept]
    assert [image.tobytes() for image in shown] == [image.tobytes() for image in pictures]


def test_a_picture_that_is_kept_twice_counts_once_and_one_that_is_gone_no_more():
    memory, first, second = PictureMemory(budget=800), picture(1), picture(2)
    assert [memory.keep(image) for image in (first, first, second, second)] == [first, first, second, second]
    del first
    gc.collect()
    third = picture(3)
    assert memory.keep(third) is third
    assert isinstance(memory.keep(picture(4)), ImageFile)


def test_the_folder_goes_with_the_last_picture_in_it_and_without_a_warning(folders):
    memory = PictureMemory(budget=0)
    kept = [memory.keep(picture(number)) for number in range(3)]
    del memory
    gc.collect()
    assert [file.load().getpixel((0, 0)) for file in kept] == [(number, 0, 0) for number in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.clear()
        gc.collect()
    assert list(Path(folders).iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_that_ends_leaves_the_folder_to_its_parent(folders):
    kept = [PictureMemory(budget=0).keep(picture(5))]
    pid = os.fork()
    if pid == 0:
        kept.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(pid, 0)
    assert folders.exists()
    assert kept[0].load().getpixel((0, 0)) == (5, 0, 0)
