"""Qwen's tokenizer for the text encoders of tiny pipelines: one token per byte, with a chat template."""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = {piece: index for index, piece in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
"""Around a picture in a chat, and in its place."""


def qwen_tokenizer(*, sees: bool = False):
    """Qwen's tokenizer with one token per byte; one that sees has tokens for pictures behind them."""
    vision = VISION if sees else []
    return Qwen2Tokenizer(
        vocab=VOCABULARY | {piece: len(VOCABULARY) + index for index, piece in enumerate(vision)},
        merges=[],
        extra_special_tokens=[*SPECIAL[1:], *vision],
        chat_template=_CHAT,
    )
