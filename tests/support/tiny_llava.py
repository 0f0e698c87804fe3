"""Real vision-language models that reply in milliseconds: random weights from configs, no torchvision."""

import functools
import json
from collections.abc import Sequence
from importlib import resources

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Tokenizer,
)

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
_VOCAB_SIZE = 700

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llava(*, fixed_reply: str | Sequence[str] | None = None, seed: int = 0):
    """A LLaVA and its processor; with ``fixed_reply``, every reply is that text, whatever the picture.

    As a sequence it is that many tokens, all different, as constrained decoding reads them one after the other.
    """
    pieces = [fixed_reply] if isinstance(fixed_reply, str) else fixed_reply
    tokenizer = _tokenizer(special_tokens=_SPECIAL, added=pieces or ())
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model = _build(LlavaForConditionalGeneration, config, seed)
    if pieces is not None:
        _set_reply(model, tokenizer, pieces)
    return model, processor


def tiny_idefics3(*, seed: int = 0):
    """An Idefics3 (as SmolVLM is one) and its processor."""
    tokenizer = _tokenizer(
        special_tokens=[*_SPECIAL, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    processor = Idefics3Processor(images, tokenizer, chat_template=CHAT, image_seq_len=4)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=_text_config(tokenizer).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return _build(Idefics3ForConditionalGeneration, config, seed), processor


def suggestion_json(*, box=(0, 0, 500, 1000), prompt="a sunlit window", key="box"):
    """JSON on the schema of a conversation, with one suggestion."""
    suggestion = {"reason": "dark", key: list(box), "prompt": prompt}
    return json.dumps({"summary": "dull", "suggestions": [suggestion]}, separators=(",", ":"))


def _build(model_class, config, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    return model


def _text_config(tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer(*, special_tokens, added=()) -> Qwen2Tokenizer:
    vocabulary, merges = _trained_bpe()
    shifted = {piece: index + len(special_tokens) for piece, index in vocabulary.items()}
    tokenizer = Qwen2Tokenizer(
        vocab={**{piece: index for index, piece in enumerate(special_tokens)}, **shifted},
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=special_tokens[1:],
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


@functools.cache
def _trained_bpe():
    """The vocabulary and merges of a BPE tokenizer trained on the package's own prompts."""
    folder = resources.files("artaug.critics") / "prompts"
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir(), key=lambda file: file.name)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _set_reply(model, tokenizer, pieces) -> None:
    """Set the weights so that the pieces, a token each, follow a line break and each other, and the end of text the last.

    The layers add nothing to the residual stream, so the head sees only the embedding of the last token.
    """
    (line_break,) = tokenizer.encode("\n")
    before = [line_break, *tokenizer.convert_tokens_to_ids(list(pieces))]
    after = [*before[1:], tokenizer.eos_token_id]
    language = model.model.language_model
    with torch.no_grad():
        for layer in language.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = language.embed_tokens.weight
        embeddings[before] = torch.eye(embeddings.shape[1])[: len(before)] * 10
        model.lm_head.weight.zero_()
        model.lm_head.weight[after] = embeddings[before]
