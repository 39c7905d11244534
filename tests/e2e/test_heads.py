"""The trained head of the development models, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import main
from localspec.loading import get_backend

PROMPT = "Write a Python function that returns the n-th Fibonacci number."


@pytest.mark.shared
@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_head_guesses_and_the_text_is_plain_decodings(shared_models: Path, temperature: str) -> None:
    """Named as a head, or as a draft model; a chain, a tree, and whatever the schedule decides."""
    if not get_backend("mlx").is_installed():
        pytest.skip(f"needs mlx: {get_backend('mlx').report().install_command}")

    def generate(*options: str) -> dict[str, Any]:
        common = ["--backend", "mlx", "--dtype", "float32", "--context", "256", "--max-tokens", "24", "--seed", "3"]
        target = ["--target", str(shared_models / "target"), "--temperature", temperature, "--json"]
        result = CliRunner().invoke(main, ["generate", PROMPT, *common, *target, *options])
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout))

    head = str(shared_models / "dspark")
    plain = generate("--plain")
    chain = generate("--head", head, "--drafter", "dspark")
    assert [one["kind"] for one in chain["heads"]] == ["dspark"]
    assert chain["stats"]["accepted_by_source"]["dspark"] > 5
    others = [
        generate("--draft", head, "--drafter", "dspark:shape=tree,num=12"),
        generate("--head", head),
    ]
    for made in (chain, *others):
        assert made["text"] == plain["text"]
