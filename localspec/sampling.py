"""From a row of logits to a token: settings, the law they define, and the choice made from it.

Order of the settings (as in vLLM and transformers): logit bias, penalties, grammar, temperature, top-k,
top-p, min-p. Repetition counts prompt and output; presence and frequency count the output only.
Temperature 0 takes the best token after bias, penalties and grammar; the other settings cannot change it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localspec import noise
from localspec.errors import SettingError
from localspec.noise import Purpose
from localspec.ranking import group_maxima, gumbel_argmax, reaching, row_top, top
from localspec.types import Logits, NoiseKeys, Probabilities, TokenIds

if TYPE_CHECKING:
    from localspec.constraint import Constraint, Grammar
    from localspec.context import Context

_LEAST_TEMPERATURE = 1e-5
_FEW = 4096  # up to so many tokens that a grammar allows, a row is cut down to them
_FAR = 50.0  # further apart than any two tokens that matter, over temperature; its exponential is still a number


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one request. The defaults decode greedily.

    seed None draws one at random; the result reports it. top_k 0, top_p 1, min_p 0 and penalties of
    1 (repetition) or 0 switch a setting off. logprobs: number of alternatives reported per token
    (None: no log-probabilities). They are the model's own, before any setting.  grammar: what the answer may look
    like.  shown_tokens: special tokens whose text is part of the answer.
    Raises SettingError, naming the field, for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    max_tokens: int | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    shown_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < self.temperature < _LEAST_TEMPERATURE:
            raise SettingError(
                "temperature is too small to divide by", got=self.temperature, expected="0 (always the best token)"
            )
        _check("top_k", self.top_k, 0, 2**31)
        _check("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 1, 2**31)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, 1000)
        for token, bias in self.logit_bias.items():
            if token < 0 or math.isnan(bias):
                raise SettingError(
                    "logit_bias entry out of range", got=f"{token}: {bias}", expected="token id >= 0: number"
                )
        if any(not text for text in self.stop):
            raise SettingError("a stop string is empty", fix="Leave it out.")
        if self.grammar is not None and self.ignore_eos:
            raise SettingError("ignore_eos would go on where the grammar ends the answer", fix="Leave one of them out.")


def _check(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = (low < value if low_open else low <= value) and value <= high
    if not inside:  # NaN lands here too
        bound = f"above {low:g}" if low_open else f"at least {low:g}"
        raise SettingError(f"{name} out of range", got=value, expected=f"{bound} and at most {high:g}")


@dataclass(frozen=True, slots=True)
class Law:
    """A distribution over K candidate tokens: ids [K] with probabilities [K] summing to one."""

    ids: TokenIds
    probs: Probabilities

    def probability(self, token: int) -> float:
        """Probability of one token; zero outside the candidates."""
        hits = np.flatnonzero(self.ids == token)
        return float(self.probs[hits[0]]) if len(hits) else 0.0


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far another row of the same token may be from this one, in logits. difference: of two logits' difference.
    shift: of a single logit, which counts where a setting multiplies logits."""

    difference: float
    shift: float


class _Weighed:
    """A row some of whose logits are others for the time of a `with`. They are written into the row itself, and what
    stood there is put back: copying 152k logits would take longer than all else. A row that must not be written to is
    copied."""

    __slots__ = ("_before", "row")

    def __init__(self, row: Logits) -> None:
        self.row = row
        self._before: list[tuple[TokenIds, Logits]] | None = [] if row.flags.writeable else None

    def put(self, ids: TokenIds, values: Logits) -> None:
        """Let these tokens [N] have these logits [N]."""
        if self._before is None:
            self.row, self._before = self.row.copy(), []
        self._before.append((ids, self.row.take(ids)))
        self.row[ids] = values

    def __enter__(self) -> Logits:
        return self.row

    def __exit__(self, *_: object) -> None:
        for ids, values in reversed(self._before or ()):
            self.row[ids] = values


class Sampler:
    """Makes the choices of one request. Pure: the same row and context give the same token.

    `is_plain` (greedy or temperature only) means that `Scores.winners` can choose on the device;
    otherwise `choose` works on host rows with the context as it stands at that node.
    constraint: what the answer may look like; every row is cut down to the tokens that it allows there.
    """

    def __init__(self, params: SamplingParams, seed: int, constraint: Constraint | None = None) -> None:
        self.params = params
        self.seed = seed
        self.constraint = constraint
        p = params
        self.uses_counts = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        self.is_greedy = p.temperature == 0.0
        self._truncates = not self.is_greedy and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
        self.is_plain = not (self.uses_counts or p.logit_bias or self._truncates or constraint is not None)
        self._bias_ids = np.fromiter(p.logit_bias.keys(), np.int32, len(p.logit_bias))
        self._biases = np.fromiter(p.logit_bias.values(), np.float32, len(p.logit_bias))

    def choose(self, row: Logits, context: Context) -> int:
        """The token of this row at position `len(context)`: argmax of log p + noise. Raises SettingError where
        grammar and logit bias leave nothing."""
        with self._weighed(row, context) as weighed:
            row, few = self._allowed(weighed, context)
            if not len(row):
                raise nothing_left()
            if self.is_greedy:
                best = int(row.argmax())
                return best if few is None else int(few[best])
            position_key = noise.key(self.seed, Purpose.TOKEN, len(context))
            if few is None and not self._truncates:
                return gumbel_argmax(row, self.params.temperature, position_key)
            return self._noisy_best(row, few, position_key)

    def decide(self, row: Logits, context: Context, tolerance: Tolerance) -> tuple[int, bool]:
        """(what `choose` says, would it say so for every row within the tolerance of this one?) Raises as `choose`."""
        with self._weighed(row, context) as weighed:
            return self._decided(weighed, context, tolerance)

    def _decided(self, row: Logits, context: Context, tolerance: Tolerance) -> tuple[int, bool]:
        row, few = self._allowed(row, context)
        if not len(row):
            raise nothing_left()
        p = self.params
        stretch = max(p.repetition_penalty, 1.0 / p.repetition_penalty)
        bound = stretch * tolerance.difference + 2.0 * (stretch - 1.0) * tolerance.shift
        position_key = None if self.is_greedy else noise.key(self.seed, Purpose.TOKEN, len(context))
        if not self._truncates or position_key is None:
            ids, values = self._ranked(row, few, 2, position_key)
            return int(ids[0]), is_clear(values, p.temperature, bound)
        token = self._noisy_best(row, few, position_key)
        loose, tight = (self._shifted(sign * bound / p.temperature) for sign in (1.0, -1.0))
        # whatever could be among the candidates, and how many certainly are
        rivals = np.flatnonzero(row >= row[loose._surviving(row)[0][-1]] - bound).astype(np.int32)
        num_certain = len(tight._surviving(row)[0])
        place = token if few is None else int(few.searchsorted(token))
        worst_rank = np.count_nonzero(row > row[place] - bound) - 1
        names = rivals if few is None else few[rivals]
        sums = row[rivals] / np.float32(p.temperature) + noise.gumbel(position_key, names)
        values = np.sort(sums)[::-1][:2]
        is_best = int(names[int(sums.argmax())]) == token
        return token, is_best and int(worst_rank) < num_certain and is_clear(values, p.temperature, bound)

    def guesses(self, row: Logits, context: Context, k: int) -> tuple[TokenIds, Probabilities]:
        """([k'] ids, [k'] `chances`) of the at most k tokens that this row makes likeliest to be chosen at
        position `len(context)`, best first. The first is what `choose` would choose."""
        with self._weighed(row, context) as weighed:
            row, few = self._allowed(weighed, context)
            if not len(row):
                return np.zeros(0, np.int32), np.zeros(0)
            position_key = None if self.is_greedy else noise.key(self.seed, Purpose.TOKEN, len(context))
            ids, values = self._ranked(row, few, k, position_key)
            return ids, chances(values, self.params.temperature)

    def law(self, row: Logits, context: Context) -> Law:
        """The distribution that this row and these settings define; empty where nothing is left."""
        with self._weighed(row, context) as weighed:
            row, few = self._allowed(weighed, context)
            if not len(row):
                return Law(np.zeros(0, np.int32), np.zeros(0))
            if self.is_greedy:
                best = np.array([row.argmax()], np.int32)
                return Law(best if few is None else few[best], np.ones(1))
            if self._truncates or few is not None:
                ids, logits = self._candidates(row, few)
            else:
                ids = np.arange(len(row), dtype=np.int32)
                logits = (row - row.max()) / np.float32(self.params.temperature)
            weights = np.exp(logits.astype(np.float64))
            return Law(ids, weights / weights.sum())

    def keys(self, positions: TokenIds) -> NoiseKeys:
        """[N, 2] noise keys of the tokens at these positions, for `Scores.winners`."""
        return noise.keys(self.seed, Purpose.TOKEN, positions)

    def draw_ahead(self, position: int, count: int, vocab_size: int) -> None:
        """Draw what is kept of the noise of `count` positions from that one on (`noise.py`), for whoever asks next, of
        rows of so many tokens. Changes nothing that is chosen."""
        if self.is_greedy or self._truncates or self.constraint is not None:
            return  # only a few tokens get noise there
        groups = noise.num_groups(vocab_size)
        for one in range(position, position + count):
            noise.ceilings(noise.key(self.seed, Purpose.TOKEN, one), groups)

    def _allowed(self, row: Logits, context: Context) -> tuple[Logits, TokenIds | None]:
        """A weighed row after the grammar; and the ids of its entries, ascending, where it was cut down to few. Empty
        where nothing is left."""
        if self.constraint is None:
            return row, None
        allowed = self.constraint.mask(context.output)[: len(row)]  # a draft model's row may be padded less
        if np.count_nonzero(allowed) > _FEW:
            row, few = np.where(allowed, row, np.float32(-np.inf)), None
        else:
            few = allowed.nonzero()[0].astype(np.int32)
            row = row[few]
        if row.max(initial=-np.inf) == -np.inf:  # all that the grammar allows is banned by the bias
            return np.zeros(0, np.float32), np.zeros(0, np.int32)
        return row, few

    def _weighed(self, row: Logits, context: Context) -> _Weighed:
        """The row after bias and penalties, for the time of a `with`."""
        weighed = _Weighed(row)
        if len(self._bias_ids):
            if int(self._bias_ids.max()) >= len(row):
                raise SettingError(
                    "logit_bias names no token", got=int(self._bias_ids.max()), expected=f"below {len(row)}"
                )
            weighed.put(self._bias_ids, row.take(self._bias_ids) + self._biases)
        if self.uses_counts:
            p = self.params
            if p.repetition_penalty != 1.0:
                seen, _ = context.counts.seen()
                values = weighed.row.take(seen)
                # positive logits are divided, negative ones multiplied: the lower result of the two, or the higher
                choose = np.minimum if p.repetition_penalty > 1.0 else np.maximum
                weighed.put(seen, choose(values / p.repetition_penalty, values * p.repetition_penalty))
            if p.presence_penalty or p.frequency_penalty:
                produced, counts = context.output_counts.seen()
                penalties = p.presence_penalty + p.frequency_penalty * counts.astype(np.float32)
                weighed.put(produced, weighed.row.take(produced) - penalties)
        return weighed

    def _ranked(
        self, row: Logits, few: TokenIds | None, k: int, position_key: tuple[int, int] | None
    ) -> tuple[TokenIds, Logits]:
        """([at most k] ids, what they are ranked by), best first: logits, or with noise logits / temperature + noise,
        but for a constant."""
        if position_key is None or (few is None and not self._truncates):
            ids, values = row_top(row, min(k, len(row)), self.params.temperature, position_key)
            return (ids if few is None else few[ids]), values
        ids, values = self._candidates(row, few)
        values = values + noise.gumbel(position_key, ids)
        order = np.lexsort((ids, -values))[:k]
        return ids[order], values[order]

    def _noisy_best(self, row: Logits, few: TokenIds | None, position_key: tuple[int, int]) -> int:
        """The candidate with the best noisy sum."""
        ids, logits = self._candidates(row, few)
        if len(ids) == 1:
            return int(ids[0])
        logits += noise.gumbel(position_key, ids)
        best = (logits == logits[logits.argmax()]).nonzero()[0]
        return int(ids[best].min() if len(best) > 1 else ids[best[0]])  # the lowest id among equals

    def _shifted(self, amount: float) -> Sampler:
        """With room for rows whose differences, over temperature, are off by `amount`: more candidates if it is
        positive, fewer if negative. A mass m has odds m / (1 - m), which change by a factor of at most exp(amount)."""
        p, least = self.params, 1e-12
        amount = max(-_FAR, min(amount, _FAR))
        top_p = p.top_p if p.top_p >= 1.0 else p.top_p / (p.top_p + (1.0 - p.top_p) * math.exp(-amount))
        min_p = min(1.0, p.min_p * math.exp(-amount))
        return Sampler(replace(p, top_p=max(top_p, least), min_p=min_p), self.seed)

    def _candidates(self, row: Logits, few: TokenIds | None) -> tuple[TokenIds, Logits]:
        """Tokens that survive truncation, best first, and how far below the best they are, over temperature.
        few: the ids of the row's entries, where it does not hold all."""
        places, logits = self._surviving(row)
        return (places if few is None else few[places]), logits

    def _surviving(self, row: Logits) -> tuple[TokenIds, Logits]:
        """The places of those tokens in the row."""
        p = self.params
        temperature = np.float32(p.temperature)
        keep = p.top_k if 0 < p.top_k < len(row) else 0
        if not keep and p.top_p < 1.0:
            return self._nucleus((row - row.max()) / temperature)
        ids, logits = top(row, keep) if keep else _above(row, p.min_p, temperature)
        logits = (logits - logits[0]) / temperature
        weights = np.exp(logits.astype(np.float64))
        if p.top_p < 1.0:
            cut = _nucleus_size(weights, weights.sum(), p.top_p)
            ids, logits, weights = ids[:cut], logits[:cut], weights[:cut]
        if p.min_p > 0.0:
            cut = max(1, int(np.count_nonzero(weights >= p.min_p)))
            ids, logits = ids[:cut], logits[:cut]
        return ids, logits

    def _nucleus(self, logits: Logits) -> tuple[TokenIds, Logits]:
        """top-p without top-k: sort only as far as the mass requires. The best logit is 0."""
        p = self.params
        total = float(np.exp(logits).sum(dtype=np.float64))
        size = 128
        while True:
            ids, best = top(logits, size)
            weights = np.exp(best.astype(np.float64))
            if len(ids) == len(logits) or weights.sum() >= p.top_p * total:
                break
            size *= 8
        cut = _nucleus_size(weights, total, p.top_p)
        if p.min_p > 0.0:
            cut = max(1, min(cut, int(np.count_nonzero(weights >= p.min_p))))
        return ids[:cut], best[:cut]


def nothing_left() -> SettingError:
    """For a row of which no token is left."""
    return SettingError(
        "nothing can be said here: logit_bias bans all tokens that the grammar allows", fix="Ban fewer tokens."
    )


def _nucleus_size(weights: Probabilities, total: float, top_p: float) -> int:
    """Fewest leading candidates whose mass reaches top_p of the total."""
    return min(len(weights), int(weights.cumsum().searchsorted(top_p * total)) + 1)


def _above(row: Logits, min_p: float, temperature: np.float32) -> tuple[TokenIds, Logits]:
    """(ids, logits) of the tokens with p >= min_p * max p, best first."""
    maxima = group_maxima(row)
    share = np.float32(math.log(min_p)) * temperature if min_p > 0.0 else np.float32(-np.inf)
    return reaching(row, maxima[maxima.argmax()] + share, maxima)


def chances(values: NDArray[np.floating], temperature: float) -> Probabilities:
    """[..., k] logarithm of the chance that each of the k best-ranked tokens is the target's choice.

    `values` are logits of the drafter, or logits / temperature + noise: then T * values = logits + T * noise.
    If the target's logits are the drafter's plus Gumbel errors of scale 1, the target's best of these is
    distributed as their softmax. At T = 0 that is q itself; with noise it says how far the draw has
    already settled the matter. Source: ours. docs/log.md shows how well it is calibrated.
    """
    scaled = values.astype(np.float64) * (temperature or 1.0)
    scaled -= scaled.max(axis=-1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True)))


def is_clear(values: NDArray[np.floating], temperature: float, bound: float) -> bool:
    """Do the best and the second of these (logits, or with a temperature logits / temperature + noise) lie further
    apart than `bound` logits? Values best first."""
    return len(values) < 2 or float(values[0] - values[1]) * (temperature or 1.0) > bound


def log_softmax_at(row: Logits, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of some tokens under the model's own distribution."""
    peak = float(row.max())
    log_total = peak + math.log(float(np.exp(row - np.float32(peak)).sum(dtype=np.float64)))
    return [float(row[token]) - log_total for token in tokens]
