"""A critic that runs a multimodal language model itself, through transformers."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from PIL.Image import Image
from torch import Tensor

from artaug._internal.images import as_rgb
from artaug.critics.conversation import Conversation, Message
from artaug.critics.coordinates import Coordinates, coordinates_for
from artaug.critics.dialogue import Question, Reply, run_dialogue
from artaug.critics.probing import Probe, probe
from artaug.critique import Abstention, Critic, Critique
from artaug.errors import InvalidValueError, MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from artaug.critics.constrained import SchemaDecoding

_MOST_SLENDER = 200
_PIXELS_A_CHARACTER = 200  # for sorting: an image token stands for some 800 pixels, a text token for some 4 characters


@dataclass(frozen=True, kw_only=True, eq=False)
class VLMCritic(Critic):
    """Asks a vision-language model of transformers, many pictures at a time.

    Replies are drawn greedily, so the same pictures in the same batches get the same critiques; in low precision the
    make-up of a batch can tip a close decision. With ``constrained`` decoding (``pip install "artaug[vlm]"``) a reply
    is always whole JSON on the schema of the conversation; without it the model speaks freely and what it says is read
    as far as it can be.

    Raises:
        ModelError: for a processor without chat template or padding token, a model in training mode, or a tokenizer that
            cannot be held to a schema.
        InvalidValueError: if ``batch_size`` is below 1, or ``max_new_tokens`` too few for a reply.
        MissingExtraError: for ``constrained`` decoding without llguidance.
    """

    model: "PreTrainedModel" = field(repr=False)
    """Any model of ``AutoModelForImageTextToText``, placed as its owner likes. It is not altered."""
    processor: "ProcessorMixin" = field(repr=False)
    """Its processor, with a chat template."""
    conversation: Conversation
    """What is said to the model, and how it writes boxes."""
    name: str = ""
    """What to call the model where critics are told apart; its name or path if not given."""
    constrained: bool = True
    """Whether the model can say nothing but JSON on the schema."""
    max_new_tokens: int = 1024
    """Tokens of a reply. A constrained reply closes its JSON before they are spent."""
    batch_size: int = field(default=8, repr=False)
    """Pictures the model looks at together, alike in length."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise InvalidValueError(
                f"VLMCritic(batch_size={self.batch_size}, max_new_tokens={self.max_new_tokens}): need at least 1 of each."
            )
        if self.model.training:
            raise ModelError(f"{type(self.model).__name__} is in training mode, where dropout is random. Call .eval().")
        processor = type(self.processor).__name__
        if getattr(self.processor, "chat_template", None) is None:
            raise ModelError(f"{processor} has no chat template, so there is no way to talk to the model. Set one.")
        if self.processor.tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer of {processor} has no padding token. Set processor.tokenizer.pad_token.")
        if self.constrained:
            self._decoding.keeping([self.conversation.schema((1000, 1000))], max_new_tokens=self.max_new_tokens)
        if not self.name:
            object.__setattr__(self, "name", self.model.config.name_or_path)

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - what can be chosen while loading, each with a good default
        cls,
        source: str,
        *,
        coordinates: Coordinates | None = None,
        analyse_first: bool = False,
        max_suggestions: int = 4,
        revision: str = "main",
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        quantization: "QuantizationConfigMixin | None" = None,
        constrained: bool = True,
        max_new_tokens: int = 1024,
        batch_size: int = 8,
    ) -> Self:
        """Load a model and its processor.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name like ``"Qwen/Qwen3-VL-8B-Instruct"``.
            coordinates: how the model writes boxes; None for the convention of its family, fitted to its processor.
            analyse_first: have it think in words first and answer then: twice the time, better places.
            max_suggestions: at most so many regions a picture.
            revision: branch, tag or commit on the Hub.
            dtype: of the weights; ``"auto"`` for the checkpoint's own, ``torch.bfloat16`` for most.
            device: where to put the model; None for the CPU.
            attn_implementation: such as ``"sdpa"`` or ``"flash_attention_2"``; None for transformers' choice.
            quantization: a quantization of transformers, such as ``BitsAndBytesConfig(load_in_4bit=True)``.
            constrained: the field.
            max_new_tokens: the field.
            batch_size: the field.

        Raises:
            ModelError: if there is no image-text-to-text model at ``source``.
            InvalidValueError: if ``coordinates`` are not given and the model's family is none of the known ones.
            MissingExtraError: for ``constrained`` decoding without llguidance. No weights are read then, nor before the
                other two.
        """
        if constrained:
            _decoder()
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415 - slow to load

        try:
            config = AutoConfig.from_pretrained(source, revision=revision)
            preset = coordinates_for(config.model_type) if coordinates is None else coordinates
            processor = AutoProcessor.from_pretrained(source, revision=revision)
            model = AutoModelForImageTextToText.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                device_map=None if device is None else {"": device},
                attn_implementation=attn_implementation,
                quantization_config=quantization,
            )
        except InvalidValueError:
            raise
        except (OSError, ValueError) as fault:
            raise ModelError(
                f"{source!r} could not be loaded: {fault} Expected an image-text-to-text model with its processor: a "
                "folder that save_pretrained wrote, or a name on the Hub."
            ) from fault
        begin = Conversation.in_two_stages if analyse_first else Conversation
        return cls(
            model=model.eval(),
            processor=processor,
            conversation=begin(
                coordinates=preset.fitted_to(processor.image_processor) if coordinates is None else preset,
                max_suggestions=max_suggestions,
                system_role=_knows_system(processor),
            ),
            name=source if revision == "main" else f"{source}@{revision}",
            constrained=constrained,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        """Criticise many pictures, ``batch_size`` at a time.

        It abstains from pictures that cannot be shown to the model: without pixels, in a mode that is no colour, or
        over 200 times as long as wide.
        """
        return run_dialogue(self.conversation, images, prompts, ask=self._ask, prepare=_showable)

    def probe(self) -> Probe:
        """Show the model a few rectangles and find out how it writes boxes."""
        return probe(self._ask, self.conversation.coordinates)

    def _ask(self, questions: Sequence[Question]) -> list[Reply]:
        longest_first = sorted(range(len(questions)), key=lambda number: -_length(questions[number]))
        replies: dict[int, Reply] = {}
        for start in range(0, len(longest_first), self.batch_size):
            numbers = longest_first[start : start + self.batch_size]
            replies |= zip(numbers, self._reply([questions[number] for number in numbers]), strict=True)
        return [replies[number] for number in range(len(questions))]

    @torch.inference_mode()
    def _reply(self, questions: Sequence[Question]) -> Iterator[Reply]:
        inputs = self.processor.apply_chat_template(
            [[_turn(message) for message in question.messages] for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # where a template knows it; to think first is what the analysis is for
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device, self.model.dtype)
        schemas = [question.schema for question in questions if question.schema is not None]
        held = self.constrained and schemas
        spoken: Tensor = self.model.generate(
            **inputs,
            generation_config=self._greedy,
            logits_processor=[self._decoding.keeping(schemas, max_new_tokens=self.max_new_tokens)] if held else None,
        )
        return map(self._heard, spoken[:, inputs["input_ids"].shape[1] :].tolist())

    def _heard(self, tokens: list[int]) -> Reply:
        end = next((at for at, token in enumerate(tokens) if token in self._ends), None)
        # Special tokens stay: some models write boxes with them.
        text = self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=False)
        cut = f"the reply was cut at {self.max_new_tokens:,} tokens"
        return Reply(text, () if end is not None else (cut,))

    @cached_property
    def _greedy(self) -> "GenerationConfig":
        """How the model's owner would have it generate, but without chance."""
        config = copy.deepcopy(self.model.generation_config)
        config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
        config.temperature = config.top_p = config.top_k = config.max_length = None
        config.max_new_tokens = self.max_new_tokens
        config.eos_token_id, config.pad_token_id = self._ends, self.processor.tokenizer.pad_token_id
        return config

    @cached_property
    def _ends(self) -> list[int]:
        """The tokens that end a reply."""
        stated = self.model.generation_config.eos_token_id
        stated = [stated] if isinstance(stated, int) else stated or []
        return list(dict.fromkeys([*stated, self.processor.tokenizer.eos_token_id]))

    @cached_property
    def _decoding(self) -> "SchemaDecoding":
        return _decoder()(self.processor.tokenizer, ends=self._ends)


def _decoder() -> "type[SchemaDecoding]":
    try:
        import llguidance  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise MissingExtraError("VLMCritic(constrained=True)", package="llguidance", extra="vlm") from None
    from artaug.critics.constrained import SchemaDecoding  # noqa: PLC0415 - loads transformers and the extra

    return SchemaDecoding


def _showable(image: Image) -> Image:
    if max(image.size) > _MOST_SLENDER * min(image.size):
        raise InvalidValueError(
            f"a picture of {image.width} x {image.height} pixels cannot be shown to the model: need at least one pixel "
            f"a side, and the longer side at most {_MOST_SLENDER} times the shorter."
        )
    return as_rgb(image)


def _turn(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    shown = [] if message.image is None else [{"type": "image", "image": message.image}]
    return {"role": message.role, "content": [*shown, {"type": "text", "text": message.text}]}


def _length(question: Question) -> float:
    """Roughly how long a question is to the model, in characters."""
    pixels = sum(message.image.width * message.image.height for message in question.messages if message.image)
    return sum(len(message.text) for message in question.messages) + pixels / _PIXELS_A_CHARACTER


def _knows_system(processor: "ProcessorMixin") -> bool:
    """Whether a chat template lets a system text through."""
    from jinja2 import TemplateError  # noqa: PLC0415 - transformers brings it when a template is rendered

    word = "keel"
    turns = [_turn(Message("system", word)), _turn(Message("user", "a"))]
    try:
        return word in processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError:
        return False
