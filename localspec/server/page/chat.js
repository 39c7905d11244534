// The chat: a conversation, its numbers, and the tree of the round in progress.

import { answer, opening, settings } from "./client.js";
import { append, legend } from "./marks.js";
import { digits, Pace } from "./pace.js";
import { clear, draw } from "./tree.js";

const byId = (id) => document.getElementById(id);

export class Chat {
  /** complain(error): show it.  plainRate(): tokens a second of plain decoding here, or null. */
  constructor(complain, plainRate) {
    this.complain = complain;
    this.plainRate = plainRate;
    this.messages = [];
    this.running = null;
    this.drawing = false;
    byId("composer").addEventListener("submit", (event) => { event.preventDefault(); this.say(); });
    byId("message").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.say(); }
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.clear());
  }

  /** End the answer that is being written. */
  stop() { this.running?.abort(); }

  clear() {
    this.stop();
    this.messages = [];
    this.round = null;
    byId("log").replaceChildren();
    clear(byId("tree"));
    for (const number of ["rate", "length", "gain", "share"]) byId(number).textContent = "–";
    byId("message").focus();
  }

  async say() {
    const text = byId("message").value.trim();
    if (!text || this.running) return;
    this.complain(null);
    byId("message").value = "";
    turn("user", "You").text.textContent = text;
    const asked = [...this.messages, { role: "user", content: text }];
    const place = turn("assistant", "Model");
    const said = await this.follow(asked, place);
    if (said === null) byId("message").value ||= text; // nothing came: the words are given back
    else this.messages = [...asked, { role: "assistant", content: said }];
  }

  /** Write the answer into its place; what was said, or null if it failed. */
  async follow(messages, place) {
    const pace = new Pace();
    clear(byId("tree"));
    const control = new AbortController();
    this.run(control);
    let said = "";
    let failed = false;
    try {
      const body = { messages: [...opening(), ...messages], ...settings(), speculation: byId("speculation").value.trim() || "auto" };
      const end = await answer(body, {
        progress: ({ processed, total }) => { place.note.textContent = `reading the prompt: ${processed} of ${total} tokens`; },
        round: (round) => {
          if (pace.rounds === 0) place.note.textContent = "";
          pace.add(round);
          for (const piece of round.pieces) { said += piece.text; append(place.text, piece); }
          this.show(pace, round);
        },
      }, control.signal);
      pace.end(end.timings);
      this.show(pace, {});
      place.note.textContent = summary(end, pace);
      byId("note").textContent = end.speculation.plain_because ? `not speculated: ${end.speculation.plain_because}` : "";
    } catch (error) {
      failed = error.name !== "AbortError";
      place.note.textContent = failed ? "" : "stopped";
      if (failed) this.complain(error);
    } finally {
      this.run(null);
    }
    return failed && !said ? null : said;
  }

  run(control) {
    this.running = control;
    byId("send").hidden = control !== null;
    byId("stop").hidden = control === null;
    if (control === null) byId("message").focus();
  }

  /** The numbers, and the tree, at most once a frame. */
  show(pace, round) {
    if (round.nodes) this.round = round;
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      const plain = this.plainRate();
      byId("rate").textContent = digits(pace.rate);
      byId("length").textContent = digits(pace.length, 2);
      byId("gain").textContent = pace.rate && plain ? `${digits(pace.rate / plain, 2)}×` : "–";
      byId("share").textContent = pace.share === null ? "–" : `${Math.round(100 * pace.share)}%`;
      if (this.round && byId("tree-box").open) draw(byId("tree"), this.round);
      legend(byId("legend"));
      const log = byId("log");
      if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
    });
  }
}

function turn(kind, name) {
  const place = document.createElement("article");
  place.className = `turn ${kind}`;
  const who = document.createElement("b");
  who.textContent = name;
  const text = document.createElement("div");
  text.className = "text";
  const note = document.createElement("p");
  note.className = "quiet";
  place.append(who, text, note);
  byId("log").append(place);
  place.scrollIntoView({ block: "end" });
  return { text, note };
}

function summary(end, pace) {
  const { timings } = end;
  const parts = [`${timings.predicted_n} tokens`, `${digits(timings.predicted_per_second)} tokens/s`, `accepted length ${digits(pace.length, 2)}`];
  if (timings.cache_n) parts.push(`${timings.cache_n} prompt tokens from the cache`);
  parts.push(`seed ${end.seed}`);
  if (end.finishReason === "length") parts.push("cut off");
  if (end.note) parts.push(end.note);
  return parts.join(" · ");
}
