// A round as a picture: the anchor at the left, guesses to its right, what was taken in strong lines.

import { colourOf } from "./marks.js";

const SVG = "http://www.w3.org/2000/svg";
const [COLUMN, ROW, HEIGHT, GAP] = [92, 26, 20, 14];
const MARGIN = 2; // half of a thick line, and a little
const NUM_CHARS = 9;

/** Draw a round (as the server reports it) into a place, which does not shrink again before it is cleared. */
export function draw(place, round) {
  const nodes = [{ text: round.anchor.text, parent: null, source: null, taken: true }];
  for (const node of round.nodes) nodes.push({ text: node.text, token: node.token, parent: node.parent + 1, source: node.source, taken: false, q: node.log_q });
  for (const index of round.path) nodes[index + 1].taken = true;
  const tip = round.path.length ? round.path[round.path.length - 1] + 1 : 0;
  const bonus = round.emitted[round.emitted.length - 1];
  const guessed = nodes.find((node) => node.parent === tip && node.token === bonus.token); // an end is not stepped into
  if (guessed) guessed.taken = true;
  else nodes.push({ text: bonus.text, parent: tip, source: "target", taken: true, own: true });
  lay(nodes);
  const width = (Math.max(...nodes.map((node) => node.depth)) + 1) * COLUMN - GAP + 2 * MARGIN;
  const height = (Math.max(...nodes.map((node) => node.row)) + 1) * ROW;
  const picture = make("svg", { width, height, viewBox: `${-MARGIN} 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const node of nodes.slice(1)) picture.append(edge(nodes[node.parent], node));
  for (const node of nodes) picture.append(box(node));
  place.replaceChildren(picture);
  place.style.height = `${Math.max(height, parseFloat(place.style.height) || 0)}px`;
  const end = nodes.findLast((node) => node.taken); // in view, whatever the size of the rest
  place.scrollTo((end.depth + 1) * COLUMN - GAP + 2 * MARGIN - place.clientWidth, (end.row + 1) * ROW - place.clientHeight);
  place.setAttribute("aria-label", `${round.nodes.length} guesses, ${round.path.length} taken; the model added ${JSON.stringify(bonus.text)}`);
}

/** Nothing to see. */
export function clear(place) {
  place.replaceChildren();
  place.setAttribute("aria-label", "No round yet");
  place.style.height = "";
}

/** Columns by depth; a first child stands level with its parent, later ones below all that came before. */
function lay(nodes) {
  const children = nodes.map(() => []);
  nodes.forEach((node, index) => { if (node.parent !== null) children[node.parent].push(index); });
  let rows = 0;
  const visit = (index, depth) => {
    nodes[index].depth = depth;
    nodes[index].row = rows;
    children[index].forEach((child, nth) => { if (nth > 0) rows += 1; visit(child, depth + 1); });
  };
  visit(0, 0);
}

function edge(from, to) {
  const [x1, y1] = [from.depth * COLUMN + COLUMN - GAP, from.row * ROW + ROW / 2];
  const [x2, y2] = [to.depth * COLUMN, to.row * ROW + ROW / 2];
  const middle = (x1 + x2) / 2;
  return make("path", { d: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`, class: to.taken ? "taken" : "left" });
}

function box(node) {
  const kind = [node.taken ? "taken" : "left", node.own ? "own" : "", node.source ? colourOf(node.source) : ""].join(" ");
  const group = make("g", { class: kind, transform: `translate(${node.depth * COLUMN} ${node.row * ROW + (ROW - HEIGHT) / 2})` });
  group.append(make("rect", { width: COLUMN - GAP, height: HEIGHT, rx: 4 }));
  const text = make("text", { x: 5, y: 14 });
  text.textContent = shown(node.text);
  const title = make("title", {});
  const chance = node.q === null || node.q === undefined ? "" : `, ${Math.round(100 * Math.exp(Math.min(node.q, 0)))}% if its parent is taken`;
  title.textContent = node.source === null ? "the last token so far" : node.own ? "added by the model" : `guessed by ${node.source}${chance}`;
  group.append(text, title);
  return group;
}

function shown(text) {
  const visible = text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  const chars = [...visible];
  return chars.length > NUM_CHARS ? `${chars.slice(0, NUM_CHARS - 1).join("")}…` : visible;
}

function make(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
