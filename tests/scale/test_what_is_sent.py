"""What goes to workers and comes back: pictures of every mode, references that are released, errors in words."""

import gc
import pickle
import threading
import time

import pytest
import ray
import torch
from PIL import Image

import artaug as aa
from artaug._internal.images import as_rgb
from artaug.lora import LowRank
from artaug.scale.payloads import Payload, dumps, loads
from artaug.scale.pictures import Pixels
from artaug.testing import SwatchSynthesizer

pytestmark = pytest.mark.loopback
PICTURE = SwatchSynthesizer().synthesize(aa.Plan("a"), seed=0)


def transparent(mode):
    picture = Image.new(mode, (4, 4), 0)
    picture.putpixel((0, 0), 1)
    picture.info["transparency"] = 0
    return picture


MODES = {
    **{mode: PICTURE.convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "1", "CMYK", "YCbCr", "HSV", "LAB")},
    "P": PICTURE.quantize(8),
    "PA": PICTURE.quantize(8).convert("PA"),
    "I;16": Image.new("I;16", (4, 4), 40_000),
    "La": PICTURE.convert("LA").convert("La"),
    "RGBa": PICTURE.convert("RGBA").convert("RGBa"),
    "P, one color transparent": transparent("P"),
    "L, one color transparent": transparent("L"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_the_same_after_it_was_sent(mode):
    sent = loads(dumps(Pixels.of(MODES[mode]), what="a picture")).load()
    assert as_rgb(sent).tobytes() == as_rgb(MODES[mode]).tobytes()


def test_the_picture_of_a_canvas_is_sent_as_pixels(tmp_path):
    key = b"hf_" + b"a" * 34 + bytes(11)
    on_disk = aa.ImageFolder(tmp_path).add(PICTURE)
    canvas = aa.Canvas(Image.frombytes("RGB", (4, 4), key), strength=0.5, references=[on_disk])
    payload = dumps(aa.Plan("a", canvas=canvas), what="a plan")
    received = loads(payload)
    assert received == aa.Plan("a", canvas=canvas)
    assert received.canvas.pictures[1] == on_disk
    assert [type(attached) for attached in payload.attachments] == [Pixels]


def test_pixels_that_look_like_a_key_are_pixels():
    text = b"Bearer sk-" + b"0123456789abcdef" * 2
    picture = Image.frombytes("RGB", (len(text) // 3, 1), text[: len(text) // 3 * 3])
    payload = dumps([Pixels.of(picture), "a wall"], what="a call")
    assert loads(payload)[0].load().tobytes() == picture.tobytes()
    with pytest.raises(aa.InvalidValueError, match="looks like a key"):
        dumps(text, what="a call")


def test_a_payload_is_pickled_by_ray_without_what_is_attached_to_it_twice():
    pixels = Pixels.of(Image.new("RGB", (256, 256)))
    payload = dumps([pixels, pixels], what="a call")
    assert len(payload.data) < 500
    assert len(pickle.dumps(payload)) < 1.1 * len(pixels.data)
    assert isinstance(payload, Payload)


def held():
    """The references that this process keeps alive."""
    return set(ray._private.worker.global_worker.core_worker.get_all_reference_counts())  # noqa: SLF001 - no public way


def test_a_lora_that_nobody_draws_with_any_more_is_released(two_playgrounds):
    name, shape = two_playgrounds.use(one_layer, on_report=print)
    lora = aa.LoRA({name: LowRank(torch.zeros(2, shape[1]), torch.zeros(shape[0], 2))})
    before = held()
    tuned = two_playgrounds.with_lora(lora)
    assert tuned.synthesize(aa.Plan("a"), seed=0) == two_playgrounds.synthesize(aa.Plan("a"), seed=0)
    assert len(held() - before) == 1
    del tuned
    for _ in range(100):
        gc.collect()
        if not held() - before:
            return
        time.sleep(0.05)
    pytest.fail("it is kept")


def one_layer(synthesizer, report):  # noqa: ARG001 - as workers call it
    with synthesizer.training() as model:
        modules = dict(model.module.named_modules())
    return next((name, tuple(module.weight.shape)) for name, module in modules.items() if name.endswith("to_q"))


def test_a_result_that_cannot_be_sent_back_says_so(cluster):
    synthesizer = cluster.synthesizer(SwatchSynthesizer)
    with pytest.raises(aa.ClusterError, match=r"synthesizer: TypeError: cannot pickle '_thread.lock' object"):
        synthesizer.use(no_pickle, on_report=print)


def no_pickle(synthesizer, report):  # noqa: ARG001 - as workers call it
    return threading.Lock()


def test_a_file_is_sent_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = aa.ImageFolder("pictures")
    file = folder.add(PICTURE)
    sent_folder, sent_file = loads(dumps((folder, file), what="a call"))
    monkeypatch.chdir(tmp_path.parent)
    assert sent_file.load().tobytes() == PICTURE.tobytes()
    assert sent_folder.path == tmp_path / "pictures"
