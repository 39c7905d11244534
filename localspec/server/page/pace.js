// How fast an answer is written, and how many of its tokens were guessed.

const ENOUGH_MS = 100; // less says nothing: several rounds may arrive in one piece

export class Pace {
  constructor() {
    this.final = null;
    this.tokens = 0;
    this.rounds = 0;
    this.guessed = 0;
    this.first = null; // when the first round came, and how many tokens with it
    this.last = null;
  }

  /** A round, now. */
  add(round) {
    if (!round.tokens) return; // text that was held back to the end
    const now = performance.now();
    this.tokens += round.tokens.length;
    this.rounds += 1;
    this.guessed += Math.min(round.path.length, round.tokens.length);
    this.first ??= { at: now, tokens: this.tokens };
    this.last = now;
  }

  /** The answer has ended, and took so long by the server's clock. */
  end(timings) { this.final = timings.predicted_per_second; }

  /** Tokens a second: the server's word, and before that those since the first round came; null while that is too short. */
  get rate() {
    const ms = this.rounds > 1 ? this.last - this.first.at : 0;
    return this.final ?? (ms >= ENOUGH_MS ? (1000 * (this.tokens - this.first.tokens)) / ms : null);
  }

  get length() { return this.rounds ? this.tokens / this.rounds : null; }

  get share() { return this.tokens ? this.guessed / this.tokens : null; }
}

/** A number with so many decimals, or a dash. */
export function digits(value, places = 1) {
  return value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(places);
}
