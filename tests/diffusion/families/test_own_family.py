"""A family of a user's own, for a pipeline artaug does not know: it draws, guides, trains, is estimated, exported, verified."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from torch.nn.functional import avg_pool2d

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, Family, check_family, estimate, verify_export
from artaug.lora.formats import SD15, Format, KeyMap
from artaug.pairs import ImagePair
from artaug.regional import Branches, Denoiser
from artaug.training import DifferentialLoRATrainer
from artaug.training.noise_schedule import EpsilonPrediction
from support.family_laws import picture
from support.tiny_unet import tiny_sd15

SIDE = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnDenoiser(Denoiser):
    """The denoiser as `OutputMix` and guides that move latents see it."""

    latents_name = "sample"

    def branches(self, kwargs):
        return Branches(cond=range(len(kwargs["sample"])))

    def with_prompt_embeds(self, kwargs, rows, prompts):
        embeds = torch.cat([prompt.conditioning["prompt_embeds"] for prompt in prompts])
        return {**kwargs, "sample": kwargs["sample"][list(rows)], "encoder_hidden_states": embeds}

    def broadcast_weights(self, weights):
        return weights


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnFamily(Family):
    """Stable Diffusion by a pipeline that is not registered, without guidance: only what is abstract in `Family`."""

    pipeline_class = StableDiffusionPAGPipeline

    @property
    def negative(self):
        return None

    @torch.no_grad()
    def encode_prompts(self, prompts):
        embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def token_slices(self, prompts):
        return [slice(0, self.pipeline.tokenizer.model_max_length)] * len(prompts)

    def pipeline_kwargs(self, conditioning, negative):
        return {**conditioning, "guidance_scale": 1.0, "pag_scale": 0.0}

    def denoiser(self, conditioning):
        factor = self.pipeline.vae_scale_factor
        return OwnDenoiser(module=self.module, grid=(self.height // factor, self.width // factor))

    @property
    def module(self):
        return self.pipeline.unet

    @property
    def noise_schedule(self):
        return EpsilonPrediction(beta_start=0.00085, beta_end=0.012)

    @torch.no_grad()
    def encode_images(self, images):
        pixels = self.pipeline.image_processor.preprocess(images).to(self.device, self.pipeline.vae.dtype)
        return self.pipeline.vae.encode(pixels).latent_dist.mode().float() * self.pipeline.vae.config.scaling_factor

    def encode_masks(self, masks):
        return avg_pool2d(masks.float()[:, None], self.pipeline.vae_scale_factor).expand(
            -1, self.pipeline.vae.config.latent_channels, -1, -1
        )

    def predict(self, noisy, sigmas, conditioning):
        embeds = conditioning["prompt_embeds"]
        timesteps = (sigmas * 999).round().long().to(embeds.device)
        return self.module(noisy.to(embeds), timesteps, encoder_hidden_states=embeds, return_dict=False)[0].to(noisy)


class NamedFamily(OwnFamily):
    """The same with a key map of its own, which no table of artaug holds."""

    key_map = KeyMap(name="mine", rows=SD15.rows, key_formats={Format.KOHYA: SD15.key_formats[Format.KOHYA]})


def own_pipeline():
    components = dict(tiny_sd15().components)
    return StableDiffusionPAGPipeline(**components, requires_safety_checker=False, pag_applied_layers="mid")


@pytest.fixture(scope="module")
def synthesizer():
    return DiffusersSynthesizer(pipeline=own_pipeline(), family=OwnFamily, width=SIDE, height=SIDE, steps=2)


@pytest.fixture(scope="module")
def trained(synthesizer):
    pair = ImagePair(
        prompt="a red barn",
        seed=0,
        before=picture(0, width=SIDE, height=SIDE),
        after=picture(1, width=SIDE, height=SIDE),
        plan=aa.Plan("a red barn"),
    )
    trainer = DifferentialLoRATrainer(rank=2, steps=2, batch_size=1, learning_rate=0.1)
    return trainer.train([pair], synthesizer, seed=0, progress=False).lora


def test_the_pipeline_is_none_that_artaug_knows():
    with pytest.raises(aa.ModelError, match="does not know StableDiffusionPAGPipeline"):
        DiffusersSynthesizer(pipeline=own_pipeline())


def test_it_draws_and_is_guided_as_guides_promise(synthesizer):
    check_family(synthesizer)


def test_it_trains(synthesizer, trained):
    plain, enhanced = (
        np.asarray(drawing.synthesize(aa.Plan("a red barn"), seed=0), dtype=int)
        for drawing in (synthesizer, synthesizer.with_lora(trained))
    )
    assert abs(enhanced - plain).max() > 0


@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "configs alone"])
def test_it_is_estimated(synthesizer, tmp_path, is_loaded):
    source = synthesizer.pipeline
    if not is_loaded:
        synthesizer.pipeline.save_pretrained(tmp_path)
        for file in tmp_path.rglob("*"):
            if file.is_file() and "config" not in file.name and file.name != "model_index.json":
                file.unlink()
        source = tmp_path
    with pytest.raises(aa.ModelError, match="StableDiffusionPAGPipeline"):
        estimate(source, width=SIDE, height=SIDE)
    found = estimate(source, family=OwnFamily, width=SIDE, height=SIDE)
    assert found.trainable_parameters > 0
    assert found.activations_bytes > 0


def test_it_is_exported_and_read_by_its_own_pipelines_loader(trained, tmp_path):
    path = trained.save(tmp_path / "lora.safetensors")
    assert verify_export(path, trained, family=OwnFamily).readers[2] == "StableDiffusionPAGPipeline"


def test_its_key_map_names_the_layers_of_other_formats(trained, tmp_path):
    path = trained.save(tmp_path / "lora.safetensors", format=Format.KOHYA, key_map=NamedFamily.key_map)
    verification = verify_export(path, trained, family=NamedFamily)
    assert verification.format is Format.KOHYA
    assert verification.readers[2] == "StableDiffusionPAGPipeline"


def test_a_pipeline_class_that_loads_no_loras_is_refused(trained, tmp_path):
    class Unloadable(OwnFamily):
        pipeline_class = object

    with pytest.raises(aa.ModelError, match="object loads no LoRAs"):
        verify_export(trained.save(tmp_path / "lora.safetensors"), trained, family=Unloadable)
