"""Writes expanded models, one tensor at a time: GGUF files and safetensors folders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from localspec.bench.expand.encoding import Blocks, Encoding, Noise, Values
from localspec.bench.expand.shape import Grown, Layout, Part, Size, lay_out
from localspec.errors import BackendMissingError, DiskError, ModelFileError, SettingError
from localspec.formats.conversion import QUANTIZATIONS, Checkpoint, begin_gguf, gguf_name, interleave_heads
from localspec.testing.gguf_checkpoint import read_gguf

Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all)."""

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FORMATS = {"gguf": QUANTIZATIONS, "safetensors": tuple(_SAFETENSORS)}
"""Types that a matrix may be stored in, by format."""

_SHARD = 5 * 10**9  # bytes of a safetensors file, as the Hub has them


@dataclass(slots=True)
class Expansion:
    """What was written. num_kept: values of the small model.  num_rounded: those that the type cannot hold exactly.
    worst: the largest of their changes, relative to the largest value of its tensor."""

    path: str
    kind: str
    num_parameters: int
    num_bytes: int
    num_layers: int
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    num_kept: int = 0
    num_rounded: int = 0
    worst: float = 0.0

    @property
    def exact(self) -> bool:
        """Is every number of the small model in the file as it was?"""
        return self.num_rounded == 0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        function = "exactly the source's function: all its numbers are kept"
        if not self.exact:
            function = (
                f"the function of the source stored as {self.kind}: {self.num_rounded} of its {self.num_kept} numbers "
                f"are rounded, by at most {self.worst:.1e} of the largest in their tensor"
            )
        shape = f"{self.num_layers} layers of {self.hidden}, MLP {self.inner}, "
        shape += f"{self.num_heads} heads, {self.num_kv_heads} of keys and values"
        return [
            f"{self.path}: {self.num_parameters / 1e9:.2f}B parameters, {self.kind}, {self.num_bytes / 1e9:.2f} GB",
            shape,
            function,
        ]


def read_source(path: Path) -> Checkpoint:
    """A safetensors folder or a GGUF file. Raises ModelFileError, UnsupportedModelError, BackendMissingError."""
    _require_gguf()
    if path.is_dir():
        try:
            return Checkpoint.from_folder(path)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path} is not a model folder that can be expanded", got=error) from error
    return read_gguf(path)


def expand(
    source: Path,
    output: Path,
    size: Size,
    form: str,
    kind: str,
    *,
    seed: int = 0,
    force: bool = False,
    on_bytes: Progress = lambda done, total: None,
) -> Expansion:
    """Write a model of `size` with the function of `source` to `output`, a file (gguf) or a folder (safetensors).

    The same source, size, type and seed give the same bytes. Nothing is at `output` until all is written.
    Raises SettingError for a format or type that does not exist and where `output` exists and `force` is not set,
    DiskError where there is no room, and what `read_source` and `lay_out` raise.
    """
    if form not in FORMATS or kind not in FORMATS[form]:
        known = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in FORMATS.items())
        raise SettingError("there is no such type in that format", got=f"{form} {kind}", expected=known)
    if output.exists() and not force:
        raise SettingError(f"{output} exists", fix="Name another output, or replace it with --force.")
    if not output.resolve().parent.is_dir():
        raise SettingError(f"no such folder: {output.resolve().parent}", fix="Make it first.")
    small = read_source(source)
    layout = lay_out(small.config, small.weights, size)
    job = _Job(small, layout, Encoding(_SAFETENSORS.get(kind, kind)), form, seed, on_bytes)
    _require_room(output, job.num_bytes)
    partial = output.with_name(f"{output.name}.partial")
    _remove(partial)
    try:
        if form == "gguf":
            job.write_gguf(partial, kind, f"{source.resolve().name} expanded to {layout.num_parameters / 1e9:.1f}B")
        else:
            job.write_folder(partial, kind)
        _remove(output)
        partial.rename(output)
    finally:
        _remove(partial)
    config = layout.config
    return Expansion(
        path=str(output),
        kind=kind,
        num_parameters=layout.num_parameters,
        num_bytes=job.num_bytes,
        num_layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        num_kept=job.num_kept,
        num_rounded=job.num_rounded,
        worst=job.worst,
    )


class _Job:
    """One expansion under way. Vectors are float32 in GGUF and of the matrices' type in safetensors."""

    def __init__(
        self, small: Checkpoint, layout: Layout, encoding: Encoding, form: str, seed: int, on_bytes: Progress
    ) -> None:
        self._small, self._layout, self._on_bytes = small, layout, on_bytes
        self._matrix = encoding
        self._vector = Encoding("F32") if form == "gguf" else encoding
        self._interleaved = form == "gguf"
        self._noise = {e.name: Noise(e, seed) for e in (self._matrix, self._vector)}
        self.num_bytes = sum(self._size(tensor) for tensor in layout.tensors)
        self._done = 0
        self._counted: set[str] = set()
        self.num_kept, self.num_rounded, self.worst = 0, 0, 0.0

    def write_gguf(self, path: Path, kind: str, name: str) -> None:
        """One file."""
        grown = replace(self._small, config=self._layout.config)
        text = "The cost of a larger model with the function of a small one, for measuring; no better than that one."
        writer = begin_gguf(path, grown, kind, name=name, description=text)
        try:
            for tensor in self._layout.tensors:
                e = self._encoding(tensor)
                shape = (
                    tensor.shape if e.block == 1 else (*tensor.shape[:-1], tensor.shape[-1] // e.block * e.num_bytes)
                )
                stored = np.dtype({"F32": np.float32, "F16": np.float16}.get(e.name, np.uint8))
                writer.add_tensor_info(gguf_name(tensor.name), shape, stored, self._size(tensor), raw_dtype=e.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, blocks in self._written():
                writer.write_tensor_data(blocks)
        finally:
            writer.close()

    def write_folder(self, path: Path, kind: str) -> None:
        """A folder with parts of at most five gigabytes, their index, configuration and tokenizer."""
        path.mkdir()
        parts: list[list[Grown]] = [[]]
        for tensor in self._layout.tensors:
            if sum(map(self._size, parts[-1])) + self._size(tensor) > _SHARD and parts[-1]:
                parts.append([])
            parts[-1].append(tensor)
        written, places = self._written(), {}
        for number, part in enumerate(parts, 1):
            name = "model.safetensors"
            if len(parts) > 1:
                name = f"model-{number:05}-of-{len(parts):05}.safetensors"
            with (path / name).open("wb") as file:
                file.write(self._header(part))
                for tensor, blocks in islice(written, len(part)):
                    blocks.tofile(file)
                    places[tensor.name] = name
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": places}
        config = {**self._layout.config, "torch_dtype": kind}
        files: list[tuple[str, Mapping[str, Any]]] = [
            ("config.json", config),
            ("tokenizer.json", self._small.tokenizer),
            ("tokenizer_config.json", self._small.tokenizer_config),
        ]
        if len(parts) > 1:
            files.append(("model.safetensors.index.json", index))
        for title, data in files:
            (path / title).write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")

    def _header(self, part: list[Grown]) -> bytes:
        """Of a safetensors file with these tensors: its length, then JSON, so that tensors can follow one by one."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in part:
            start, end = end, end + self._size(tensor)
            entries[tensor.name] = {
                "dtype": self._encoding(tensor).name,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _written(self) -> Iterator[tuple[Grown, Blocks]]:
        """Each tensor as it is stored; progress is told behind it."""
        for tensor in self._layout.tensors:
            yield tensor, self._built(tensor)
            self._done += self._size(tensor)
            self._on_bytes(self._done, self.num_bytes)

    def _encoding(self, tensor: Grown) -> Encoding:
        return self._matrix if len(tensor.shape) == 2 else self._vector

    def _size(self, tensor: Grown) -> int:
        e = self._encoding(tensor)
        return math.prod(tensor.shape) // e.block * e.num_bytes

    def _built(self, tensor: Grown) -> Blocks:
        """[rows, blocks, bytes]: what is kept, zeros, and random numbers, as `Part` says."""
        e, noise = self._encoding(tensor), self._noise[self._encoding(tensor).name]
        kept = None if tensor.source is None else self._kept(tensor, e)
        if len(tensor.shape) == 1:
            return _vector(tensor, kept, e, noise)
        rows, columns = tensor.shape
        if tensor.part is Part.READER:
            blocks = noise.matrix(tensor.name, rows, columns)
            if kept is not None:
                blocks[: len(kept)] = e.zeros(len(kept), columns)
        else:
            blocks = e.zeros(rows, columns)
        if kept is None:
            return blocks
        num_rows, num_blocks = kept.shape[:2]
        for copy in range(self._layout.copies):
            down = copy * num_rows if tensor.part is Part.WRITER else 0
            right = copy * num_blocks if tensor.part is Part.EMBEDDING else 0
            blocks[down : down + num_rows, right : right + num_blocks] = kept
        return blocks

    def _kept(self, tensor: Grown, e: Encoding) -> Blocks:
        """The small model's tensor as it is stored; counts what rounding changed."""
        assert tensor.source is not None
        if tensor.source not in self._small.weights:
            raise ModelFileError("the source lacks a tensor", got=tensor.source)
        values = self._small.weights[tensor.source]
        if self._interleaved:
            values = interleave_heads(tensor.source, values, self._small.config)
        e.check(tensor.source, values.shape[-1])
        blocks = e.encode(values)
        if tensor.source not in self._counted:
            self._counted.add(tensor.source)
            self._count(values, e.decode(blocks))
        return blocks

    def _count(self, values: Values, stored: Values) -> None:
        change = np.abs(stored - values)
        self.num_kept += values.size
        self.num_rounded += int(np.count_nonzero(change))
        largest = float(np.abs(values).max(initial=0.0))
        if largest:
            self.worst = max(self.worst, float(change.max()) / largest)


def _vector(tensor: Grown, kept: Blocks | None, e: Encoding, noise: Noise) -> Blocks:
    """[entries, bytes]."""
    (length,) = tensor.shape
    if tensor.part is Part.BIAS:
        blocks: Blocks = noise.matrix(tensor.name, 1, length)[0]
        if kept is not None:
            blocks[: len(kept)] = kept
        return blocks
    if kept is None:
        kept = e.encode(np.ones(length, np.float32))
    repeated: Blocks = np.tile(kept, (length // len(kept), 1))
    return repeated


def _require_gguf() -> None:
    if find_spec("gguf") is None:
        raise BackendMissingError("expanding a model needs the package gguf", fix="Run `pip install gguf`.")


def _require_room(output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(output.resolve().parent).free
    if num_bytes > free:
        raise DiskError(
            "there is no room for the expanded model",
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{num_bytes / 1e9:.1f} GB",
            fix="Free some, or write it elsewhere.",
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
