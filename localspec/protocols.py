"""The contracts: what a backend, a model's state, its scores, a tokenizer and a drafter must do.

One `forward` serves prefill, plain decoding, chains, trees and many sequences at once:

    state = model.open()
    [scores] = model.forward([Step(state, (HostTokens(ids),), chain_parents(state, len(ids)))])
    state.keep([0, 1, 2])            # commits one path of the pending nodes, drops the others

Tokens given to `forward` become *pending nodes* of their sequence. Pending nodes are numbered from
0 in the order in which they were given, over all forwards since the last `keep`; each names its
parent by that number, or -1 for the last committed token. A node sees the committed tokens, its
ancestors and itself, and stands at position `state.length + depth` (depth 0: child of -1). So a
verifier sends a whole tree in one call and a drafter grows one level by level with the same call.

`localspec/testing/reference.py` is the definition in slow numpy; `localspec/testing/conformance.py`
is the suite that any implementation must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from localspec.errors import UnsupportedModelError
from localspec.tree.mask import depths
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits, NodeIndices, NoiseKeys, Probabilities, TokenIds

if TYPE_CHECKING:
    from localspec.context import Context
    from localspec.preparation import MemoryPlanner, Quantizer
    from localspec.sampling import Law, Sampler
    from localspec.tree.grow import Grower


# ---------------------------------------------------------------- tokens and scores


class Tokens(Protocol):
    """[T] token ids that may still be on the device. Their number is known before their values."""

    def __len__(self) -> int: ...

    def numpy(self) -> TokenIds:
        """[T] the ids on the host. May wait for the device; tokens made earlier are then there too, so
        whoever wants several reads the newest first."""
        ...


@dataclass(frozen=True, slots=True)
class HostTokens:
    """Token ids that are already on the host."""

    ids: TokenIds

    def __len__(self) -> int:
        return len(self.ids)

    def numpy(self) -> TokenIds:
        """[T] the ids."""
        return self.ids


class Top(Protocol):
    """The k best tokens of N rows; may still be on the device."""

    @property
    def tokens(self) -> Tokens:
        """[N * k] row by row, best first; does not wait."""
        ...

    def numpy(self) -> tuple[TokenIds, Logits]:
        """([N, k] ids, [N, k] what they were ranked by). Waits for the device."""
        ...


class Scores(Protocol):
    """The model's raw logits [N, V] for the N scored rows of one step, wherever they live.

    Only what is asked for crosses to the host. Valid until the model's next `forward`, after which
    every method raises `StaleScoresError` (or keeps answering correctly, if nothing was overwritten).
    """

    @property
    def num_rows(self) -> int:
        """N."""
        ...

    def argmax(self) -> Tokens:
        """[N] the best token of each row, the lowest id among equals."""
        ...

    def winners(self, temperature: float, keys: NoiseKeys) -> Tokens:
        """[N] argmax_v of logits / temperature + Gumbel(keys[row], v); temperature > 0, keys [N, 2] as in
        `noise.py`."""
        ...

    def top(self, k: int, temperature: float = 0.0, keys: NoiseKeys | None = None) -> Top:
        """The k <= V best tokens of each row, best first: by logit, or with a temperature and keys [N, 2] by
        logits / temperature + Gumbel(keys[row], v)."""
        ...

    def rows(self, indices: Sequence[int]) -> Logits:
        """[len(indices), V] float32 logits on the host. Must not be written to."""
        ...


# ---------------------------------------------------------------- model and state


class Rewind(Enum):
    """What dropping tokens costs a model's state.

    FREE: nothing.  REPLAY: the state depends on the path by which it was reached (recurrent layers), so
    dropping tokens goes back to a snapshot and runs what was kept again; `num_replayed` counts those tokens.
    NEVER: a `keep` that would drop nodes, and `truncate` to anything but 0, empties the state and raises
    UnsupportedModelError; such a model can only be decoded plainly, one token wide.
    """

    FREE = "free"
    REPLAY = "replay"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class WidthClass:
    """Widths (tokens per forward) whose rows are bit-identical to each other, ends included.

    Text is reproducible across schedules only while every step of a target pass stays inside one
    class; the engine pads narrower ones. `max_width` None: no upper end was found. measured: False where
    nobody has looked on such a device; then near-ties may fall otherwise, and every result says so.
    plain_only: wider passes were found to cost more than guesses bring, so there is nothing to guard outside the class.
    """

    min_width: int = 1
    max_width: int | None = None
    evidence: str = ""
    measured: bool = True
    plain_only: bool = False

    def __str__(self) -> str:
        text = f"{self.min_width} to {self.max_width or 'any'}"
        return text if self.measured else f"{text} (not measured here)"


_EVERY_ROUND = 3  # tokens at most that a drafter whose guesses came true has yet to read


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Facts about a loaded model, asked once.

    rewind: cost of `keep` and `truncate` that drop tokens.  trees: may a node have two children?
    exact_trees: are the rows of a tree as good as those of chains: the same bits where the width class was measured,
    the same but for rounding where it was not? Otherwise only drafters may use trees.
    max_width: most tokens in one scored forward.  max_leaves: most leaves of a sequence's pending nodes (None: any
    number).  num_sequences: most states open at once.
    width_steps: the widths that a plan should keep to, where each other one is dear at first use (kernels are built for
    it); empty: any.
    host_scores: logits already lie in host memory, so `Scores.rows` is free and row-by-row choice
    beats deciding all rows at once.  runs_ahead: a forward returns while a device still works, and reading its scores
    waits for it.  reuses_passes: what was built for a pass (CUDA graphs) runs again for the next one if that is as
    wide, which saves more than a pass of one token takes.
    batches: the steps of one forward run as one pass, in which each takes as many
    places as the widest, and at least `width_class.min_width`; otherwise one after another.
    limits: why trees, their exactness or free rewinding are missing.
    """

    rewind: Rewind
    trees: bool
    max_width: int
    num_sequences: int
    width_class: WidthClass
    host_scores: bool
    exact_trees: bool = True
    max_leaves: int | None = None
    batches: bool = False
    limits: tuple[str, ...] = ()
    width_steps: tuple[int, ...] = ()
    runs_ahead: bool = False
    reuses_passes: bool = False

    def reading(self, count: int) -> tuple[int, int]:
        """(how many of so many tokens that are known beforehand the next pass should read, its width): all of them as
        they are, or where each width is dear at first use and padding costs nothing to drop the widest one, padded.
        What was missed comes in any length, and widths up to 3 are those of every round. Where passes are reused those
        few are read one by one, as guesses are."""
        if self.reuses_passes and count <= _EVERY_ROUND and not self.batches:
            return 1, 1
        if not self.width_steps or count <= _EVERY_ROUND or self.rewind is not Rewind.FREE:
            return count, count
        widest = max(self.width_steps)
        return min(count, widest), widest


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is, for people and for statistics.

    runtime: name and version of what runs it, the build included where two differ.  options: (name, value) of the
    `LoadSettings` in force that move its speed, also where the backend chose them. What was measured of a model
    is kept under both.
    """

    name: str
    path: Path
    architecture: str
    quantization: str
    num_parameters: int
    context_length: int  # tokens a sequence may hold here, pending nodes included
    trained_context_length: int
    device: str
    backend: str
    notes: tuple[str, ...] = ()  # what was worked around, and why
    runtime: str = ""
    options: tuple[tuple[str, bool | int | str], ...] = ()


class SequenceState(Protocol):
    """One sequence's memory in a model: committed tokens, then a tree of pending nodes."""

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        ...

    @property
    def num_pending(self) -> int:
        """Number of pending nodes."""
        ...

    @property
    def num_replayed(self) -> int:
        """Tokens that were run again so far because others were dropped; 0 where rewinding is free."""
        ...

    def keep(self, path: Sequence[int]) -> None:
        """Commit one path of pending nodes (first node a child of -1, each the parent of the next)
        and drop all others. `keep(())` drops everything pending. Raises ValueError for a non-path."""
        ...

    def truncate(self, length: int) -> None:
        """Drop everything pending and all committed tokens from `length` on."""
        ...

    def wait(self) -> None:
        """Return once a device has run all passes so far, so that what they took can be told from what comes next.
        Raises BackendError if they failed."""
        ...

    def fork(self) -> SequenceState:
        """An independent copy of the committed tokens. Raises ValueError while nodes are pending."""
        ...

    def save(self) -> SavedState:
        """A copy outside of all open sequences. Raises ValueError while nodes are pending."""
        ...

    def close(self) -> None:
        """Give the memory back. Using a closed state raises ValueError; closing twice does nothing."""
        ...


class SavedState(Protocol):
    """The committed tokens of a sequence, as they were when it was saved; takes no sequence of the model."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        ...

    def open(self) -> SequenceState:
        """A new sequence that holds them, any number of times. Raises as `LanguageModel.open`."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """New tokens for one sequence.

    tokens: segments, joined in order, T ids in all.  parents: [T] pending-node numbers, each smaller
    than the node's own, or -1.  rows: which of these T tokens to score, ascending; None scores all,
    an empty tuple none (prefill).
    """

    state: SequenceState
    tokens: tuple[Tokens, ...]
    parents: NodeIndices
    rows: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.parents)


def require_rewind(model: LanguageModel) -> None:
    """Raise UnsupportedModelError unless rejected guesses can be taken back."""
    if model.capabilities.rewind is Rewind.NEVER:
        raise UnsupportedModelError(
            f"{model.info.name} cannot take tokens back, so nothing can be guessed ahead",
            got="; ".join(model.capabilities.limits) or None,
            fix="Decode plainly: --plain, or the drafter `nothing`.",
        )


def chain_parents(state: SequenceState, num_tokens: int, parent: int | None = None) -> NodeIndices:
    """[T] parents of tokens that follow one another, the first below `parent` (default: the newest
    pending node, or the last committed token if none is pending)."""
    first = state.num_pending
    parents = np.arange(first - 1, first - 1 + num_tokens, dtype=np.int32)
    if num_tokens and parent is not None:
        parents[0] = parent
    return parents


class LanguageModel(Protocol):
    """A loaded model. Not thread-safe; one forward at a time."""

    @property
    def info(self) -> ModelInfo: ...

    capabilities: Capabilities
    """Set by the backend; whoever measured more (`localspec tune`) may narrow it before sequences are open."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def vocab_size(self) -> int:
        """V, the width of a row of logits (padding included)."""
        ...

    def open(self) -> SequenceState:
        """A new, empty sequence. Raises `BackendError` when all are in use."""
        ...

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        """Run all steps as one batch (at most one step per state); scores in the order of the steps.

        Raises `ContextFullError` before changing anything if a sequence would outgrow the context,
        `BackendError` if the runtime fails, in which case no step has happened, and ValueError for
        steps that are malformed (parents, rows, ids, a foreign state or the same one twice).
        """
        ...

    def close(self) -> None:
        """Give all memory back. Closing twice does nothing."""
        ...


class Tokenizer(Protocol):
    """Text to ids and ids to bytes. Works in bytes: a token may be a part of a character."""

    @property
    def num_tokens(self) -> int:
        """Size of the logical vocabulary (padding rows of the model excluded)."""
        ...

    @property
    def bos(self) -> int | None:
        """The token that must start every sequence, or None where the model wants none."""
        ...

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source, or None."""
        ...

    @property
    def template_tokens(self) -> Mapping[str, str]:
        """Texts that templates ask for by name: bos_token, eos_token and the like."""
        ...

    def encode(self, text: str, *, special: bool) -> TokenIds:
        """[T] ids, without a BOS. special: texts of special tokens become those tokens."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to the output; of a special token, its text; none beyond the vocabulary."""
        ...

    def is_special(self, token: int) -> bool:
        """Control tokens, which are not part of the visible text."""
        ...


# ---------------------------------------------------------------- heads


@dataclass(frozen=True, slots=True)
class HeadInfo:
    """What a loaded head is, for people, for statistics and for whoever grows trees with it.

    kind: dspark, dflash, dflash2, eagle3, medusa, mtp, jetspec, early_exit; also the name of its drafter.  taps: layers
    of the target whose output it reads, -1 for the embedding.  levels: most levels below the anchor that it can guess;
    None: any number.  one_pass: `start` does the work of all levels, and `extend` costs next to nothing; otherwise each
    level is a pass of its own.  confident: it says how sure it is (`HeadState.confidence`).  trees: may a guess have
    two children?  host_scores: as in `Capabilities`.
    """

    name: str
    path: Path
    kind: str
    num_parameters: int
    taps: tuple[int, ...]
    levels: int | None = None
    one_pass: bool = False
    confident: bool = False
    trees: bool = True
    host_scores: bool = False
    notes: tuple[str, ...] = ()


class HeadState(Protocol):
    """A head beside one sequence of its target.

    What it makes of the features of committed tokens is part of that sequence: fed by `keep`, dropped by `truncate`,
    copied by `fork` and `save`, gone with `close`. Here are its guesses, numbered from 0 since `start`; a guess's
    parent is such a number, or -1 for the anchor.
    """

    @property
    def num_missing(self) -> int:
        """Of the committed tokens, how many at the beginning it has not seen: they were there when it was opened."""
        ...

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        ...

    def start(self, anchor: int) -> Scores:
        """Forget earlier guesses; [1, V] what may follow the anchor, the token behind the committed ones. Ids are the
        target's; a token that the head cannot guess has -inf."""
        ...

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """Feed guesses; [N, V] what may follow each of them. Raises ValueError beyond `HeadInfo.levels` - 1 levels,
        behind which the head guesses nothing."""
        ...

    def confidence(self) -> Probabilities | None:
        """[N] of the rows scored last: the chance that the best guess behind each is accepted if the guess itself is.
        May wait for the device. None for heads that do not say."""
        ...

    def close(self) -> None:
        """Forget the guesses, and feed no more. Closing twice does nothing."""
        ...


class DraftHead(Protocol):
    """A small network trained to read a target's hidden states, or a part of the target itself; bound to one loaded
    target. From `Backend.load_head` or `early_exit`, before the target has open sequences."""

    @property
    def info(self) -> HeadInfo: ...

    def open(self, state: SequenceState) -> HeadState:
        """The head's part of a sequence of its target, from here on or as a copied sequence brought it along (there is
        one per sequence). Tokens committed before it was opened are missing from what it sees: its guesses are poorer
        for it, the text is not. Raises ValueError for a sequence of another model."""
        ...

    def close(self) -> None:
        """Give all memory back, before the target is closed. Closing twice does nothing."""
        ...


# ---------------------------------------------------------------- backends


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How to load a model; None lets the backend decide. A backend refuses what it does not have.

    context: tokens per sequence (None: as trained, at most 4096).  num_sequences: states open at once.
    trees: load so that token trees can be verified exactly, whatever that costs.
    batch: load so that the steps of one forward run together, where the backend can do that for the model; one that
    cannot says why in its notes.
    gpu_layers: layers on the GPU (None: all where there is one).  threads: CPU threads.
    flash_attention, extra_buffers: llama.cpp options of those names.  cache_type: what it keeps keys and values in,
    f16 or bf16.  dtype: MLX compute type.
    """

    context: int | None = None
    num_sequences: int = 4
    trees: bool = False
    batch: bool = False
    gpu_layers: int | None = None
    threads: int | None = None
    flash_attention: bool | None = None
    extra_buffers: bool | None = None
    cache_type: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What `doctor` prints of a backend."""

    name: str
    installed: bool
    version: str
    devices: tuple[str, ...]
    notes: tuple[str, ...]  # worked around, and why; what is missing, and the command that helps
    install_command: str


class Backend(Protocol):
    """One runtime. Importing the module that defines it must not import the runtime."""

    @property
    def name(self) -> str: ...

    @property
    def own_settings(self) -> frozenset[str]:
        """The `LoadSettings` fields this backend uses beyond `context` and `num_sequences`."""
        ...

    @property
    def formats(self) -> tuple[str, ...]:
        """What it reads, best first: "gguf" (a file), "safetensors" (a folder)."""
        ...

    def report(self) -> BackendReport:
        """What is installed and what it can do here. Never raises."""
        ...

    def is_installed(self) -> bool:
        """Cheap: looks for the package without importing it."""
        ...

    def accepts(self, path: Path) -> bool:
        """Could `path` be a model of this backend, judged by name and first bytes?"""
        ...

    @property
    def planner(self) -> MemoryPlanner | None:
        """What its models take; None where that cannot be told, and then nothing is refused for it."""
        ...

    @property
    def quantizer(self) -> Quantizer | None:
        """None where it converts nothing."""
        ...

    def open_tokenizer(self, path: Path) -> Tokenizer:
        """The tokenizer of a model without the model. Raises members of the error tree only."""
        ...

    def load(self, path: Path, settings: LoadSettings) -> LanguageModel:
        """Open a model. Raises members of the error tree only."""
        ...

    def load_head(self, path: Path, target: LanguageModel) -> DraftHead:
        """Open a trained head for a target of this backend that has no open sequences. Raises members of the error tree
        only: HeadFileError names the tensor or key that is wrong, UnsupportedModelError what this backend or this
        target cannot do."""
        ...

    def early_exit(self, target: LanguageModel, layers: int | None) -> DraftHead:
        """The first `layers` of a loaded target, with its end, as a head that needs no file; None leaves the number to
        the backend. Raises SettingError for a number that there is not, UnsupportedModelError with the reason where
        this backend or this target cannot do it."""
        ...


# ---------------------------------------------------------------- drafters


class Budget(Protocol):
    """Asked while a drafter works: would more guesses be worth their time?"""

    def expand(self, grower: Grower, nodes: Sequence[int]) -> list[int]:
        """Which of these newest nodes should get children by one more pass of the drafter, in their order; none ends
        the drafting. Called once per pass."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """Who shares a round. lanes: sequences whose nodes are verified in one pass, each as wide as the widest; 1 where
    passes run one after another.  drafting: of them, so many share each pass of the draft model, too.  plain: nobody
    guesses this round, for the reason in `because`."""

    lanes: int
    drafting: int = 1
    plain: bool = False
    because: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """What the engine wants guessed: at most `max_nodes` nodes in at most `max_depth` levels below the
    context's last token.

    sampler: the target's sampling settings, so that a drafter can guess with the same noise.
    trees: the target can verify nodes with several children; otherwise propose a chain.
    needs_law: the acceptance rule needs the distribution that each token was drawn from, so tokens
    must be *drawn* from it (rejection), not chosen.  max_depth: longest path that could be emitted.
    budget: asked before each pass of a drafter that works level by level; None: `max_nodes` decides.
    begins_early: behind empty proposals the target's next pass begins before the last token is read, so that rounds
    without guesses are cheaper in a row.
    load: where the round is shared. A drafter that decides what is worth verifying then leaves the last word to those
    who see all lanes: it proposes what it would like, with `Proposal.reach`.
    meanwhile: what the asker has yet to do before it looks at the proposal. A drafter whose first pass runs on a device
    calls it when that is under way; others leave it.
    """

    context: Context
    max_nodes: int
    max_depth: int
    sampler: Sampler
    stop_tokens: frozenset[int]
    trees: bool = False
    needs_law: bool = False
    budget: Budget | None = None
    begins_early: bool = False
    load: Load | None = None
    meanwhile: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A guessed tree whose shape is known and whose tokens may still be on the device.

    tokens: segments, N ids in all.  parents: [N] node numbers within the proposal, -1 for children of
    the anchor, each smaller than the node's own.  laws: per node the distribution it was drawn from,
    or None where tokens were chosen, not drawn.  log_q: [N] the drafter's logarithm of the chance that a node
    is accepted if its parent is, where it knows that on the host.  source: who guessed.  sources: [N] who
    guessed each node, where several did.  counts: what else a drafter counts, for the statistics.
    width: verify in a pass of at least that many tokens (some are quicker than narrower ones); the engine pads.
    reach: [N] chance that the whole path to a node is accepted, where it is left open which nodes are verified.
    because: why nothing is proposed, for people.
    meanwhile: what the drafter put off until the target's pass is under way; on a device that is time in which the host
    would only wait. Called once, unless the round ends in an error.
    """

    source: str
    tokens: tuple[Tokens, ...] = ()
    parents: NodeIndices = field(default_factory=lambda: np.zeros(0, np.int32))
    laws: tuple[Law, ...] | None = None
    log_q: tuple[float, ...] | None = None
    sources: tuple[str, ...] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    width: int = 0
    reach: tuple[float, ...] | None = None
    because: str = ""
    meanwhile: Callable[[], None] | None = None
    _tree: TokenTree | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of_tree(
        cls,
        source: str,
        tree: TokenTree,
        *,
        sources: tuple[str, ...] | None = None,
        counts: Mapping[str, int] | None = None,
        width: int = 0,
    ) -> Proposal:
        """A tree that is on the host: nobody has to build it again."""
        log_q = None if tree.log_q is None else tuple(tree.log_q.tolist())
        made = cls(source, (HostTokens(tree.token),), tree.parent, None, log_q, sources, counts or {}, width)
        object.__setattr__(made, "_tree", tree)
        return made

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.parents)

    def depth(self) -> NodeIndices:
        """[N] depth of each node; children of the anchor have depth 0."""
        return depths(self.parents) if self._tree is None else self._tree.depth

    def later(self, work: Callable[[], None] | None) -> Proposal:
        """The same with something put off (`meanwhile`), or nothing."""
        if work is self.meanwhile:
            return self
        made = replace(self, meanwhile=work)
        object.__setattr__(made, "_tree", self._tree)
        return made

    def only(self, nodes: Sequence[int]) -> Proposal:
        """These nodes alone, ascending, parents included. The tokens are fetched to the host."""
        place = {node: index for index, node in enumerate(nodes)}
        tree, chosen = self.tree(), list(nodes)
        return replace(
            self,
            tokens=(HostTokens(tree.token[chosen]),),
            parents=np.array([place.get(int(self.parents[node]), -1) for node in chosen], np.int32),
            laws=None if self.laws is None else tuple(self.laws[node] for node in chosen),
            log_q=None if self.log_q is None else tuple(self.log_q[node] for node in chosen),
            sources=None if self.sources is None else tuple(self.sources[node] for node in chosen),
            reach=None if self.reach is None else tuple(self.reach[node] for node in chosen),
        )

    def tree(self) -> TokenTree:
        """The tokens fetched to the host, as a tree. May wait for the device."""
        if self._tree is None:
            parts = [segment.numpy() for segment in self.tokens]
            ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
            object.__setattr__(self, "_tree", TokenTree.from_parents(ids, self.parents, self.log_q))
        assert self._tree is not None
        return self._tree


def in_turn(works: Iterable[Callable[[], None] | None]) -> Callable[[], None] | None:
    """What several drafters put off (`Proposal.meanwhile`), as one; None where nobody did."""
    given = [work for work in works if work is not None]
    if len(given) < 2:
        return given[0] if given else None

    def run() -> None:
        for work in given:
            work()

    return run


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a proposal. path: accepted nodes of `tree`, root side first.
    tokens: what was emitted: the path's tokens, then the one the target adds.
    width, verify_ms: tokens in the target's pass (of all lanes) and how long it took, where that is known.
    begun_early: the pass had begun before the round did.
    kept: the nodes of the proposal that were verified, where lanes shared the round; None: all."""

    tree: TokenTree
    path: tuple[int, ...]
    tokens: tuple[int, ...]
    width: int = 0
    verify_ms: float = 0.0
    begun_early: bool = False
    kept: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SavedDraft:
    """What a draft model has read, outside of all open sequences. model: whose `state` it is.  tokens: [T] what was
    read, in that model's vocabulary."""

    model: LanguageModel
    tokens: TokenIds
    state: SavedState

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.tokens.nbytes + self.state.num_bytes


class Drafter(Protocol):
    """Anything that guesses. One object serves one session."""

    @property
    def name(self) -> str: ...

    @property
    def needs_trees(self) -> bool:
        """Was it set up to branch? Then a target that verifies chains only is refused, not served badly."""
        ...

    def attach(self, state: SequenceState) -> None:
        """The target's sequence that it will guess for, before the target reads anything more into it: before each
        turn, and whenever another sequence takes its place. For drafters that read the target's hidden states; others
        need nothing. One that has not seen all of it may empty it, and it is read again for it."""
        ...

    def begin(self, context: Context) -> None:
        """A new turn starts; `context` may share a prefix with the last one or nothing at all."""
        ...

    def propose(self, request: DraftRequest) -> Proposal:
        """Guess. An empty proposal is fine: the round is then plain decoding."""
        ...

    def observe(self, outcome: Outcome) -> None:
        """The last proposal's outcome. `context` (from `begin`) already holds the emitted tokens."""
        ...

    def save(self) -> tuple[SavedDraft, ...]:
        """Copies of what draft models have read of the context, to go on from elsewhere; none where there is nothing
        that would take a model to read again. Between rounds only."""
        ...

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Before a `begin`: hold what was saved, by whatever drafter, of models that this one drafts with; others are
        passed over. Raises as `LanguageModel.open`, and then holds nothing."""
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


@runtime_checkable
class Listener(Drafter, Protocol):
    """A drafter that reads the target's hidden states. Handing them over takes time in every pass, whether it is asked
    or not."""

    def attach(self, state: SequenceState, *, whole: bool = True) -> None:
        """As of any drafter. whole: False leaves the sequence as it is: what was read before is not heard, and guesses
        are poorer for a while."""
        ...

    def detach(self) -> None:
        """Hear nothing more until it is attached again. Between turns only; twice does nothing."""
        ...
