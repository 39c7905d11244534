"""Traces: what was guessed, round by round, as a file and as pictures.

A trace is a text file with one JSON object per line, each with its `kind`:

    {"kind": "header", "format": "localspec-trace", "version": 1, "target": ..., "sampling": {...}, "seed": 7}
    {"kind": "round", "round": 1, "anchor": {...}, "nodes": [{"token": 5, "text": " a", "parent": -1, ...}], ...}
    {"kind": "answer", "answer": 1, "finish_reason": "stop", ...}

Every round is written when it is done, so a run that was cut off keeps its rounds. Nodes are numbered as in
the round's tree, -1 is the anchor. `text` is readable; a token that is not whole UTF-8 has its `bytes` in hex
as well. `docs/how-it-works.md` lists the fields.
"""
