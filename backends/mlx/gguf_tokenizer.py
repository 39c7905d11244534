"""A tokenizer from GGUF metadata: byte-level BPE with a known split, or sentencepiece."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from localspec.errors import ModelFileError, UnsupportedModelError
from localspec.formats.gguf import Value

from .tokenizer import MlxTokenizer, end_tokens

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types; 1 is ordinary, 5 unused, 6 a byte

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LETTERS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (_LETTERS + r"\p{N}{1,3}" + _REST,)
_QWEN2 = (_LETTERS + r"\p{N}" + _REST,)
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_STARCODER = (r"\p{N}", _GPT2)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001 - a range of Japanese letters
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)

SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "mellum", "a.x-4.0", "gigachat"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "qwen35": _QWEN35,
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _STARCODER),
    "falcon": _FALCON,
    "deepseek-v3": _DEEPSEEK3,
}
"""The split into words before merging, per value of `tokenizer.ggml.pre`: regular expressions applied
one after the other, each to the pieces the last one left. As in llama.cpp's `llama-vocab.cpp`."""

_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"})
"""A word that is a token is that token, whatever the merges say; these also start with a BOS by default."""


def open_gguf_tokenizer(metadata: Mapping[str, Value]) -> MlxTokenizer:
    """Raises UnsupportedModelError for a kind of tokenizer or split that is not known, ModelFileError
    where the metadata does not fit together."""
    texts = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise ModelFileError("the GGUF header lacks tokenizer.ggml.tokens")
    ids = {text: token for token, text in enumerate(texts)}
    if len(ids) != len(texts):
        raise ModelFileError("the GGUF vocabulary holds a text twice", got=f"{len(texts) - len(ids)} times")
    kinds = _token_types(metadata, len(texts))
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model == "gpt2":
        inner, is_bpe = _byte_level(ids, metadata, pre), True
    elif model == "llama":
        inner, is_bpe = _sentencepiece(texts, ids, kinds, metadata), False
    else:
        raise UnsupportedModelError("the tokenizer's model is not known", got=model, expected="gpt2 or llama")
    control = frozenset(np.flatnonzero((kinds == _CONTROL) | (kinds == _UNKNOWN)).tolist())
    user = frozenset(np.flatnonzero(kinds == _USER_DEFINED).tolist())
    inner.add_special_tokens([AddedToken(texts[i], special=True, normalized=False) for i in sorted(control)])
    inner.add_tokens([AddedToken(texts[i], special=False, normalized=False) for i in sorted(user)])
    named = {
        name: _token(metadata, f"tokenizer.ggml.{name}_token_id", len(texts)) for name in ("bos", "eos", "eot", "eom")
    }
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", not is_bpe or pre in _WHOLE_WORDS)
    template = metadata.get("tokenizer.chat_template")
    bos, ends = named["bos"], {named[name] for name in ("eos", "eot", "eom")}
    return MlxTokenizer(
        inner,
        texts,
        "byte-level" if is_bpe else "sentencepiece",
        verbatim=control | user,
        control=control,
        bos=bos if add_bos else None,
        stop_tokens=end_tokens(ids, {end for end in ends if end is not None}),
        chat_template=template if isinstance(template, str) else None,
        template_tokens=_template_tokens(metadata, texts),
    )


def _token_types(metadata: Mapping[str, Value], num_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return np.ones(num_tokens, np.int32)
    if not isinstance(kinds, np.ndarray) or len(kinds) != num_tokens:
        raise ModelFileError("tokenizer.ggml.token_type does not fit the vocabulary", expected=num_tokens)
    return kinds.astype(np.int32)


def _token(metadata: Mapping[str, Value], key: str, num_tokens: int) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) and 0 <= value < num_tokens else None


def _template_tokens(metadata: Mapping[str, Value], texts: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    found = {name: _token(metadata, f"tokenizer.ggml.{key}_token_id", len(texts)) for name, key in keys.items()}
    return {name: texts[token] for name, token in found.items() if token is not None}


def _byte_level(ids: dict[str, int], metadata: Mapping[str, Value], pre: object) -> Tokenizer:
    if not isinstance(pre, str) or pre not in SPLITS:
        raise UnsupportedModelError(
            "the tokenizer's split into words is not known",
            got=pre,
            expected=f"one of {', '.join(sorted(SPLITS))}",
            fix="Use the llamacpp backend, or the model's safetensors folder.",
        )
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise ModelFileError("the GGUF header lacks tokenizer.ggml.merges")
    merges = []
    for line in lines:
        left, _, right = line[1:].partition(" ")  # the first character may be a space itself
        merges.append((line[:1] + left, right))
    try:
        inner = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    except Exception as error:  # the library raises plain Exception
        raise ModelFileError("merges and vocabulary do not fit together", got=error) from error
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, whole])
    return inner


def _sentencepiece(
    texts: list[str],
    ids: dict[str, int],
    kinds: np.ndarray[tuple[int], np.dtype[np.int32]],
    metadata: Mapping[str, Value],
) -> Tokenizer:
    """BPE by score. The merges are all ways to cut a token in two, best score first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(texts):
        raise ModelFileError("tokenizer.ggml.scores does not fit the vocabulary", expected=len(texts))
    ordinary = {text for text, token in ids.items() if kinds[token] in (1, _USER_DEFINED)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token in np.flatnonzero(kinds == 1).tolist():
        text = texts[token]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ordinary and right in ordinary:
                ranked.append((-float(scores[token]), ids[left], ids[right], left, right))
    ranked.sort()
    unknown = _token(metadata, "tokenizer.ggml.unknown_token_id", len(texts))
    unknown_text = texts[unknown] if unknown is not None else None
    try:
        inner = Tokenizer(
            models.BPE(
                vocab=ids,
                merges=[(left, right) for *_, left, right in ranked],
                unk_token=unknown_text,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    except Exception as error:
        raise ModelFileError("the vocabulary cannot be used", got=error) from error
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    inner.normalizer = normalizers.Sequence(steps)
    return inner
