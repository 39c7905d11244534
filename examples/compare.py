"""One prompt, plain and speculative, greedily and at temperature 0.8: the tokens are equal.

Plain decoding is the null drafter in the same loop and the same width class; the speculative run drafts
with the pair's draft model. Fails if a token differs or if no drafted token was accepted.
"""

from __future__ import annotations

import sys

import localspec


def main() -> None:
    prompt = "How do I reverse a list in Python?"
    with localspec.open_pair() as pair:
        for temperature in (0.0, 0.8):
            params = localspec.SamplingParams(temperature=temperature, seed=3, max_tokens=48)
            with pair.session("nothing") as session:
                plain = session.generate(prompt, params)
            with pair.session("draft_model:num=4") as session:
                speculative = session.generate(prompt, params)
            if speculative.tokens != plain.tokens:
                sys.exit(f"temperature {temperature}: the tokens differ\n{plain.tokens}\n{speculative.tokens}")
            if speculative.stats.num_accepted == 0:
                sys.exit(f"temperature {temperature}: no drafted token was accepted, so nothing was compared")
            print(
                f"temperature {temperature}: {len(plain.tokens)} equal tokens; "
                f"{plain.stats.num_rounds} rounds plain, {speculative.stats.num_rounds} speculative; "
                f"accepted length {speculative.stats.accepted_length:.2f}"
            )


if __name__ == "__main__":
    main()
