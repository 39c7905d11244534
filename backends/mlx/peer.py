"""mlx-lm's own decoding (`mlx_lm.stream_generate`), plain and with a draft model, for benchmarks.

It loads the folders itself, without our grafts, and computes in the type that our backend would choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

from localspec.errors import UsageError
from localspec.peers import Peer, PeerAnswer, PeerLibrary, PeerMode, PeerRequest, require
from localspec.protocols import LoadSettings

from .border import translated

_DRAFT = {"num": 3}
"""What mlx-lm's own command line drafts where nothing else is said."""


class MlxLm:
    """`PeerLibrary` over mlx-lm."""

    name = "mlx-lm"
    backend = "mlx"

    def version(self) -> str:
        """Of mlx-lm."""
        try:
            return metadata.version("mlx-lm")
        except metadata.PackageNotFoundError:
            return ""

    def open(self, target: Path, draft: Path | None, settings: LoadSettings, modes: Sequence[PeerMode]) -> list[Peer]:
        """Plain, then the draft model once per mode, if there is one whose vocabulary is the target's."""
        reads = "a folder with config.json and safetensors"
        for path in (target, draft):
            if path is not None:
                require(self, readable=path.is_dir(), path=path, reads=reads)
        lengths = [mode.get(_DRAFT)["num"] for mode in modes]
        with translated(f"mlx-lm loading {target.name}"):
            model, tokenizer = _load(target, settings)
            peers: list[Peer] = [MlxPeer(f"{self.name} plain", model, tokenizer, None, 0)]
            if draft is None:
                return peers
            helper, other = _load(draft, settings)
        if other.vocab_size != tokenizer.vocab_size:
            if any(mode.settings for mode in modes):
                raise UsageError(
                    "mlx-lm drafts with a model of the target's vocabulary only",
                    got=f"{other.vocab_size} tokens",
                    expected=tokenizer.vocab_size,
                )
            return peers
        peers += (
            MlxPeer(f"{self.name} draft_model:num={length}", model, tokenizer, helper, length) for length in lengths
        )
        return peers


class MlxPeer:
    """mlx-lm's generator over a loaded model. draft: what guesses `num_draft` tokens, or None to decode plainly."""

    def __init__(self, name: str, model: Any, tokenizer: Any, draft: Any, num_draft: int) -> None:
        self.name = name
        self._model, self._tokenizer, self._draft, self._num_draft = model, tokenizer, draft, num_draft

    def decode(self, request: PeerRequest) -> PeerAnswer:
        """Through `stream_generate`."""
        import mlx.core as mx
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        settings: dict[str, Any] = {"draft_model": self._draft} if self._draft is not None else {}
        if self._draft is not None:
            settings["num_draft_tokens"] = self._num_draft
        self._tokenizer.eos_token_ids = request.stop_tokens
        tokens: list[int] = []
        num_own = num_in_first = 0
        first = last = 0.0
        with translated("mlx-lm decoding"):
            mx.random.seed(request.seed)
            for response in stream_generate(
                self._model,
                self._tokenizer,
                list(request.tokens),
                max_tokens=request.max_tokens,
                sampler=make_sampler(temp=request.temperature),
                **settings,
            ):
                last = perf_counter()
                tokens.append(int(response.token))
                if num_own == 0:  # guesses taken in the first round come with the prompt, too
                    first, num_in_first = last, len(tokens)
                num_own += not response.from_draft
        # each round ends with a token of the target's own, unless the answer's end cut it
        num_rounds = num_own + bool(response.from_draft)
        return PeerAnswer(
            tuple(tokens),
            len(tokens) - num_in_first,
            (last - first) * 1e3,
            num_rounds,
            None if self._draft is None else num_rounds * self._num_draft,
        )

    def close(self) -> None:
        """Let go of the models."""
        self._model = self._draft = None


def _load(path: Path, settings: LoadSettings) -> tuple[Any, Any]:
    import mlx.core as mx
    from mlx_lm import load

    from .loader import compute_in

    model, tokenizer = load(str(path), lazy=True)[:2]
    compute_in(model, settings.dtype, None)
    mx.eval(model.parameters())
    return model, tokenizer


PEER: PeerLibrary = MlxLm()
