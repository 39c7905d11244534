// Puts the page together: views, settings, what is loaded, keys.

import { Chat } from "./chat.js";
import { get } from "./client.js";
import { Race } from "./race.js";

const byId = (id) => document.getElementById(id);
const VIEWS = ["chat", "race"];
const KEPT = ["system", "temperature", "top-p", "max-tokens", "seed", "speculation", "key"];

let status = null;
let trouble = null; // the error that is shown
let unseen = null; // the one that looking met

function complain(error) {
  trouble = error;
  byId("trouble").hidden = error === null;
  byId("trouble").textContent = error === null ? "" : error.message;
  if (error?.status === 401) openSettings("key");
}

function openSettings(field = "temperature") {
  if (!byId("settings").open) byId("settings").showModal();
  byId(field).focus();
}

function show(view) {
  for (const name of VIEWS) {
    const chosen = name === view;
    byId(name).hidden = !chosen;
    byId(`tab-${name}`).setAttribute("aria-selected", String(chosen));
    byId(`tab-${name}`).tabIndex = chosen ? 0 : -1;
  }
  history.replaceState(null, "", view === "chat" ? "#" : `#${view}`);
}

/** Settings outlive a reload, not the tab: the key must not lie around. */
function keep() {
  for (const name of KEPT) {
    byId(name).value = sessionStorage.getItem(name) ?? byId(name).value;
    byId(name).addEventListener("change", () => sessionStorage.setItem(name, byId(name).value));
  }
}

async function look() {
  try {
    status = await get("/status");
  } catch (error) {
    unseen = error;
    complain(error);
    return;
  }
  if (trouble !== null && trouble === unseen) complain(null); // not what an answer met meanwhile
  const draft = status.draft ? ` with ${status.draft}` : "";
  byId("model").textContent = `${status.target}${draft} · ${status.backend} · ${status.device}`;
  byId("model").title = status.notes.join("\n");
}

const chat = new Chat(complain, () => (status?.plain_ms ? 1000 / status.plain_ms : null));
const race = new Race(complain);

for (const view of VIEWS) {
  byId(`tab-${view}`).addEventListener("click", () => show(view));
  byId(`tab-${view}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = VIEWS.find((name) => name !== view);
    show(other);
    byId(`tab-${other}`).focus();
  });
}
byId("open-settings").addEventListener("click", () => openSettings());
byId("settings").addEventListener("close", look);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) { chat.stop(); race.stop(); }
});

keep();
show(location.hash === "#race" ? "race" : "chat");
look();
