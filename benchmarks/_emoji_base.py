"""A tiny FLUX that draws emoji flat: built from configs, trained by flow matching, and resumed where it was stopped."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from benchmarks._emoji_codec import CHANNELS, PATCH, PatchComponents
from benchmarks._emoji_packages import SIDE

MAX_SEQUENCE_LENGTH = 10
"""Tokens of a caption, the end token included; the longest name has eight words."""
_PAD, _END, _UNKNOWN, _START = "<pad>", "</s>", "<unk>", "<s>"
_TEXT_WIDTH, _TEXT_HEADS, _POOLED, _HEAD_WIDTH = 96, 4, 64, 32
_GRID = SIDE // (2 * PATCH)
"""Image tokens a side."""
_SAVE_EVERY = 50
_logger = logging.getLogger("emoji")


@dataclass(frozen=True, kw_only=True)
class BaseSize:
    """How large the base is, and how long it is trained."""

    heads: int = 4
    """Of 32 channels each."""
    steps: int = 6000
    batch_size: int = 32
    peak_rate: float = 1.5e-3


def train_base(
    names: Sequence[str], pictures: Tensor, codec: PatchComponents, folder: Path, *, size: BaseSize
) -> FluxPipeline:
    """Train on captioned pictures, continuing from the last checkpoint, and return the pipeline with averaged weights.

    Args:
        names: captions.
        pictures: of them, RGB in [0, 1].
        codec: the autoencoder.
        folder: holds ``checkpoint.pt``.
        size: how large, and how long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pipeline = new_pipeline(codec, names, heads=size.heads)
    trained = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = [parameter.detach().clone() for parameter in trained.parameters()]
    first = _resume(folder, trained, optimizer, average)
    latents = _pack(codec, pictures)
    words, pooled = _tokenize(pipeline, names)
    start, smooth = time.monotonic(), 2.0
    for step in range(first, size.steps):
        generator = torch.Generator().manual_seed(step)  # a run that was resumed draws the same
        rows = torch.randint(len(names), (size.batch_size,), generator=generator)
        rate = size.peak_rate * min(1, (step + 1) / 200, (size.steps - step) / (0.4 * size.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _flow_loss(pipeline, latents[rows], words[rows], pooled[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in trained.parameters()], 1 - min(0.998, step / (step + 10)))
        smooth += 0.02 * (float(loss.detach()) - smooth)
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == size.steps:
            _save(folder, step + 1, trained, optimizer, average)
            _logger.info("step %d, loss %.4f, %.0f s", step + 1, smooth, time.monotonic() - start)
    _load(trained, average)
    trained.eval()
    return pipeline


def new_pipeline(codec: PatchComponents, names: Sequence[str], *, heads: int) -> FluxPipeline:
    """The real classes at about one five-thousandth of FLUX's size, untrained; a token is a word of the names."""
    tokenizer, tokenizer_2 = _tokenizer(names, has_start_token=True), _tokenizer(names, has_start_token=False)
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=_HEAD_WIDTH,
        num_attention_heads=heads,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_POOLED,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("linear") or name == "proj_out"):
            nn.init.zeros_(module.weight)  # adaLN-Zero (Peebles and Xie 2023)
            nn.init.zeros_(module.bias)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=codec,
        text_encoder=_clip(len(tokenizer), end=tokenizer.eos_token_id),
        tokenizer=tokenizer,
        text_encoder_2=_t5(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def _flow_loss(
    pipeline: FluxPipeline, latents: Tensor, words: Tensor, pooled: Tensor, generator: torch.Generator
) -> Tensor:
    """The mean squared error of the velocity, noise minus latents, at sigmas of a logit-normal distribution."""
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.sigmoid(0.5 + 1.1 * torch.randn(len(latents), generator=generator))
    velocity: Tensor = pipeline.transformer(
        hidden_states=latents + sigma[:, None, None] * (noise - latents),
        encoder_hidden_states=pipeline.text_encoder_2(words)[0],
        pooled_projections=pipeline.text_encoder(pooled).pooler_output,
        timestep=sigma,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, _GRID, _GRID, "cpu", torch.float32),  # noqa: SLF001
        txt_ids=torch.zeros(words.shape[1], 3),
        return_dict=False,
    )[0]
    return (velocity - (noise - latents)).square().mean()


def _pack(codec: PatchComponents, pictures: Tensor) -> Tensor:
    latents = codec.encode(pictures * 2 - 1).latent_dist.mode() * codec.config.scaling_factor
    packed: Tensor = FluxPipeline._pack_latents(latents, len(latents), *latents.shape[1:])  # noqa: SLF001
    return packed


def _tokenize(pipeline: FluxPipeline, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token numbers for the word encoder and for the pooled one, as the pipeline makes them."""
    words = pipeline.tokenizer_2(
        list(names), padding="max_length", max_length=MAX_SEQUENCE_LENGTH, truncation=True, return_tensors="pt"
    )
    pooled = pipeline.tokenizer(
        list(names),
        padding="max_length",
        max_length=pipeline.tokenizer_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return words.input_ids, pooled.input_ids


def _tokenizer(names: Sequence[str], *, has_start_token: bool) -> PreTrainedTokenizerFast:
    words = dict.fromkeys([_PAD, _END, _UNKNOWN, _START, *sorted({word for name in names for word in name.split()})])
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = f"{_START} $A {_END}" if has_start_token else f"$A {_END}"
    special = [(token, backend.token_to_id(token)) for token in (_START, _END)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_START,
        eos_token=_END,
        unk_token=_UNKNOWN,
        pad_token=_PAD,
        model_max_length=MAX_SEQUENCE_LENGTH + has_start_token,
    )


def _clip(vocabulary: int, *, end: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=_POOLED,
            intermediate_size=2 * _POOLED,
            num_hidden_layers=2,
            num_attention_heads=_TEXT_HEADS,
            max_position_embeddings=MAX_SEQUENCE_LENGTH + 1,
            projection_dim=_POOLED,
            eos_token_id=end,
            bos_token_id=None,
            pad_token_id=0,
        )
    )


def _t5(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=_TEXT_WIDTH,
            d_kv=_TEXT_WIDTH // _TEXT_HEADS,
            d_ff=2 * _TEXT_WIDTH,
            num_layers=2,
            num_heads=_TEXT_HEADS,
            dropout_rate=0.0,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=32,
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def _save(
    folder: Path, step: int, trained: nn.Module, optimizer: torch.optim.Optimizer, average: Sequence[Tensor]
) -> None:
    values = [parameter.detach() for parameter in trained.parameters()]
    state = {"step": step, "values": values, "optimizer": optimizer.state_dict(), "average": list(average)}
    torch.save(state, folder / "checkpoint.new")
    (folder / "checkpoint.new").replace(folder / "checkpoint.pt")


@torch.no_grad()
def _resume(folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> int:
    if not (folder / "checkpoint.pt").exists():
        return 0
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    _load(trained, state["values"])
    optimizer.load_state_dict(state["optimizer"])
    average[:] = state["average"]
    return int(state["step"])


@torch.no_grad()
def _load(trained: nn.Module, values: Iterable[Tensor]) -> None:
    for parameter, value in zip(trained.parameters(), values, strict=True):
        parameter.copy_(value)
