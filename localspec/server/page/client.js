// Speaks to the server: one request, its answer as it is written.

const byId = (id) => document.getElementById(id);

/** What the settings say of an answer. */
export function settings() {
  const seed = byId("seed").value.trim();
  return {
    temperature: Number(byId("temperature").value),
    top_p: Number(byId("top-p").value),
    max_tokens: Number(byId("max-tokens").value),
    ...(seed === "" ? {} : { seed: Number(seed) }),
  };
}

/** The system message, as the beginning of a conversation. */
export function opening() {
  const text = byId("system").value.trim();
  return text ? [{ role: "system", content: text }] : [];
}

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** GET a path as JSON. */
export async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/**
 * Ask for an answer. on.progress({processed, total}) while the prompt is read, on.round(round) for every round;
 * returns {finishReason, timings, speculation, seed, note}. signal: ends it.
 */
export async function answer(body, on, signal) {
  const asked = { ...body, stream: true, show_rounds: true, return_progress: true };
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
  if (!response.ok) throw await refusal(response);
  let end = null;
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.prompt_progress) on.progress?.(chunk.prompt_progress);
    const choice = chunk.choices[0];
    if (choice?.round) on.round(choice.round);
    if (choice?.finish_reason) {
      end = { finishReason: choice.finish_reason, timings: chunk.timings, speculation: choice.speculation, seed: choice.seed, note: choice.note };
    }
  }
  if (end === null) throw new Error("the connection ended before the answer did");
  return end;
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not ours: the status says what there is to say */ }
  const error = new Error(message);
  error.status = response.status;
  return error;
}

/** Server-sent events of a body, parsed. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
