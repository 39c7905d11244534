"""GGUF headers: what the package `gguf` reads in good ones, and our error for bad ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from localspec.errors import ModelFileError, UnsupportedModelError
from localspec.formats import gguf
from localspec.testing.files import write_gguf


def gguf_file(*values: bytes, tensors: bytes = b"", num_tensors: int = 0, num_values: int | None = None) -> bytes:
    count = len(values) if num_values is None else num_values
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, count) + b"".join(values) + tensors


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def tensor(name: bytes, sizes: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gguf_file(num_values=2**60), "do not fit"),
        (gguf_file(num_tensors=2**63), "do not fit"),
        (gguf_file(text(b"k") + struct.pack("<IIQ", 9, 8, 2**61)), "do not fit"),
        (gguf_file(text(b"k") + struct.pack("<IIQ", 9, 9, 4)), "array of type 9"),
        (gguf_file(struct.pack("<Q", 2**64 - 1)), "corrupt"),
        (gguf_file(*[text(b"k") + struct.pack("<II", 4, 1)] * 2), "twice"),
        (gguf_file(text(b"k") + struct.pack("<I", 77)), "corrupt"),
        (gguf_file(text(b"general.alignment") + struct.pack("<II", 4, 3)), "alignment"),
        (gguf_file(tensors=tensor(b"t", (2**40, 2**40), 0) + bytes(64), num_tensors=1), "truncated"),
        (gguf_file(tensors=tensor(b"t", (8,), 2**63) + bytes(64), num_tensors=1), "truncated|corrupt"),
        (gguf_file(tensors=tensor(b"t", (8,), 7) + bytes(96), num_tensors=1), "multiple"),
        (gguf_file(tensors=tensor(b"t", (16,), 0) + tensor(b"u", (16,), 32) + bytes(256), num_tensors=2), "overlap"),
        (gguf_file(tensors=tensor(b"t", (8,), 0) * 2 + bytes(256), num_tensors=2), "twice"),
        (b"GGML" + bytes(100), "no GGUF"),
        (gguf_file(text(b"k") + struct.pack("<IIQ", 9, 4, 2**61)), "do not fit"),
        (gguf_file(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 0) + bytes(40)), "UTF-8"),
        (gguf_file(tensors=tensor(b"t", (1, 1, 1, 1, 1), 0) + bytes(64), num_tensors=1), "5 dimensions"),
        (gguf_file(tensors=tensor(b"t", (0,), 0) + bytes(64), num_tensors=1), "sizes"),
        (gguf_file(tensors=tensor(b"t", (33, 2), 0, kind=2) + bytes(100), num_tensors=1), "sizes"),
        (b"GGUF", "corrupt"),
        (b"", "no GGUF"),
    ],
)
def test_a_bad_gguf_header_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=words):
        gguf.read_header(path)


def test_an_unknown_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(UnsupportedModelError, match="version"):
        gguf.read_header(path)


def test_every_truncation_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    """Cut anywhere, in the header or in the weights: our error, never a crash."""
    pytest.importorskip("tokenizers", reason="needs the tokenizers package to write a file")
    whole = write_gguf(tmp_path / "whole.gguf", num_merges=0, num_layers=1).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, len(whole), len(whole) // 60), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            gguf.read_header(cut)


def test_the_header_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the tokenizers package to write a file")
    package = pytest.importorskip("gguf", reason="needs the gguf package")
    path = write_gguf(tmp_path / "m.gguf", quantization="Q4_0")
    header, reference = gguf.read_header(path), package.GGUFReader(path)
    for name, field in reference.fields.items():
        if not name.startswith("GGUF."):
            value = header.metadata[name]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    for tensor in reference.tensors:
        mine = header.tensors[tensor.name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        assert (mine.kind, mine.shape, mine.offset) == (tensor.tensor_type.name, shape, tensor.data_offset)
        assert mine.num_bytes == tensor.n_bytes


def test_the_architecture_is_found_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    first, second = (text(key) + struct.pack("<I", 8) + text(b"value") for key in (b"general.name", b"general.type"))
    named = text(b"general.architecture") + struct.pack("<I", 8) + text(b"qwen3")
    for values in ((named, first), (first, second, named), (first, named, b"what is behind is not read")):
        path.write_bytes(gguf_file(*values))
        assert gguf.read_architecture(path) == "qwen3"
    path.write_bytes(gguf_file(first, second))
    assert gguf.read_architecture(path) == ""
    path.write_bytes(gguf_file(first, num_values=2))
    with pytest.raises(ModelFileError, match="corrupt"):
        gguf.read_architecture(path)
