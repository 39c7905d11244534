// The race: one prompt and one seed, plain and speculative, and whether the texts are the same.

import { answer, opening, settings } from "./client.js";
import { append, legend } from "./marks.js";
import { digits, Pace } from "./pace.js";

const byId = (id) => document.getElementById(id);
const SEEDS = 2 ** 31;

export class Race {
  /** complain(error): show it. */
  constructor(complain) {
    this.complain = complain;
    this.running = null;
    byId("race-form").addEventListener("submit", (event) => { event.preventDefault(); this.start(); });
    byId("race-stop").addEventListener("click", () => this.stop());
  }

  stop() { this.running?.abort(); }

  /** Plain first, then speculative: at the same time they would slow each other down. */
  async start() {
    const prompt = byId("race-prompt").value.trim();
    if (!prompt || this.running) return;
    this.complain(null);
    this.run(new AbortController());
    const { signal } = this.running;
    const own = settings();
    const body = { messages: [...opening(), { role: "user", content: prompt }], ...own, seed: own.seed ?? Math.floor(Math.random() * SEEDS) };
    const chosen = byId("speculation").value.trim();
    for (const lane of ["plain", "spec"]) this.reset(lane);
    try {
      verdict(`Plain decoding, seed ${body.seed} …`);
      const plain = await this.lane("plain", { ...body, speculation: "off" }, signal);
      verdict(`With speculation, seed ${body.seed} …`);
      const spec = await this.lane("spec", { ...body, speculation: chosen === "off" ? "auto" : chosen || "auto" }, signal);
      judge(plain, spec);
      legend(byId("race-legend"));
    } catch (error) {
      if (error.name === "AbortError") verdict("Stopped.");
      else { verdict("No verdict."); this.complain(error); }
    } finally {
      this.run(null);
    }
  }

  async lane(name, body, signal) {
    const pace = new Pace();
    const tokens = [];
    let text = "";
    const end = await answer(body, {
      round: (round) => {
        pace.add(round);
        tokens.push(...(round.tokens ?? []));
        for (const piece of round.pieces) { text += piece.text; append(byId(`${name}-text`), piece); }
        byId(`${name}-rate`).textContent = digits(pace.rate);
        byId(`${name}-bar`).value = tokens.length / body.max_tokens;
      },
    }, signal);
    byId(`${name}-bar`).value = 1;
    byId(`${name}-rate`).textContent = digits(end.timings.predicted_per_second);
    return { tokens, text, rate: end.timings.predicted_per_second, end };
  }

  reset(name) {
    byId(`${name}-text`).replaceChildren();
    byId(`${name}-rate`).textContent = "–";
    byId(`${name}-bar`).value = 0;
  }

  run(control) {
    this.running = control;
    byId("race-start").hidden = control !== null;
    byId("race-stop").hidden = control === null;
  }
}

function judge(plain, spec) {
  const gain = `${digits(spec.rate / plain.rate, 2)}× the speed of plain decoding`;
  const length = Math.max(plain.tokens.length, spec.tokens.length);
  let same = 0;
  while (same < length && plain.tokens[same] === spec.tokens[same]) same += 1;
  if (same === length && plain.text === spec.text) verdict(`Identical: all ${length} tokens. ${gain}.`, "same");
  else verdict(`The texts differ from token ${same + 1} on. ${gain}. localspec audit says why.`, "differs");
}

function verdict(text, kind = "") {
  byId("verdict").textContent = text;
  byId("verdict").className = kind;
}
