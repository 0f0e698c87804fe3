"""Real vision-language models, small enough to answer in milliseconds: random weights from configs, no torchvision."""

import functools
import json
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
_WORDS = 700

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llava(*, saying: str | None = None, seed: int = 0):
    """A LLaVA and its processor; with ``saying``, one that replies with that text whatever it is shown."""
    tokenizer = _tokenizer(special=_SPECIAL, saying=saying)
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
        text_config=_language(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model = _built(LlavaForConditionalGeneration, config, seed)
    if saying is not None:
        _teach(model, tokenizer, saying)
    return model, processor


def tiny_idefics3(*, seed: int = 0):
    """An Idefics3 (as SmolVLM is one) and its processor."""
    tokenizer = _tokenizer(special=[*_SPECIAL, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"])
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
        text_config=_language(tokenizer).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return _built(Idefics3ForConditionalGeneration, config, seed), processor


def reply(*, box=(0, 0, 500, 1000), prompt="a sunlit window", key="box"):
    """JSON on the schema of a conversation, with one suggestion."""
    suggestion = {"reason": "dark", key: list(box), "prompt": prompt}
    return json.dumps({"summary": "dull", "suggestions": [suggestion]}, separators=(",", ":"))


def _built(kind, config, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).eval()
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    return model


def _language(tokenizer) -> LlamaConfig:
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


def _tokenizer(*, special, saying=None) -> Qwen2Tokenizer:
    vocabulary, merges = _learnt()
    shifted = {piece: number + len(special) for piece, number in vocabulary.items()}
    tokenizer = Qwen2Tokenizer(
        vocab={**{piece: number for number, piece in enumerate(special)}, **shifted},
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=special[1:],
    )
    if saying is not None:
        tokenizer.add_tokens([saying])
    return tokenizer


@functools.cache
def _learnt():
    """Byte pairs learnt from the package's own prompts."""
    folder = resources.files("artaug.critics") / "prompts"
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir(), key=lambda file: file.name)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=_WORDS, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _teach(model, tokenizer, saying) -> None:
    """Set the weights so that one token leads to the next: after a line break the text, after the text the end.

    The layers add nothing to what comes in, and the head asks only which token that was.
    """
    (said,) = tokenizer.encode(saying)
    (break_,) = tokenizer.encode("\n")
    language = model.model.language_model
    with torch.no_grad():
        for layer in language.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        words = language.embed_tokens.weight
        words[[break_, said]] = torch.eye(words.shape[1])[:2] * 10
        model.lm_head.weight.zero_()
        model.lm_head.weight[said] = words[break_]
        model.lm_head.weight[tokenizer.eos_token_id] = words[said]
