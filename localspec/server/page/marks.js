// Who guessed: a colour for each, the same everywhere on the page.

const TARGET = "target";
const NUM_COLOURS = 5;
const seen = [];

/** The class of a source's colour; empty for the target's own. */
export function colourOf(source) {
  if (source === TARGET) return "";
  if (!seen.includes(source)) seen.push(source);
  return `who-${seen.indexOf(source) % NUM_COLOURS}`;
}

/** A piece of text, marked. Neighbours of one kind are joined. */
export function append(place, piece) {
  if (!piece.text) return;
  const kind = piece.source === TARGET ? "" : `guess ${colourOf(piece.source)}${piece.rank ? " later" : ""}`;
  const last = place.lastElementChild;
  if (last && last.className === kind) {
    last.textContent += piece.text;
    return;
  }
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = piece.text;
  if (kind) span.title = `guessed by ${piece.source}${piece.rank ? ", not the first guess for its place" : ""}`;
  place.append(span);
}

/** Say what the colours mean. */
export function legend(place) {
  const entries = seen.map((source) => {
    const span = document.createElement("span");
    span.className = `guess ${colourOf(source)}`;
    span.textContent = `guessed by ${source}`;
    return span;
  });
  const own = document.createElement("span");
  own.textContent = "the model's own";
  place.replaceChildren(...entries, own);
}
