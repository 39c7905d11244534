"""Converts a small Hugging Face checkpoint to a GGUF file; made the bundled pair in models/tiny.

    python scripts/make_tiny_pair.py FOLDER/target models/tiny/target.gguf Q4_0
    python scripts/make_tiny_pair.py FOLDER/draft models/tiny/draft.gguf Q8_0

FOLDER/target holds config.json, model.safetensors, tokenizer.json and tokenizer_config.json of a
dense llama, qwen2 or qwen3 model. Needs the package `gguf`. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from localspec.formats.conversion import QUANTIZATIONS, Checkpoint, write_gguf_file


def main() -> None:
    """Convert one model as the arguments say and print the file's size and SHA-256."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Hugging Face folder")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    parser.add_argument("quantization", choices=QUANTIZATIONS, help="type of all matrices")
    parser.add_argument("--name", default="", help="name in the metadata (default: localspec tiny <source folder>)")
    parser.add_argument("--licence", default="mit", help="licence in the metadata (default: %(default)s)")
    options = parser.parse_args()
    write_gguf_file(
        options.output,
        Checkpoint.from_folder(options.source),
        options.quantization,
        name=options.name or f"localspec tiny {options.source.name}",
        licence=options.licence,
        description="A small model that shows localspec offline; not an assistant.",
    )
    content = options.output.read_bytes()
    print(f"{options.output}  {len(content):,} bytes  sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
