"""`VLMCritic`: a vision-language model of transformers in this process, with batches and constrained decoding."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self, final

import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.devices import DType, check_placement, computed_in, log_loaded, resolve_device
from artaug._internal.extras import optional
from artaug._internal.images import as_rgb
from artaug._internal.memory import FittingBatches
from artaug._internal.weights import check_safetensors, model_errors
from artaug.critics.conversation import Conversation
from artaug.critics.coordinates import Coordinates, coordinates_for
from artaug.critics.dialogue import stream_dialogues
from artaug.critics.probing import ProbeResult, probe_coordinates
from artaug.critique import Answer, StreamingCritic
from artaug.errors import InvalidValueError, ModelError
from artaug.serving.chat import ChatReply, ChatRequest, Message

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from artaug.critics.constrained import SchemaDecoding

_MAX_ASPECT_RATIO = 200
_PIXELS_PER_CHARACTER = 200  # for sorting: an image token covers about 800 pixels, a text token about 4 characters


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class VLMCritic(StreamingCritic):
    """Criticises pictures with a vision-language model of transformers, in batches.

    Decoding is greedy, so the same pictures in the same batches get the same critiques; in low precision the composition
    of a batch can change a close decision. With ``constrained`` decoding (``pip install "artaug[vlm]"``) every reply is
    complete JSON on the schema of the conversation; without it the reply is free text and is parsed as far as possible.

    Raises:
        ModelError: for a processor without chat template or padding token, a model in training mode, or a tokenizer that
            llguidance cannot read.
        InvalidValueError: if ``batch_size`` is below 1, or ``max_new_tokens`` too small for a reply.
        MissingExtraError: for ``constrained`` decoding without llguidance.
    """

    model: "PreTrainedModel" = field(repr=False)
    """Any model of ``AutoModelForImageTextToText``, on any device. It is not modified."""
    processor: "ProcessorMixin" = field(repr=False)
    """Its processor, with a chat template."""
    conversation: Conversation
    """The prompts, and how the model writes boxes."""
    name: str = ""
    """The model's name in the critic's repr, which `Cached` uses as identity; by default the model's name or path."""
    constrained: bool = True
    """Whether the reply is constrained to JSON on the schema."""
    max_new_tokens: int = 1024
    """Tokens of a reply. A constrained reply closes its JSON before they run out."""
    batch_size: int = field(default=8, repr=False)
    """Requests of similar length that are generated together."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise InvalidValueError(
                f"VLMCritic(batch_size={self.batch_size}, max_new_tokens={self.max_new_tokens}): need at least 1 of each."
            )
        if self.model.training:
            raise ModelError(f"{type(self.model).__name__} is in training mode, where dropout is random. Call .eval().")
        processor = type(self.processor).__name__
        if getattr(self.processor, "chat_template", None) is None:
            raise ModelError(f"{processor} has no chat template, which the requests need. Set processor.chat_template.")
        if self.processor.tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer of {processor} has no padding token. Set processor.tokenizer.pad_token.")
        if self.constrained:
            schema = self.conversation.schema((1000, 1000))
            self._decoding.logits_processor([schema], max_new_tokens=self.max_new_tokens)  # raises what is wrong now
        if not self.name:
            object.__setattr__(self, "name", self.model.config.name_or_path)

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - loading options, all with defaults
        cls,
        source: str,
        *,
        coordinates: Coordinates | None = None,
        analyze_first: bool = False,
        max_suggestions: int = 4,
        revision: str = "main",
        dtype: DType = "auto",
        device: str | torch.device = "auto",
        attn_implementation: str | None = None,
        quantization: "QuantizationConfigMixin | None" = None,
        constrained: bool = True,
        max_new_tokens: int = 1024,
        batch_size: int = 8,
        allow_pickle: bool = False,
    ) -> Self:
        """Load a model and its processor.

        Args:
            source: a folder written by ``save_pretrained``, or a Hub name like ``"Qwen/Qwen3-VL-8B-Instruct"``.
            coordinates: how the model writes boxes; None for the convention of its family, fitted to its processor.
            analyze_first: ask for an analysis in free text before the reply: twice the time, better boxes.
            max_suggestions: the largest number of suggestions for a picture.
            revision: branch, tag or commit on the Hub.
            dtype: of the weights; ``"auto"`` for that of the checkpoint, on a CPU float32 in place of float16, which is
                slow there.
            device: the device of the model; ``"auto"`` for the GPU where there is one, else the CPU.
            attn_implementation: such as ``"sdpa"`` or ``"flash_attention_2"``; None for transformers' default.
            quantization: a quantization config of transformers, such as ``BitsAndBytesConfig(load_in_4bit=True)``.
            constrained: see the field.
            max_new_tokens: see the field.
            batch_size: see the field.
            allow_pickle: also read weights that are not in safetensors, which can run code when they are read.

        Raises:
            ModelError: if there is no image-text-to-text model at ``source``, or none in safetensors without
                ``allow_pickle``; if this machine has no such ``device``.
            InvalidValueError: for a ``dtype`` or ``device`` that torch does not have; if ``coordinates`` are not given
                and the model's family is unknown; no weights are read then.
            MissingExtraError: for ``constrained`` decoding without llguidance; nothing is read then.
        """
        check_placement("VLMCritic.from_pretrained", dtype=dtype, device=device)
        placed_on = resolve_device(device)
        if constrained:
            _schema_decoding_class()  # raises now if the extra is missing
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415 - slow to load
        from transformers.utils import cached_file  # noqa: PLC0415 - slow to load

        expected = (
            "Expected an image-text-to-text model with its processor: a folder written by save_pretrained, or a name on the "
            "Hub. Pickled weights are read only with allow_pickle=True."
        )
        with model_errors(f"{source!r} could not be loaded", expected=expected):
            if not allow_pickle:
                check_safetensors(source, fetch=partial(cached_file, source, revision=revision))
            # If trust_remote_code is not given, transformers asks on the terminal whether to run a repository's code.
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            preset = coordinates_for(config.model_type) if coordinates is None else coordinates
            processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                device_map=None if placed_on.type == "cpu" else {"": placed_on},
                attn_implementation=attn_implementation,
                quantization_config=quantization,
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
            )
        if dtype == "auto" and quantization is None:
            model = model.to(computed_in(model.dtype, placed_on))
        log_loaded(source, {type(model).__name__: model})
        make_conversation = Conversation.in_two_stages if analyze_first else Conversation
        return cls(
            model=model.eval(),
            processor=processor,
            conversation=make_conversation(
                coordinates=preset.fitted_to(processor.image_processor) if coordinates is None else preset,
                max_suggestions=max_suggestions,
                system_role=_has_system_role(processor),
            ),
            name=source if revision == "main" else f"{source}@{revision}",
            constrained=constrained,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )

    @property
    def models(self) -> Sequence[nn.Module]:
        return (self.model,)

    def critique_stream(self, images: Sequence[Image], prompts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Criticise many pictures, ``batch_size`` at a time; half as many from then on, where memory runs out.

        It abstains from pictures that the model cannot be shown: without pixels, of mode ``I`` or ``F``, or with an
        aspect ratio above 200.
        """
        return stream_dialogues(self.conversation, images, prompts, generate=self._generate, prepare=_prepare)

    def probe(self) -> ProbeResult:
        """Show the model a few rectangles and find out how it writes boxes."""
        return probe_coordinates(self._generate, self.conversation.coordinates)

    def _generate(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatReply]]:
        # Requests of similar length share a batch, so that little is padded; the longest first, so that running out of
        # memory shows at once.
        longest_first = sorted(range(len(requests)), key=lambda index: -_approximate_length(requests[index]))
        batches = self._batches.run(
            lambda batch: list(self._generate_batch([requests[index] for index in batch])),
            longest_first,
            owner="VLMCritic",
            item="picture",
            remedy="Load the model quantized or in lower precision, or show it smaller pictures.",
        )
        for batch, replies in batches:
            yield from zip(batch, replies, strict=True)

    @cached_property
    def _batches(self) -> FittingBatches:
        return FittingBatches(self.batch_size)

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[ChatRequest]) -> Iterator[ChatReply]:
        inputs = self.processor.apply_chat_template(
            [[_chat_message(message) for message in request.messages] for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # for templates that have it: `analyze_first` asks for the reasoning instead
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device, self.model.dtype)
        schemas = [request.schema for request in requests if request.schema is not None]
        processors = None
        if self.constrained and schemas:
            processors = [self._decoding.logits_processor(schemas, max_new_tokens=self.max_new_tokens)]
        sequences: Tensor = self.model.generate(
            **inputs, generation_config=self._generation_config, logits_processor=processors
        )
        new_tokens = sequences[:, inputs["input_ids"].shape[1] :]  # (requests, tokens of the longest reply)
        return map(self._decode, new_tokens.tolist())

    def _decode(self, tokens: list[int]) -> ChatReply:
        end = next((index for index, token in enumerate(tokens) if token in self._eos_token_ids), None)
        # Special tokens are kept: some models write boxes with them.
        text = self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=False)
        cut = f"the reply was cut at {self.max_new_tokens:,} tokens"
        return ChatReply(text, () if end is not None else (cut,))

    @cached_property
    def _generation_config(self) -> "GenerationConfig":
        """The checkpoint's generation config, but greedy."""
        config = copy.deepcopy(self.model.generation_config)
        config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
        config.temperature = config.top_p = config.top_k = config.max_length = None
        config.max_new_tokens = self.max_new_tokens
        config.eos_token_id, config.pad_token_id = self._eos_token_ids, self.processor.tokenizer.pad_token_id
        return config

    @cached_property
    def _eos_token_ids(self) -> list[int]:
        """The tokens that end a reply: those of the generation config and that of the tokenizer."""
        configured = self.model.generation_config.eos_token_id
        configured = [configured] if isinstance(configured, int) else configured or []
        return list(dict.fromkeys([*configured, self.processor.tokenizer.eos_token_id]))

    @cached_property
    def _decoding(self) -> "SchemaDecoding":
        return _schema_decoding_class()(self.processor.tokenizer, eos_token_ids=self._eos_token_ids)


def _schema_decoding_class() -> "type[SchemaDecoding]":
    with optional("llguidance", required_by="VLMCritic(constrained=True)", extra="vlm"):
        from artaug.critics.constrained import SchemaDecoding  # noqa: PLC0415 - loads transformers and the extra
    return SchemaDecoding


def _prepare(image: Image) -> Image:
    if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        raise InvalidValueError(
            f"a picture of {image.width} x {image.height} pixels cannot be shown to the model: need at least one pixel "
            f"per side, and the longer side at most {_MAX_ASPECT_RATIO} times the shorter."
        )
    return as_rgb(image)


def _chat_message(message: Message) -> dict[str, Any]:
    """A message in the format of transformers' chat templates."""
    image = [] if message.image is None else [{"type": "image", "image": message.image}]
    return {"role": message.role, "content": [*image, {"type": "text", "text": message.text}]}


def _approximate_length(request: ChatRequest) -> float:
    """The approximate length of a request for the model, in characters."""
    pixels = sum(message.image.width * message.image.height for message in request.messages if message.image)
    return sum(len(message.text) for message in request.messages) + pixels / _PIXELS_PER_CHARACTER


def _has_system_role(processor: "ProcessorMixin") -> bool:
    """Whether the chat template renders a system message."""
    from jinja2 import TemplateError  # noqa: PLC0415 - transformers loads it when a template is rendered

    marker = "keel"
    messages = [_chat_message(Message("system", marker)), _chat_message(Message("user", "a"))]
    try:
        return marker in processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError:
        return False
