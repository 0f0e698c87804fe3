"""The next token of an image-text-to-text model after a question about pictures, and how likely each is."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from artaug.errors import ModelError
from artaug.scorers.loading import TransformersProcessor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

MIN_ANSWERED = 1e-5
"""What all answers have together, at least: a model that thinks first gives 1e-10 and less, one that answers 0.5 and more."""
THINKS_FIRST = (
    "A model that thinks before it answers (Qwen3-VL-Thinking, GLM-4.1V-Thinking) cannot be used this way: load its Instruct "
    "version, or one whose chat template takes enable_thinking=False."
)


def check_chat(processor: TransformersProcessor) -> None:
    """Refuse a processor that cannot put questions to a model.

    Raises:
        ModelError: if it has no chat template or no padding token.
    """
    name = type(processor).__name__
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"{name} has no chat template, without which the model gets no question. Set one.")
    if processor.tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no padding token. Set processor.tokenizer.pad_token.")


def question_chat(images: Sequence[Image], question: str) -> list[dict[str, Any]]:
    """One message with pictures and a question, in the format of transformers' chat templates."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def next_token_config(model: "PreTrainedModel", processor: TransformersProcessor) -> "GenerationConfig":
    """The checkpoint's generation config, but for one token, with its logits."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
    config.temperature = config.top_p = config.top_k = config.max_length = None
    config.max_new_tokens, config.pad_token_id = 1, processor.tokenizer.pad_token_id
    config.output_logits = config.return_dict_in_generate = True  # logits: before any logits processor, unlike scores
    return config


@torch.inference_mode()
def next_token_probabilities(
    model: "PreTrainedModel",
    processor: TransformersProcessor,
    chats: Sequence[list[dict[str, Any]]],
    config: "GenerationConfig",
) -> Tensor:
    """The probabilities of the token after each question, at temperature 1: (chats, vocabulary), float32, on the CPU.

    Args:
        model: any model of ``AutoModelForImageTextToText``.
        processor: its processor.
        chats: see `question_chat`; all have the same number of pictures.
        config: see `next_token_config`.
    """
    inputs = processor.apply_chat_template(
        list(chats),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        enable_thinking=False,  # ignored by templates that do not know it
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device, model.dtype)
    # By generate, not a forward call: it computes the position ids of every architecture under left padding.
    output = model.generate(**inputs, generation_config=config)
    logits: Tensor = output.logits[0]  # of the first new token
    return logits.float().softmax(dim=-1).cpu()


def spelling_ids(processor: TransformersProcessor, words: Sequence[str]) -> list[int]:
    """The tokens that are one of some words, with a space before it or without; what takes several tokens is left out."""
    spellings = [
        processor.tokenizer.encode(f"{space}{word}", add_special_tokens=False) for space in ("", " ") for word in words
    ]
    return sorted({tokens[0] for tokens in spellings if len(tokens) == 1})
