"""Encoded prompts, kept from drawing to drawing: before and after, and the held-out prompts of every round."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from artaug.diffusion.encoder_state import encoder_state
from artaug.regional.denoiser import Conditioning

MAX_BYTES = 2**30
"""Of a pipeline's encodings that are kept, the least recently used dropped first: 256 prompts of FLUX.1, 4 MiB each."""


def kept_encoding(pipeline: object, tokens: Hashable, encode: Callable[[], Conditioning]) -> Conditioning:
    """What ``encode`` returns, computed only if the encoders were not called with these tokens in their present state.

    What a drawing gives must not depend on what was drawn before, and how an encoder rounds depends on all the prompts of
    its call. So whole calls are kept, not single prompts: the same call gives the same bits, whether it is made or not.

    They are kept in host memory, where a device's are for its models, and a copy is handed out each time: denoisers tell
    the branches of a run by their tensors, and nobody can change what is kept. They are dropped with the pipeline.

    Args:
        pipeline: whose encoders they are. Its owner holds its lock (`exclusive_use`), so this takes none.
        tokens: all that decides the call beside the encoders: the tokens of all its prompts, and where they are cut.
        encode: makes the call.
    """
    state = encoder_state(pipeline)
    if state is None:
        _MEMORIES.pop(pipeline, None)
        return encode()
    memory = _MEMORIES.setdefault(pipeline, _Memory())
    memory.enter(state)
    kept = memory.find(tokens)
    if kept is None:
        encoded = encode()
        if not all(isinstance(column, Tensor) for column in encoded.values()):
            return encoded
        kept = _Encoding.of(encoded)
        memory.add(tokens, kept)
    return kept.copied()


@dataclass(frozen=True, eq=False)
class _Encoding:
    """The encoded prompts of one call, in host memory."""

    columns: Mapping[str, Tensor]
    devices: Mapping[str, torch.device]

    @classmethod
    def of(cls, encoded: Conditioning) -> "_Encoding":
        columns = {
            name: column.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, column in encoded.items()
        }
        return cls(columns, {name: column.device for name, column in encoded.items()})

    @property
    def size_bytes(self) -> int:
        return sum(column.numel() * column.element_size() for column in self.columns.values())

    def copied(self) -> Conditioning:
        return {name: column.to(self.devices[name], copy=True) for name, column in self.columns.items()}


@dataclass(eq=False)
class _Memory:
    """The encodings of one pipeline, all of one state of its encoders."""

    _state: Hashable = None
    _encodings: dict[Hashable, _Encoding] = field(default_factory=dict)
    """By tokens, the least recently used first."""

    def enter(self, state: Hashable) -> None:
        """Drop what was encoded in another state than this."""
        if state != self._state:
            self._encodings.clear()
            self._state = state

    def find(self, tokens: Hashable) -> _Encoding | None:
        encoding = self._encodings.pop(tokens, None)
        if encoding is not None:
            self._encodings[tokens] = encoding
        return encoding

    def add(self, tokens: Hashable, encoding: _Encoding) -> None:
        self._encodings[tokens] = encoding
        total = sum(kept.size_bytes for kept in self._encodings.values())
        while total > MAX_BYTES:
            total -= self._encodings.pop(next(iter(self._encodings))).size_bytes


_MEMORIES: WeakKeyDictionary[object, _Memory] = WeakKeyDictionary()
