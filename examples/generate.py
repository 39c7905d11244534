"""Stream an answer from the bundled pair and print the accepted length (the bonus token counted).

Fails if no drafted token was accepted.
"""

from __future__ import annotations

import sys

import localspec


def main() -> None:
    with localspec.open_pair() as pair, pair.session() as session:
        stream = session.stream("Once upon a time", localspec.SamplingParams(max_tokens=48))
        for piece in stream:
            print(piece.text, end="", flush=True)
        stats = stream.result.stats
    print(f"\n{stats.num_tokens} tokens in {stats.num_rounds} rounds: accepted length {stats.accepted_length:.2f}")
    if stats.num_accepted == 0:
        sys.exit("no drafted token was accepted")


if __name__ == "__main__":
    main()
