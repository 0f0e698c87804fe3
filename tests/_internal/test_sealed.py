"""Safetensors files with digests: no bit can change unnoticed, and nothing else but our own error comes of it."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from artaug._internal.sealed import open_sealed, save_sealed
from artaug.errors import StorageError

TENSORS = {
    "a": torch.arange(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 2),
}


def read(path):
    with open_sealed(path, what="state", remedy="Delete it.") as file:
        return {name: file.read(name).clone() for name in file.names}, file.metadata


def flips(content):
    """The content with one bit changed, for every bit."""
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.fixture
def path(tmp_path):
    save_sealed(TENSORS, tmp_path / "state", {"step": "7", "n": "ü"})
    return tmp_path / "state"


def test_what_was_written_is_read(path):
    tensors, metadata = read(path)
    assert metadata == {"step": "7", "n": "ü"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_every_bit_that_flips_is_noticed(path):
    for changed in flips(path.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(StorageError, match=r"state is no state, or a damaged one: (?s:.)*Delete it\."):
            read(path)


def test_every_length_but_the_whole_is_noticed(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match="or a damaged one"):
            read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(StorageError, match="or a damaged one"):
        read(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"{}",
        b"null",
        b'{"__metadata__": null}',
        b'{"__metadata__": {"digests": "3"}}',
        b'{"__metadata__": {"digests": "{}"}}',
        b'{"__metadata__": {"digests": "[]"}}',
        b'{"__metadata__": {"digests": "' + b"[" * 100_000 + b'"}}',
        b'{"__metadata__": {"digests": "{\\"\\": 3}"}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}',
        b'{"\xff": 1}',
    ],
    ids=lambda header: header[:60].decode("latin-1"),
)
def test_a_header_of_any_shape_is_an_error_of_ours(header, tmp_path):
    (tmp_path / "state").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StorageError, match="or a damaged one"):
        read(tmp_path / "state")


def test_a_file_without_digests_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "state", {"step": "7"})
    with pytest.raises(StorageError, match="it has no digests, so another program or an earlier version"):
        read(tmp_path / "state")


def test_a_tensor_of_another_file_is_noticed(path):
    header_length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_length])
    digests = json.loads(header["__metadata__"]["digests"])
    save_file({**TENSORS, "a": torch.zeros(3)}, path, {**header["__metadata__"], "digests": json.dumps(digests)})
    with pytest.raises(StorageError, match="the bytes of 'a' are not those of its digest"):
        read(path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "gone", "."):
        with pytest.raises(StorageError, match="or a damaged one"):
            read(tmp_path / name)
