"""What is never fetched: weights that can run code, code itself, names that leave the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from localspec.errors import ModelFileError, UntrustedModelError

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".keras", ".msgpack", ".joblib", ".npy", ".npz")
_CODE_KEYS = ("auto_map", "model_file", "custom_pipelines")
_MOST_JSON = 64 << 20  # bytes; the longest real tokenizers and indices take half of it
_LONGEST_NAME = 400


def check_names(names: Iterable[str], repo: str) -> None:
    """Raise UntrustedModelError if a name could leave the folder it is written to, here or on Windows.

    One such name refuses the whole repository, wanted or not: nobody makes one by accident.
    """
    for name in names:
        if problem := _problem(name):
            raise UntrustedModelError(
                f"{repo} lists a file whose name {problem}",
                got=ascii(name[:120]),
                expected="plain relative names",
                fix="Nothing was fetched. Do not use this repository.",
            )


def is_safe_name(name: str) -> bool:
    """May a file of this name be written below a folder?"""
    return not _problem(name)


def _problem(name: str) -> str:
    parts = name.split("/")
    if not name or len(name) > _LONGEST_NAME:
        return "is empty or too long"
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of its folder"
    if "\\" in name or any(PureWindowsPath(part).drive for part in parts):
        return "is a path of Windows"
    if not name.isprintable():
        return "has control characters"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "is not text"
    return ""


def check_weights(names: Iterable[str], repo: str) -> None:
    """Raise UntrustedModelError if the only weights among the names are pickled ones."""
    names = list(names)
    pickled = [name for name in names if name.lower().endswith(_PICKLED)]
    if pickled and not any(name.endswith((".gguf", ".safetensors")) for name in names):
        raise UntrustedModelError(
            f"{repo} has its weights in a format that can run code when it is read",
            got=pickled[0],
            expected="safetensors or GGUF",
            fix="Choose a repository with one of these.",
        )


def check_config(path: Path, name: str, repo: str) -> None:
    """Raise UntrustedModelError if a JSON file says that the model brings its own code.

    Raises ModelFileError for what is not a JSON object.
    """
    content = read_json(path, f"{name} of {repo}")
    for key in _CODE_KEYS:
        if content.get(key):
            raise UntrustedModelError(
                f"{repo} brings its own code, which is never fetched or run",
                got=f"{key} in {name}: {json.dumps(content[key])[:120]}",
                fix="Choose a conversion without it, for instance a GGUF file.",
            )


def check_content(path: Path, name: str, repo: str) -> None:
    """Raise UntrustedModelError if weights do not begin like the format that their name claims."""
    with path.open("rb") as file:
        start = file.read(9)
    if name.endswith(".gguf"):
        fits = start[:4] == b"GGUF"
    elif name.endswith(".safetensors"):
        length = int.from_bytes(start[:8], "little")
        fits = start[8:9] == b"{" and length <= path.stat().st_size - 8
    else:
        return
    if not fits:
        raise UntrustedModelError(
            f"{name} of {repo} is not what its name says",
            got=f"a file that begins with {start[:8]!r}",
            fix="It was deleted. Do not use this repository.",
        )


def read_json(path: Path, what: str) -> dict[str, object]:
    """A JSON object from a file. Raises ModelFileError; at most 64 MiB are read."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError("it is too large")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} cannot be read", got=str(error)) from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{what} is not a JSON object", got=type(content).__name__)
    return content
