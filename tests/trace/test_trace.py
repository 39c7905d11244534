"""Trace files and pictures: nothing is lost on the way through a file, damage is named, nothing overlaps."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from localspec.context import Context
from localspec.drafters import DrafterSpec
from localspec.engine.answer import Generation
from localspec.engine.round import RoundResult
from localspec.errors import SettingError, TraceFileError
from localspec.pair import Pair
from localspec.protocols import DraftRequest, HostTokens, Outcome, Proposal, SavedDraft, SequenceState
from localspec.sampling import SamplingParams
from localspec.testing.reference import ReferenceModel, random_tree
from localspec.trace.console import round_text, show_trace
from localspec.trace.file import Trace, TraceWriter, read_trace
from localspec.trace.layout import tidy_rows
from localspec.trace.record import Node, Round, TokenText
from localspec.trace.summary import stats_lines
from localspec.trace.svg import odds_text, svg
from localspec.trace.text import clipped, head, quoted, tail, visible
from localspec.tree.mask import depths
from localspec.types import NodeIndices

SVG = "{http://www.w3.org/2000/svg}"
PARAMS = SamplingParams(
    temperature=0.9, seed=2, max_tokens=60, ignore_eos=True, stop=("never",), logit_bias={3: -math.inf}
)


def shallow(parents: NodeIndices, max_depth: int) -> NodeIndices:
    """The tree itself, or a fan of its nodes where it is too deep."""
    too_deep = int(depths(parents).max(initial=-1)) >= max_depth
    return np.full(len(parents), -1, np.int32) if too_deep else parents


class Bush:
    """Random trees of up to `size` nodes, guessed by three, with scores."""

    name = "bush"
    needs_trees = True

    def __init__(self, size: int = 12, *, scored: bool = True) -> None:
        self.rng = np.random.default_rng(1)
        self.size = size
        self.scored = scored

    def attach(self, state: SequenceState) -> None: ...

    def begin(self, context: Context) -> None:
        pass

    def propose(self, request: DraftRequest) -> Proposal:
        size = min(request.max_nodes if request.max_depth else 0, int(self.rng.integers(0, self.size + 1)))
        tokens = self.rng.integers(0, 12, size).astype(np.int32)
        log_q = tuple(np.log(self.rng.uniform(size=size)).tolist()) if self.scored else None
        sources = tuple(f"number {token % 3}" for token in tokens.tolist())
        return Proposal(
            self.name,
            (HostTokens(tokens),),
            shallow(random_tree(self.rng, size), request.max_depth),
            log_q=log_q,
            sources=sources,
        )

    def observe(self, outcome: Outcome) -> None:
        pass

    def save(self) -> tuple[SavedDraft, ...]:
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None:
        pass


def run(
    path: Path, drafter: Bush | None = None, num_answers: int = 1
) -> tuple[list[RoundResult], list[Generation], Trace]:
    """Answers of the reference model, written to a trace and read back."""
    rounds: list[RoundResult] = []
    results: list[Generation] = []
    pair = Pair(ReferenceModel(12, seed=4), None)
    with TraceWriter(path) as writer, pair.session(drafter or Bush()) as session:
        writer.begin(pair, session, DrafterSpec("bush", {"size": "12"}), PARAMS)
        for _ in range(num_answers):

            def both(result: RoundResult) -> None:
                rounds.append(result)
                writer.on_round(result)

            stream = session.stream([1, 2, 3], PARAMS, on_round=both, on_result=writer.on_result)
            results.append(stream.result)
    return rounds, results, read_trace(path)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("scored", [True, False])
def test_a_trace_holds_what_the_rounds_were(tmp_path: Path, scored: bool) -> None:
    rounds, [result], trace = run(tmp_path / "a.jsonl", Bush(scored=scored))
    assert len(trace.rounds) == len(rounds) and not trace.note
    for number, (want, got) in enumerate(zip(rounds, trace.rounds, strict=True), start=1):
        assert (got.number, got.answer, got.anchor.token, got.width) == (number, 1, want.anchor, want.record.width)
        assert got.parents.tolist() == want.verdict.tree.parent.tolist()
        assert [node.text.token for node in got.nodes] == want.verdict.tree.token.tolist()
        assert [node.source for node in got.nodes] == list(want.sources)
        assert (got.path, [token.token for token in got.emitted]) == (want.verdict.path, list(want.verdict.tokens))
        log_q = want.verdict.tree.log_q
        assert [node.log_q for node in got.nodes] == ([None] * len(got.nodes) if log_q is None else log_q.tolist())
    assert trace.header.drafter == "bush:size=12" and trace.header.seed == 2 and trace.header.draft is None
    assert trace.header.sampling["temperature"] == 0.9 and trace.header.sampling["logit_bias"] == {"3": "-inf"}
    [answer] = trace.answers
    assert (answer.finish_reason, answer.num_tokens, answer.seed) == (result.finish_reason, len(result.tokens), 2)


def test_its_statistics_are_those_of_the_answers(tmp_path: Path) -> None:
    _, results, trace = run(tmp_path / "a.jsonl", num_answers=2)
    got = trace.stats().as_dict()
    assert [answer.number for answer in trace.answers] == [1, 2]
    for name in ("num_rounds", "num_tokens", "num_drafted", "num_accepted"):
        assert got[name] == sum(result.stats.as_dict()[name] for result in results)
    _, [result], trace = run(tmp_path / "a.jsonl")  # in place of the two
    got, want = trace.stats().as_dict(), result.stats.as_dict()
    for name in set(want) - {"prefill_ms", "num_prefilled", "num_reused"}:
        assert got[name] == pytest.approx(want[name], abs=2e-3), name


def test_a_run_without_a_trace_writes_nothing(tmp_path: Path) -> None:
    pair = Pair(ReferenceModel(12), None)
    with TraceWriter(None) as writer, pair.session(Bush()) as session:
        writer.begin(pair, session, DrafterSpec("bush", {}), PARAMS)
        assert session.stream([1], PARAMS, on_round=writer.on_round, on_result=writer.on_result).result.tokens
    assert not list(tmp_path.iterdir())


def test_rounds_are_in_the_file_before_the_answer_goes_on(tmp_path: Path) -> None:
    """Whatever ends the run, what was done is kept."""
    path = tmp_path / "a.jsonl"
    pair = Pair(ReferenceModel(12, seed=4), None)
    with TraceWriter(path) as writer, pair.session(Bush()) as session:
        writer.begin(pair, session, DrafterSpec("bush", {}), PARAMS)
        stream = session.stream([1, 2, 3], PARAMS, on_round=writer.on_round, on_result=writer.on_result)
        next(iter(stream))
        trace = read_trace(path)
        assert len(trace.rounds) == 1 and "cut off" in trace.note
        stream.cancel()
        assert stream.result.finish_reason == "cancelled"
    trace = read_trace(path)
    assert trace.answers[0].finish_reason == "cancelled" and not trace.note


def test_places_that_cannot_be_written_are_refused_and_other_files_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no such folder"):
        TraceWriter(tmp_path / "no" / "a.jsonl")
    with pytest.raises(SettingError, match="cannot write"):
        TraceWriter(tmp_path)
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGUF...")
    with pytest.raises(SettingError, match="is no trace"):
        TraceWriter(other)
    assert other.read_bytes() == b"GGUF..."


def test_a_run_that_never_began_leaves_files_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with TraceWriter(path):
        pass
    assert not path.exists()
    run(path)
    before = path.read_bytes()
    with TraceWriter(path):
        pass
    assert path.read_bytes() == before


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    pair = Pair(ReferenceModel(12), None)
    refused = pytest.raises(TraceFileError, match="cannot write")
    with TraceWriter(full) as writer, pair.session(Bush()) as session, refused:
        writer.begin(pair, session, DrafterSpec("bush", {}), PARAMS)


# ---------------------------------------------------------------- damage


def test_a_last_line_that_was_cut_off_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _, _, whole = run(path)
    raw = path.read_bytes()
    starts = [0, *(at + 1 for at, byte in enumerate(raw) if byte == 10)]
    for cut in range(starts[3] + 1, starts[4] - 2, 37):  # inside the third round's line
        path.write_bytes(raw[:cut])
        trace = read_trace(path)
        assert trace.rounds == whole.rounds[:2] and "line (4) is cut off" in trace.note
    path.write_bytes(raw[: starts[4]])
    assert read_trace(path).rounds == whole.rounds[:3] and "cut off before the end" in read_trace(path).note


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": [{"token": 1, "text": "a", "parent": 0, "source": "x"}]}, "parent 0"),
        ({"nodes": [{"token": 1, "text": "a", "parent": -1, "log_q": "x", "source": "x"}]}, "log_q"),
        ({"path": [0, 0]}, "path"),
        ({"path": 7}, "path"),
        ({"emitted": []}, "0 tokens emitted"),
        ({"width": None}, "width"),
        ({"draft_ms": -1}, "draft_ms"),
        ({"draft_ms": True}, "draft_ms"),
        ({"anchor": {"token": 1, "text": "a", "bytes": "zz"}}, "hexa"),
        ({"round": 9}, "out of order"),
        ({"kind": "dance"}, "dance"),
    ],
)
def test_a_damaged_line_is_named_with_its_fault(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "a.jsonl"
    run(path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = json.dumps({**json.loads(lines[2]), **change}).encode()
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(TraceFileError, match=f"line 3 is damaged.*{words}"):
        read_trace(path)


@pytest.mark.parametrize("raw", [b"", b"\n", b"GGUF\x00\x01", b"[1]\n", b'{"a": 1}\n', b"hello", b"[" * 100_000])
def test_what_is_no_trace_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    with pytest.raises(TraceFileError, match=r"not a trace.*--trace"):
        read_trace(path)


def test_other_versions_missing_files_and_missing_rounds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _, _, trace = run(path)
    raw = path.read_bytes()
    with pytest.raises(SettingError, match=rf"expected 1 to {len(trace.rounds)}"):
        trace.round(len(trace.rounds) + 1)
    with pytest.raises(SettingError, match="no such round"):
        trace.round(0)
    path.write_bytes(raw.replace(b'"version": 1', b'"version": 2', 1))
    with pytest.raises(TraceFileError, match=r"unknown version \(got 2, expected 1\)"):
        read_trace(path)
    with pytest.raises(TraceFileError, match="cannot read"):
        read_trace(tmp_path / "b.jsonl")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    whole = path.with_suffix(".whole")
    if not whole.exists():
        run(whole, Bush(3))
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(raw)
    try:
        trace = read_trace(path)
    except TraceFileError:
        return
    for entry in trace.rounds:
        ET.fromstring(svg(entry, trace.text_before(entry)))
        round_text(entry, trace.text_before(entry), 1, True)


# ---------------------------------------------------------------- rounds made up


@st.composite
def rounds(draw: st.DrawFn, max_nodes: int = 64) -> Round:
    """Any round: trees of every shape, tokens of any bytes, a path from the root."""
    tokens = st.builds(TokenText, st.integers(0, 2**31 - 1), st.binary(max_size=6) | st.text(max_size=30).map(encoded))
    nodes: list[Node] = []
    reach = draw(st.sampled_from([1, 3, 100]))  # chains, thickets, bushes
    for index in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.integers(max(-1, index - reach), index - 1))
        log_q = draw(st.none() | st.floats(-50, 0))
        nodes.append(Node(draw(tokens), parent, log_q, draw(st.sampled_from(["ngram", "<&>", "draft_model"]))))
    path: list[int] = []
    while family := [i for i, node in enumerate(nodes) if node.parent == (path[-1] if path else -1)]:
        if draw(st.integers(0, 3)) == 0:
            break
        path.append(draw(st.sampled_from(family)))
    return Round(
        number=1,
        answer=1,
        source="several",
        anchor=draw(tokens),
        nodes=tuple(nodes),
        path=tuple(path),
        emitted=(*(nodes[i].text for i in path), draw(tokens)),
        width=len(nodes) + 1,
        draft_ms=0.125,
        verify_ms=1e3,
        host_ms=0.0,
        num_replayed=draw(st.integers(0, 2)),
    )


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


@settings(max_examples=80, deadline=None)
@given(entry=rounds(max_nodes=12))
def test_any_round_survives_its_line(entry: Round) -> None:
    line = json.dumps(entry.as_dict(), allow_nan=False)
    assert Round.from_dict(json.loads(line)) == entry


@settings(max_examples=60, deadline=None)
@given(entry=rounds())
def test_a_picture_is_xml_with_every_node_and_no_overlap(entry: Round) -> None:
    root = ET.fromstring(svg(entry, b"before <&> \x00\xff"))
    groups = [group for group in root.iter(f"{SVG}g") if "data-node" in group.attrib]
    names = [group.attrib["data-node"] for group in groups]
    assert sorted(names) == sorted(["anchor", "bonus", *map(str, range(len(entry.nodes)))])
    for group in groups:
        kind, name = group.attrib["class"].split()[1], group.attrib["data-node"]
        if name.isdecimal():
            assert (kind == "taken") == (int(name) in entry.path)
    edges = [path for path in root.iter(f"{SVG}path") if path.attrib["class"].startswith("edge")]
    assert len(edges) == len(entry.nodes) + 1
    boxes = []
    for group in groups:
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        boxes.append(tuple(float(rect.attrib[name]) for name in ("x", "y", "width", "height")))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for index, (x, y, w, h) in enumerate(boxes):
        assert x >= 0 and y >= 80 and x + w <= width and y + h <= height - 40, "legend and title have room of their own"
        for x2, y2, w2, h2 in boxes[:index]:
            assert x + w <= x2 or x2 + w2 <= x or y + h + 8 <= y2 or y2 + h2 + 8 <= y
    odds = [text for text in root.iter(f"{SVG}text") if text.attrib.get("class", "").startswith("odds")]
    assert len(odds) == sum(node.log_q is not None for node in entry.nodes)


@settings(max_examples=60, deadline=None)
@given(entry=rounds(), lines=st.booleans())
def test_a_drawing_has_a_line_per_token_and_moves_no_cursor(entry: Round, lines: bool) -> None:
    drawn = round_text(entry, b"so far\x1b[2J", 1, lines).plain
    assert all(char.isprintable() or char == "\n" for char in drawn)
    _, tree = drawn.split("\n\n")
    assert len(tree.splitlines()) == len(entry.nodes) + 2
    tick = "✓" if lines else "*"
    plain = [line.lstrip("│├└─|-` ") for line in tree.splitlines()]
    assert sum(line.startswith(f'{tick} "') for line in plain) == len(entry.path)
    assert sum(line.startswith('+ "') and line.endswith("bonus") for line in plain) == 1
    if lines is False and all(len(node.text.raw) < 2 for node in entry.nodes):
        assert not set("├└│─✓") & set(drawn)


# ---------------------------------------------------------------- layout and text


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_nodes_of_one_depth_keep_their_distance_and_parents_stand_in_the_middle(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 64))
    parents = [-1, *(data.draw(st.integers(0, index - 1)) for index in range(1, size))]
    rows = tidy_rows(parents)
    depth = [0] * size
    for node, parent in enumerate(parents):
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
        family = [child for child, other in enumerate(parents) if other == node]
        if family:
            assert rows[node] == pytest.approx((rows[family[0]] + rows[family[-1]]) / 2)
            assert all(rows[a] < rows[b] for a, b in pairwise(family))
    for level in range(max(depth) + 1):
        level_rows = sorted(row for row, own in zip(rows, depth, strict=True) if own == level)
        assert all(b - a > 1 - 1e-9 for a, b in pairwise(level_rows))
    assert min(rows) == 0.0


def test_a_chain_is_a_line_and_a_fan_is_spread_evenly() -> None:
    assert tidy_rows([-1, 0, 1, 2]) == [0, 0, 0, 0]
    assert tidy_rows([-1, 0, 0, 0]) == [1, 0, 1, 2]


def test_a_deep_chain_needs_no_recursion(tmp_path: Path) -> None:
    token = TokenText(1, b"a")
    nodes = tuple(Node(token, index - 1, None, "x") for index in range(1500))
    entry = Round(1, 1, "x", token, nodes, tuple(range(1500)), (token,) * 1501, 1501, 0.0, 0.0, 0.0, 0)
    assert round_text(entry, b"", 1, True).plain.count("✓") == 1501
    ET.fromstring(svg(entry))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b" a", '" a"'),
        (b'\n\t"\\', r'"\n\t\"\\"'),
        (b"\xe2\x80", r'"\xe2\x80"'),
        ("é漢🙂".encode(), '"é漢🙂"'),
        ("\x1b\u202e\u00a0".encode(), r'"\u001b\u202e\u00a0"'),
        (b"", '""'),
    ],
)
def test_token_text_is_quoted_safely(raw: bytes, shown: str) -> None:
    assert quoted(raw) == shown


def test_pictures_show_blanks_and_cut_what_is_too_long() -> None:
    assert list(visible(b" a\n")) == [("␣", True), ("a", False), ("↵", True)]
    assert clipped(visible(b"abcdef"), 4) == [("abc", False), ("…", True)]
    assert clipped(visible("漢漢漢".encode()), 4) == [("漢", False), ("…", True)]
    assert head("abcdef", 4) == "abc…" and tail(b"abc\ndef", 4) == "…def"
    assert (odds_text(0.0), odds_text(0.001), odds_text(0.005), odds_text(1.0)) == ("0.00", "<0.01", "0.01", "1.00")


def test_the_overview_names_what_was_run_and_the_most_telling_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, [result], trace = run(tmp_path / "a.jsonl")
    show_trace(trace, None, None)
    shown = capsys.readouterr().out
    for words in ("reference on reference", "bush:size=12", "seed 2", f"{result.stats.accepted_length:.2f} tokens"):
        assert words in shown
    assert all(value in shown for _, value in stats_lines(trace.stats()))
    telling = trace.telling()
    assert telling is not None and f"round {telling.number} of {len(trace.rounds)}" in shown
    assert len(telling.nodes) == max(len(entry.nodes) for entry in trace.rounds)
    assert "\x1b" not in shown


def test_long_traces_say_how_many_rounds_are_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, trace = run(tmp_path / "a.jsonl", num_answers=3)
    assert len(trace.rounds) > 40
    show_trace(trace, None, None)
    assert f"and {len(trace.rounds) - 40} more" in capsys.readouterr().out


def test_an_empty_trace_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, trace = run(tmp_path / "a.jsonl")
    empty = replace(trace, rounds=(), answers=(), note="cut off")
    show_trace(empty, None, None)
    shown = capsys.readouterr().out
    assert "no rounds" in shown and "note: cut off" in shown
    with pytest.raises(TraceFileError, match="no round to draw"):
        show_trace(empty, None, tmp_path / "a.svg")
    with pytest.raises(TraceFileError, match="cannot write"):
        show_trace(trace, 1, tmp_path / "no" / "a.svg")


def test_the_taken_path_is_coloured_where_there_is_colour() -> None:
    token = TokenText(1, b"a")
    entry = Round(1, 1, "x", token, (Node(token, -1, -0.5, "x"),), (0,), (token, token), 2, 1.0, 1.0, 1.0, 0)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False)
    console.print(round_text(entry, b"a", 1, True))
    assert isinstance(console.file, io.StringIO) and "\x1b[1;32m✓" in console.file.getvalue()
