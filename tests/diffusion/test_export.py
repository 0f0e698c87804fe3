"""Every family from training to another's hands: two steps, a file in every format it has, diffusers draws the same."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from artaug.diffusion import DiffusersSynthesizer, verify_export
from artaug.lora.formats import FLUX1, FLUX2, QWEN_IMAGE, SD3, SD15, SDXL, Z_IMAGE, Format, KeyMap
from artaug.lora.formats.programs import DIFFUSERS
from artaug.lora.lora import LoRA, LowRank
from artaug.pairs import ImagePair
from artaug.plan import Plan
from artaug.training import DifferentialLoRATrainer
from support.family_laws import LIMIT, picture
from support.tiny_flux import tiny_flux
from support.tiny_flux2 import tiny_flux2, tiny_flux2_klein
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl
from support.tiny_z_image import tiny_z_image

SIDE = 32
PROMPT = "a red barn"
MOST = 2
"""Grey levels of 255 by which pictures may differ: PEFT multiplies in another order."""


def sdxl_of_two_layers_a_block():
    """Names of the original U-Net count its layers, and published ones have two a block."""
    pipeline = tiny_sdxl()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, layers_per_block=2).eval()
    return pipeline


FAMILIES = {
    "FLUX.1": (FLUX1, tiny_flux),
    "FLUX.2": (FLUX2, tiny_flux2),
    "FLUX.2 klein": (FLUX2, tiny_flux2_klein),
    "Stable Diffusion 3.5": (SD3, lambda: tiny_sd3(is_35=True)),
    "SDXL": (SDXL, sdxl_of_two_layers_a_block),
    "Stable Diffusion 1.5": (SD15, tiny_sd15),
    "Qwen-Image": (QWEN_IMAGE, tiny_qwen_image),
    "Z-Image": (Z_IMAGE, tiny_z_image),
}
EXPORTS = [
    (family, kind)
    for family, (key_map, _) in FAMILIES.items()
    for kind in key_map.key_formats
    if not DIFFUSERS.dropped(key_map, kind)
]


@dataclass(frozen=True, eq=False)
class Trained:
    key_map: KeyMap
    synthesizer: DiffusersSynthesizer
    lora: LoRA

    @property
    def pipeline(self):
        return self.synthesizer.pipeline

    def draw(self, lora=None):
        synthesizer = self.synthesizer if lora is None else self.synthesizer.with_lora(lora)
        return np.asarray(synthesizer.synthesize(Plan(PROMPT), seed=0), dtype=int)


@pytest.fixture(scope="module")
def trained_of():
    """Each family's tiny model, trained once for the module."""
    trained_families = {}

    def trained(family):
        if family not in trained_families:
            key_map, build = FAMILIES[family]
            length = None if key_map in {SDXL, SD15} else LIMIT
            synthesizer = DiffusersSynthesizer(
                pipeline=build(), width=SIDE, height=SIDE, steps=2, max_sequence_length=length
            )
            sides = {"width": SIDE, "height": SIDE}
            pair = ImagePair(
                prompt=PROMPT, seed=0, before=picture(0, **sides), after=picture(1, **sides), plan=Plan(PROMPT)
            )
            trainer = DifferentialLoRATrainer(rank=2, steps=2, batch_size=1, learning_rate=0.3)
            trained_families[family] = Trained(
                key_map, synthesizer, trainer.train([pair], synthesizer, seed=0, progress=False).lora
            )
        return trained_families[family]

    return trained


def exportable_lora(trained, kind):
    """What the format can carry of a tiny model: diffusers knows the width of FLUX.1's single blocks by heart."""
    if trained.key_map is not FLUX1 or kind is Format.PEFT:
        return trained.lora
    return LoRA({name: one for name, one in trained.lora.layers.items() if name.startswith("transformer_blocks.")})


def assert_diffusers_draws_the_same(folder, trained, lora, kind):
    path = lora.save(folder / "lora.safetensors", format=kind, key_map=trained.key_map)
    assert verify_export(path, lora, pipeline=trained.pipeline, key_map=trained.key_map).worst[1] < 1e-6
    plain, expected = trained.draw(), trained.draw(lora)
    trained.pipeline.load_lora_weights(path)
    try:
        found = trained.draw()
    finally:
        trained.pipeline.unload_lora_weights()
    assert abs(expected - plain).max() > 5 * MOST
    assert abs(found - expected).max() <= MOST


@pytest.mark.parametrize(("family", "kind"), EXPORTS, ids=str)
def test_a_trained_lora_is_exported_verified_and_drawn_the_same_by_diffusers(tmp_path, trained_of, family, kind):
    trained = trained_of(family)
    assert_diffusers_draws_the_same(tmp_path, trained, exportable_lora(trained, kind), kind)


@pytest.mark.parametrize("family", [one for one in FAMILIES if FAMILIES[one][0] in {SDXL, SD15}])
@pytest.mark.parametrize("kind", [Format.PEFT, Format.KOHYA])
def test_convolutions_are_exported_verified_and_drawn_the_same_by_diffusers(tmp_path, trained_of, family, kind):
    trained = trained_of(family)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, one in trained.pipeline.unet.named_modules():
        if isinstance(one, torch.nn.Conv2d) and trained.key_map.match(name):
            outputs, *rest = one.weight.shape
            down = 0.2 * torch.randn(2, *rest, generator=generator)
            layers[name] = LowRank(down, 0.2 * torch.randn(outputs, 2, generator=generator))
    assert len(layers) > 20
    assert_diffusers_draws_the_same(tmp_path, trained, LoRA(layers), kind)
