"""Numbers of an answer, under the names that clients of several programs know."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from localspec.engine.answer import Generation
from localspec.engine.round import TokenLogprob
from localspec.engine.stats import Stats
from localspec.protocols import Tokenizer
from localspec.server.reply import Reply

_LEAST_LOGPROB = -9999.0  # JSON has no infinities; OpenAI writes this


def num_prompt_tokens(replies: Sequence[Reply], num_choices: int) -> int:
    """Tokens of the prompts, each counted once."""
    return sum(reply.generation.num_prompt_tokens for reply in replies[::num_choices])


def num_cached_tokens(replies: Sequence[Reply], num_choices: int) -> int:
    """Those of them that were not computed again."""
    return sum(reply.generation.stats.num_reused for reply in replies[::num_choices])


def num_answer_tokens(replies: Sequence[Reply]) -> int:
    """Tokens of all replies."""
    return sum(len(reply.generation.tokens) for reply in replies)


def usage(replies: Sequence[Reply], num_choices: int) -> dict[str, Any]:
    """OpenAI's `usage`."""
    prompt, written = num_prompt_tokens(replies, num_choices), num_answer_tokens(replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens(replies, num_choices)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def timings(reply: Reply) -> dict[str, Any]:
    """llama.cpp's `timings`: milliseconds and tokens per second, prompt and answer apart."""
    stats, times = reply.generation.stats, reply.timings
    decode_ms = max(times.total_ms - times.queued_ms - times.prefill_ms, 0.0)
    written = len(reply.generation.tokens)
    return {
        "cache_n": stats.num_reused,
        "prompt_n": stats.num_prefilled,
        "prompt_ms": round(times.prefill_ms, 3),
        "prompt_per_token_ms": _ratio(times.prefill_ms, stats.num_prefilled),
        "prompt_per_second": _ratio(1e3 * stats.num_prefilled, times.prefill_ms),
        "predicted_n": written,
        "predicted_ms": round(decode_ms, 3),
        "predicted_per_token_ms": _ratio(decode_ms, written),
        "predicted_per_second": _ratio(1e3 * written, decode_ms),
        "draft_n": stats.num_drafted,
        "draft_n_accepted": stats.num_accepted,
        "queued_ms": round(times.queued_ms, 3),
        "first_token_ms": None if times.first_token_ms is None else round(times.first_token_ms, 3),
        "total_ms": round(times.total_ms, 3),
    }


def speculation(generation: Generation) -> dict[str, Any]:
    """What was done about this request, as it turned out."""
    return {
        "drafter": generation.drafter,
        "acceptance": generation.acceptance,
        "width_class": generation.width_class,
        "plain_because": generation.plain_because,
        "accepted_length": round(generation.stats.accepted_length, 4),
        "num_rounds": generation.stats.num_rounds,
        "drafted_by_source": generation.stats.drafted_by_source,
        "accepted_by_source": generation.stats.accepted_by_source,
    }


def metrics(replies: Sequence[Reply]) -> dict[str, Any] | None:
    """vLLM's `metrics`; as there, None for several replies."""
    return {"speculative_decoding": speculative_decoding(replies[0].generation.stats)} if len(replies) == 1 else None


def speculative_decoding(stats: Stats) -> dict[str, Any]:
    """vLLM's object of that name. Its steps are the rounds in which something was guessed, and its acceptance length
    counts the bonus; entry k of the histogram counts the steps that accepted k guesses."""
    steps = stats.drafted_by_depth[0] if stats.drafted_by_depth else 0
    reached = [steps, *stats.accepted_by_depth, 0]
    return {
        "mean_acceptance_length": round(1.0 + stats.num_accepted / steps, 4) if steps else None,
        "draft_acceptance_rate": _ratio(stats.num_accepted, stats.num_drafted),
        "acceptance_histogram": [here - further for here, further in pairwise(reached)],
        "num_spec_steps": steps,
        "num_draft_tokens": stats.num_drafted,
        "num_accepted_draft_tokens": stats.num_accepted,
        "num_spec_tokens": len(stats.drafted_by_depth),
    }


def chat_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """As the chat and responses interfaces write them."""
    return [
        {
            **_token(entry.token, entry.logprob, tokenizer),
            "top_logprobs": [_token(token, value, tokenizer) for token, value in entry.top],
        }
        for entry in logprobs
    ]


def completion_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, start: int) -> dict[str, Any]:
    """As the completions interface writes them. start: characters before the first of these tokens."""
    texts = [_text(entry.token, tokenizer) for entry in logprobs]
    offsets = []
    for text in texts:
        offsets.append(start)
        start += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(entry.logprob, _LEAST_LOGPROB) for entry in logprobs],
        "top_logprobs": [
            {_text(token, tokenizer): max(value, _LEAST_LOGPROB) for token, value in entry.top} for entry in logprobs
        ],
        "text_offset": offsets,
    }


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(raw)}


def _text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


def _ratio(amount: float, of: float) -> float:
    return round(amount / of, 4) if of else 0.0
