"""Header readers: what they say of good files, and that nothing else than our errors comes out of bad ones."""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from localspec.errors import LocalspecError, ModelFileError
from localspec.formats import gguf, safetensors, summarize
from localspec.testing.files import write_gguf, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
SHARED = ROOT.parent / "shared" / "models"

NUM_MUTANTS = 10_000
LEAST_BYTES = 2 * 2**20
"""What any reading may take, and above it 32 times the file: the bound that `localspec.formats` states."""

MOST_RESIDENT = 64 * 2**20
"""Growth of the process over all mutants."""


# ---------------------------------------------------------------- good files


@pytest.mark.real
def test_the_bundled_target_is_summarised() -> None:
    model = summarize(TINY / "target.gguf")
    assert (model.architecture, model.num_layers, model.hidden_size) == ("qwen3", 15, 512)
    assert (model.num_heads, model.kv_heads, model.key_size) == (8, (2,) * 15, 64)
    assert (model.vocab_size, model.trained_context, model.quantization) == (8192, 2048, "Q4_0")
    assert model.num_parameters == 55_330_176
    assert sum(model.weight_bytes.values()) < model.file_bytes
    assert model.kv_values == 15 * 2 * 2 * 64
    assert model.drafter_kind is None and not model.is_recurrent


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_both_formats_say_the_same_of_one_model(tmp_path: Path, architecture: str) -> None:
    one = summarize(write_gguf(tmp_path / "m.gguf", architecture=architecture))
    two = summarize(write_safetensors(tmp_path / "m", architecture=architecture))
    for name in ("architecture", "num_layers", "hidden_size", "num_heads", "kv_heads", "key_size", "vocab_size"):
        assert getattr(one, name) == getattr(two, name), name
    assert (one.trained_context, one.num_parameters) == (two.trained_context, two.num_parameters)


def test_a_head_is_told_by_its_tensors() -> None:
    if not (SHARED / "dspark").is_dir():
        pytest.skip("needs the development models beside the repository")
    model = summarize(SHARED / "dspark")
    assert (model.drafter_kind, model.target_hidden, model.num_target_layers) == ("dspark", 512, 15)


def test_packed_weights_count_as_what_they_hold(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "quantization": {"bits": 4}}
    tensors = {"a.weight": ("U32", [8, 8]), "a.scales": ("F16", [8, 1]), "a.biases": ("F16", [8, 1])}
    write_folder(folder, config, {"model.safetensors": tensors})
    model = summarize(folder)
    assert (model.num_parameters, model.quantization) == (512, "4 bits in groups of ?")


def test_a_split_file_is_read_whole_from_any_part(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf")
    parts = split(whole, tmp_path)
    for part in parts:
        model = summarize(part)
        assert model.num_parameters == summarize(whole).num_parameters
        assert model.architecture == "qwen3"
    parts[1].unlink()
    with pytest.raises(ModelFileError, match="part of the model is missing"):
        summarize(parts[0])


def test_an_index_is_followed_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4}
    parts = {"a.safetensors": {"x": ("F32", [2, 4])}, "b.safetensors": {"y": ("BF16", [4])}}
    write_folder(folder, config, parts)
    index = folder / safetensors.INDEX
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert summarize(folder).num_parameters == 12
    for mapping, words in (
        ({"x": "a.safetensors", "y": "c.safetensors"}, "missing"),
        ({"x": "a.safetensors", "y": "a.safetensors"}, "lacks a tensor"),
        ({"x": "../a.safetensors"}, "no file of the folder"),
        ({"x": 3}, "no file of the folder"),
    ):
        index.write_text(json.dumps({"weight_map": mapping}))
        with pytest.raises(ModelFileError, match=words):
            summarize(folder)


# ---------------------------------------------------------------- bad files, one by one


HEADER = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        (b"[" * 200_000, 0, "brackets"),
        (b'{"a":' * 4_000 + b"1" + b"}" * 4_000, 0, "corrupt|brackets"),
        (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
         8, "twice"),
        (b'{"x":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,8]}}', 8, "digits"),
        (json.dumps(HEADER | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}).encode(), 12, "overlaps"),
        (json.dumps(HEADER | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}).encode(), 20, "hole"),
        (json.dumps({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}).encode(), 8, "size"),
        (json.dumps({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}).encode(), 8, "shape"),
        (json.dumps({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}).encode(), 4, "shape"),
        (json.dumps({"x": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}).encode(), 8, "type"),
        (json.dumps(HEADER).encode(), 7, "truncated"),
        (json.dumps(HEADER).encode(), 9, "longer"),
        (b"\xff\xfe", 0, "corrupt"),
        (b"3", 0, "corrupt"),
    ],
)  # fmt: skip
def test_a_bad_safetensors_header_is_refused(tmp_path: Path, header: bytes, body: int, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(body))
    with pytest.raises(ModelFileError, match=words):
        safetensors.read_header(path)


def test_a_header_length_beyond_the_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in (2**63, 2**40, 100):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(ModelFileError, match="truncated"):
            safetensors.read_header(path)


# ---------------------------------------------------------------- ten thousand mutants


@pytest.mark.slow
def test_mutated_headers_give_our_errors_or_a_summary_in_bounded_memory(tmp_path: Path) -> None:
    """Byte flips, cuts, huge lengths and counts, repeated pieces, deep JSON; half GGUF, half safetensors."""
    rng = random.Random(20261122)
    whole = write_gguf(tmp_path / "good.gguf", num_merges=20, num_layers=1).read_bytes()
    header_end = min(tensor.offset for tensor in gguf.read_header(tmp_path / "good.gguf").tensors.values())
    folder = write_safetensors(tmp_path / "good", num_layers=1)
    stored = (folder / "model.safetensors").read_bytes()
    stored_end = 8 + int.from_bytes(stored[:8], "little")
    config = (folder / "config.json").read_bytes()
    target, part = tmp_path / "mutant.gguf", folder / "model.safetensors"
    outcomes = {"summary": 0, "error": 0}
    longest = [0]

    def check(path: Path, num_bytes: int, traced: bool) -> None:
        if traced:  # tracing costs ten times the reading, so one in ten is traced
            tracemalloc.start()
        try:
            summarize(path)
            outcomes["summary"] += 1
        except LocalspecError as error:
            outcomes["error"] += 1
            longest[0] = max(longest[0], len(str(error)))
        finally:
            taken = tracemalloc.get_traced_memory()[1]  # 0 where nothing is traced
            tracemalloc.stop()
        assert taken <= LEAST_BYTES + 32 * num_bytes, f"{taken} bytes for a file of {num_bytes}"

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(NUM_MUTANTS):
        traced = number % 20 < 2
        if number % 2:
            content = mutated(rng, whole, header_end)
            target.write_bytes(content)
            check(target, len(content), traced)
        elif number % 10 == 4:
            (folder / "config.json").write_bytes(mutated(rng, config, len(config)))
            part.write_bytes(stored)
            check(folder, len(stored), traced)
            (folder / "config.json").write_bytes(config)
        else:
            content = mutated(rng, stored, stored_end)
            part.write_bytes(content)
            check(folder, len(content), traced)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * unit < MOST_RESIDENT
    assert sum(outcomes.values()) == NUM_MUTANTS
    assert longest[0] < 2_000, "a message quotes too much of the file"
    assert min(outcomes.values()) > NUM_MUTANTS // 100, f"the mutants are too tame or too wild: {outcomes}"


def mutated(rng: random.Random, content: bytes, end: int) -> bytes:
    """A copy with up to three faults in its first `end` bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        rng.choice(FAULTS)(rng, data, end)
    return bytes(data)


def flip(rng: random.Random, data: bytearray, end: int) -> None:
    if data:
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray, end: int) -> None:
    at = rng.randrange(end)
    data[at : at + 8] = rng.randbytes(8)


def make_huge(rng: random.Random, data: bytearray, end: int) -> None:
    """A length or a count, wherever it may lie."""
    at = rng.choice((0, 8, 16, 24, rng.randrange(end)))
    value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.randrange(2**40), len(data)))
    data[at : at + 8] = struct.pack("<Q", value)


def cut(rng: random.Random, data: bytearray, end: int) -> None:
    del data[rng.randrange(min(end, len(data)) + 1) if rng.random() < 0.5 else -rng.randint(1, 64) :]


def repeat(rng: random.Random, data: bytearray, end: int) -> None:
    """A piece occurs twice: keys, tensors, brackets."""
    at, size = rng.randrange(end), rng.randint(1, 200)
    data[at:at] = data[at : at + size]


def nest(rng: random.Random, data: bytearray, end: int) -> None:
    at = rng.randrange(end)
    data[at:at] = rng.choice((b"[", b"{", b'{"a":', b"[[[1],")) * rng.randint(1, 400)


def swap_digits(rng: random.Random, data: bytearray, end: int) -> None:
    """Numbers written in JSON become other numbers."""
    places = [at for at in range(8, min(end, len(data))) if 48 <= data[at] <= 57]
    if places:
        data[rng.choice(places)] = rng.choice(b"0123456789-.e")


FAULTS: tuple[Callable[[random.Random, bytearray, int], None], ...] = (
    flip, flip, overwrite, make_huge, cut, repeat, nest, swap_digits,
)  # fmt: skip


# ---------------------------------------------------------------- files


def write_folder(folder: Path, config: dict[str, object], parts: dict[str, dict[str, tuple[str, list[int]]]]) -> None:
    """A folder of weight files full of zeros."""
    sizes = {"F32": 4, "U32": 4, "F16": 2, "BF16": 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in parts.items():
        header, end = {}, 0
        for key, (dtype, shape) in tensors.items():
            start, end = end, end + sizes[dtype] * (shape[0] * shape[1] if len(shape) > 1 else shape[0])
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        raw = json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))


def split(whole: Path, folder: Path) -> list[Path]:
    """The file as llama.cpp splits it: metadata in the first of two parts, each with some tensors."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

    reader = GGUFReader(whole)
    header = gguf.read_header(whole)
    paths = []
    half = len(reader.tensors) // 2
    for number, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        path = folder / f"m-{number + 1:05}-of-00002.gguf"
        writer = GGUFWriter(path, "qwen3")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for key, value in header.metadata.items():
            if number == 0 and type(value) is int and not key.startswith("general."):
                writer.add_uint32(key, value)
        for one in tensors:
            writer.add_tensor(one.name, one.data, raw_dtype=GGMLQuantizationType(one.tensor_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths
