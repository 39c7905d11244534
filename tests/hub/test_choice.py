"""Which files of a repository make the model that was asked for."""

from __future__ import annotations

import pytest

from localspec.errors import HubMissingError
from localspec.hub.choice import choose_format, choose_gguf, gguf_models, small_files, weight_files

MANY = [
    "Model-7B-BF16.gguf",
    "Model-7B-IQ4_XS.gguf",
    "Model-7B-Q4_0.gguf",
    "Model-7B-Q4_K_M.gguf",
    "Model-7B-Q8_0.gguf",
    "Model-7B-UD-Q2_K_XL.gguf",
    "mmproj-Model-7B-Q4_K_M.gguf",
    "MTP/mtp-Model-7B-Q8_0.gguf",
]
SPLIT = [f"Q6_K/Big-Q6_K-0000{part}-of-00003.gguf" for part in (1, 2, 3)]


@pytest.mark.parametrize(
    ("names", "choice", "expected"),
    [
        (MANY, None, "Model-7B-Q4_K_M.gguf"),
        (MANY, "q8_0", "Model-7B-Q8_0.gguf"),
        (MANY, "bf16", "Model-7B-BF16.gguf"),
        (MANY, "UD-Q2_K_XL", "Model-7B-UD-Q2_K_XL.gguf"),
        (MANY, "Q2_K_XL", "Model-7B-UD-Q2_K_XL.gguf"),
        (MANY, "MTP/mtp-Model-7B-Q8_0.gguf", "MTP/mtp-Model-7B-Q8_0.gguf"),
        (["only.gguf"], None, "only.gguf"),
        (["target.gguf", "draft.gguf"], "draft", "draft.gguf"),
        (["target.gguf", "draft.gguf"], "draft.gguf", "draft.gguf"),
        (["model.Q5_K_M.gguf", "model.F16.gguf"], None, "model.Q5_K_M.gguf"),
        (["Q4_0/model.gguf", "Q8_0/model.gguf"], "Q8_0", "Q8_0/model.gguf"),
        (["gpt-oss-20b-mxfp4.gguf"], "MXFP4", "gpt-oss-20b-mxfp4.gguf"),
        ([*SPLIT, *MANY], "Q6_K", SPLIT[0]),
    ],
)
def test_one_model_is_chosen(names: list[str], choice: str | None, expected: str) -> None:
    assert choose_gguf(names, choice, "org/repo").files[0] == expected


def test_parts_belong_together_in_order() -> None:
    assert choose_gguf(reversed(SPLIT), None, "org/repo").files == tuple(SPLIT)
    with pytest.raises(HubMissingError, match=r"lacks parts of Q6_K/Big-Q6_K \(got 2 parts, expected 3\)"):
        choose_gguf(SPLIT[:2], None, "org/repo")
    assert len(gguf_models([*SPLIT, "Q6_K/Big-Q6_K-00001-of-00002.gguf"])) == 2


@pytest.mark.parametrize(
    ("names", "choice", "words"),
    [
        (MANY, "Q3_K_M", r"no model 'Q3_K_M' \(expected one of .*IQ4_XS, Q4_0"),
        (["target.gguf", "draft.gguf"], None, r"several models.*expected one of draft, target"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0", r"several models of quantisation Q4_0 .*one of a-Q4_0, b-Q4_0"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], None, r"several models.*one of a-Q4_0, b-Q4_0"),
        ([], "Q4_0", r"nothing: there is no GGUF file"),
    ],
)
def test_what_is_not_there_or_not_clear_is_refused_with_a_list(
    names: list[str], choice: str | None, words: str
) -> None:
    with pytest.raises(HubMissingError, match=words):
        choose_gguf(names, choice, "org/repo")


def test_the_format_follows_the_backend_and_what_is_there() -> None:
    both = ["config.json", "model.safetensors", "m-Q4_0.gguf"]
    assert choose_format(both, None, ("safetensors", "gguf"), "r") == "safetensors"
    assert choose_format(both, None, ("gguf",), "r") == "gguf"
    assert choose_format(both, "Q4_0", ("safetensors", "gguf"), "r") == "gguf", "a choice is one among GGUF files"
    assert choose_format(both[:2], None, ("gguf", "safetensors"), "r") == "safetensors"
    with pytest.raises(HubMissingError, match=r"got safetensors, expected gguf.*another --backend"):
        choose_format(both[:2], None, ("gguf",), "r")
    with pytest.raises(HubMissingError, match="no GGUF files to choose 'Q4_0' from"):
        choose_format(both[:2], "Q4_0", ("gguf", "safetensors"), "r")
    with pytest.raises(HubMissingError, match="neither"):
        choose_format(["README.md"], None, ("gguf",), "r")


def test_a_folder_is_configuration_tokenizer_and_the_weights_of_its_index() -> None:
    names = ["config.json", "tokenizer.json", "run.py", "model.safetensors", "extra.safetensors", "x/y.safetensors"]
    assert small_files(names) == ["config.json", "tokenizer.json"]
    assert weight_files(names, None, "r") == ["model.safetensors"]
    assert weight_files(names, {"weight_map": {"a": "extra.safetensors"}}, "r") == ["extra.safetensors"]
    assert weight_files(["a.safetensors", "b.safetensors"], None, "r") == ["a.safetensors", "b.safetensors"]
