"""A mapping that nothing can change, for the fields of frozen values."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class FrozenDict(Mapping[Key, Value]):
    """A copy of a mapping that cannot be changed. It can be copied and pickled, as ``types.MappingProxyType`` cannot.

    >>> from artaug._internal.mappings import FrozenDict
    >>> FrozenDict({"a": 1})
    FrozenDict({'a': 1})
    >>> FrozenDict({"a": 1}) == {"a": 1}
    True
    """

    def __init__(self, items: Mapping[Key, Value]) -> None:
        self._items: dict[Key, Value] = dict(items)

    def __getitem__(self, key: Key) -> Value:
        return self._items[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"FrozenDict({self._items!r})"
