"""What a trace holds, and its form in JSON. Reading checks everything: a file may come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from localspec.engine.answer import Generation
from localspec.engine.round import RoundResult
from localspec.engine.stats import NOT_RECHECKED, RecheckRecord, RoundRecord, count_sources, sibling_ranks
from localspec.protocols import Tokenizer
from localspec.trace.text import printable
from localspec.tree.mask import check_path, depths
from localspec.types import NodeIndices

FORMAT = "localspec-trace"
VERSION = 1

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Header:
    """What was run. drafter: as on the command line.  seed: None where each answer drew its own.  exact: what was
    promised of the text."""

    localspec: str
    target: str
    draft: str | None
    backend: str
    device: str
    drafter: str
    acceptance: str
    width_class: str
    sampling: Mapping[str, Any]
    seed: int | None
    exact: str = "class"

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"kind": "header", "format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Header:
        """Raises ValueError, saying what is missing."""
        names = ("localspec", "target", "backend", "device", "drafter", "acceptance", "width_class")
        return cls(
            **{name: _name(data, name) for name in names},
            draft=None if data.get("draft") is None else _name(data, "draft"),
            sampling=_get(data, "sampling", dict),
            seed=_optional(data, "seed", int),
            exact="class" if data.get("exact") is None else _name(data, "exact"),
        )


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token and the bytes it adds to the text."""

    token: int
    raw: bytes

    @classmethod
    def of(cls, token: int, tokenizer: Tokenizer) -> TokenText:
        """Look the bytes up."""
        return cls(int(token), tokenizer.token_bytes(int(token)))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; bytes that are no whole characters are kept beside their readable form."""
        data: dict[str, Any] = {"token": self.token, "text": self.raw.decode(errors="backslashreplace")}
        if data["text"].encode() != self.raw:
            data["bytes"] = self.raw.hex()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenText:
        """Raises ValueError."""
        raw = _optional(data, "bytes", str)
        text = _get(data, "text", str)
        return cls(_get(data, "token", int), text.encode(errors="surrogatepass") if raw is None else bytes.fromhex(raw))


@dataclass(frozen=True, slots=True)
class Node:
    """One guess. parent: -1 for the anchor.  log_q: of acceptance given the parent's, None where unknown."""

    text: TokenText
    parent: int
    log_q: float | None
    source: str

    @property
    def probability(self) -> float | None:
        """The drafter's chance that this node is accepted if its parent is."""
        return None if self.log_q is None else math.exp(min(self.log_q, 0.0))


@dataclass(frozen=True, slots=True)
class Round:
    """One round. number: from 1, over the whole file.  answer: which one it belongs to, from 1.
    emitted: the path's tokens, then the target's own (the bonus).  recheck: whether another row decided that one."""

    number: int
    answer: int
    source: str
    anchor: TokenText
    nodes: tuple[Node, ...]
    path: tuple[int, ...]
    emitted: tuple[TokenText, ...]
    width: int
    draft_ms: float
    verify_ms: float
    host_ms: float
    num_replayed: int
    recheck: RecheckRecord = NOT_RECHECKED

    @classmethod
    def of(cls, result: RoundResult, number: int, answer: int, tokenizer: Tokenizer) -> Round:
        """A round as the engine reports it."""
        tree, record = result.verdict.tree, result.record
        scores = [None] * len(tree) if tree.log_q is None else [_finite(value) for value in tree.log_q.tolist()]
        nodes = zip(tree.token.tolist(), tree.parent.tolist(), scores, result.sources, strict=True)
        return cls(
            number=number,
            answer=answer,
            source=record.source,
            anchor=TokenText.of(result.anchor, tokenizer),
            nodes=tuple(Node(TokenText.of(token, tokenizer), *rest) for token, *rest in nodes),
            path=result.verdict.path,
            emitted=tuple(TokenText.of(token, tokenizer) for token in result.verdict.tokens),
            width=record.width,
            draft_ms=record.draft_ms,
            verify_ms=record.verify_ms,
            host_ms=record.host_ms,
            num_replayed=record.num_replayed,
            recheck=record.recheck,
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; times to the nanosecond."""
        return {
            "kind": "round",
            "round": self.number,
            "answer": self.answer,
            "source": self.source,
            "anchor": self.anchor.as_dict(),
            "nodes": [
                {**node.text.as_dict(), "parent": node.parent, "log_q": node.log_q, "source": node.source}
                for node in self.nodes
            ],
            "path": list(self.path),
            "emitted": [token.as_dict() for token in self.emitted],
            "width": self.width,
            "draft_ms": round(self.draft_ms, 6),
            "verify_ms": round(self.verify_ms, 6),
            "host_ms": round(self.host_ms, 6),
            "num_replayed": self.num_replayed,
            "recheck": {**asdict(self.recheck), "ms": round(self.recheck.ms, 6)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Round:
        """Raises ValueError unless it is a tree, a path in it, and one token more than the path."""
        nodes = tuple(_node(index, _is(node, "a node", dict)) for index, node in enumerate(_get(data, "nodes", list)))
        path = tuple(_is(node, "a node of the path", int) for node in _get(data, "path", list))
        check_path(np.array([node.parent for node in nodes], np.int32), list(path))
        emitted = tuple(
            TokenText.from_dict(_is(token, "an emitted token", dict)) for token in _get(data, "emitted", list)
        )
        if len(emitted) != len(path) + 1:
            raise ValueError(f"{len(emitted)} tokens emitted for a path of {len(path)}")
        return cls(
            number=_get(data, "round", int),
            answer=_get(data, "answer", int),
            source=_name(data, "source"),
            anchor=TokenText.from_dict(_get(data, "anchor", dict)),
            nodes=nodes,
            path=path,
            emitted=emitted,
            width=_get(data, "width", int),
            draft_ms=_time(data, "draft_ms"),
            verify_ms=_time(data, "verify_ms"),
            host_ms=_time(data, "host_ms"),
            num_replayed=_get(data, "num_replayed", int),
            recheck=_recheck(_optional(data, "recheck", dict)),
        )

    @property
    def parents(self) -> NodeIndices:
        """[N] the parent of each node."""
        return np.array([node.parent for node in self.nodes], np.int32)

    @property
    def depth(self) -> int:
        """Levels of guesses below the anchor."""
        return int(depths(self.parents).max(initial=-1)) + 1

    @property
    def sources(self) -> list[str]:
        """Who guessed, in order of first appearance."""
        return list(count_sources(node.source for node in self.nodes))

    @property
    def bonus(self) -> TokenText:
        """The token that the target added."""
        return self.emitted[-1]

    def record(self) -> RoundRecord:
        """The round's numbers, counted anew from the tree."""
        sources = [node.source for node in self.nodes]
        return RoundRecord(
            source=self.source,
            num_nodes=len(self.nodes),
            num_accepted=len(self.path),
            num_emitted=len(self.emitted),
            width=self.width,
            draft_ms=self.draft_ms,
            verify_ms=self.verify_ms,
            host_ms=self.host_ms,
            drafted_depth=self.depth,
            drafted_by_source=count_sources(sources),
            accepted_by_source=count_sources(sources[node] for node in self.path),
            accepted_ranks=sibling_ranks(self.parents, self.path),
            num_replayed=self.num_replayed,
            recheck=self.recheck,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """How an answer ended; missing where a run was cut off."""

    number: int
    seed: int
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int

    @classmethod
    def of(cls, result: Generation, number: int) -> Answer:
        """A finished answer."""
        return cls(number, result.seed, result.finish_reason, result.num_prompt_tokens, len(result.tokens))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fields = asdict(self)
        return {"kind": "answer", "answer": fields.pop("number"), **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Answer:
        """Raises ValueError."""
        return cls(
            number=_get(data, "answer", int),
            seed=_get(data, "seed", int),
            finish_reason=_get(data, "finish_reason", str),
            num_prompt_tokens=_get(data, "num_prompt_tokens", int),
            num_tokens=_get(data, "num_tokens", int),
        )


def _node(index: int, data: dict[str, Any]) -> Node:
    parent = _get(data, "parent", int)
    if not -1 <= parent < index:
        raise ValueError(f"node {index} has the parent {parent}")
    log_q = data.get("log_q")
    if log_q is not None and (isinstance(log_q, bool) or not isinstance(log_q, int | float) or log_q != log_q):
        raise ValueError(f"node {index} has the log_q {log_q!r}")
    return Node(TokenText.from_dict(data), parent, _finite(log_q and float(log_q)), _name(data, "source"))


def _recheck(data: Mapping[str, Any] | None) -> RecheckRecord:
    """None: written before there were any."""
    if data is None:
        return NOT_RECHECKED
    return RecheckRecord(_get(data, "num", int), _get(data, "num_changed", int), _time(data, "ms"))


def _finite(value: float | None) -> float | None:
    """JSON has no infinities: a chance of zero, or none that is known, is written as unknown."""
    return value if value is not None and abs(value) < math.inf else None


def _time(data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1e15:
        raise ValueError(f"{name} is {value!r}")
    return float(value)


def _name(data: Mapping[str, Any], name: str) -> str:
    return printable(_get(data, name, str))


def _get(data: Mapping[str, Any], name: str, kind: type[V]) -> V:
    return _is(data.get(name), name, kind)


def _optional(data: Mapping[str, Any], name: str, kind: type[V]) -> V | None:
    return None if data.get(name) is None else _get(data, name, kind)


def _is(value: object, name: str, kind: type[V]) -> V:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {str(value)[:60]!r}")
    return value
