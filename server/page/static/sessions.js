// Left: sessions as a tree of forks, with where they lie and what they take.

import { call, session as at } from "./api.js";
import { ago, by, bytes, count, el } from "./dom.js";
import { choose, copyConversation, forget, forkName, known, newName, state, talkedIn, tell } from "./state.js";

const MAX = 500; // that are shown
let hasMore = false;
let doomed = ""; // asked once whether it is to go

export async function refresh() {
  const listed = await list();
  state.sessions = listed.data;
  hasMore = listed.has_more;
  draw();
  tell("sessions");
}

let isListed = true;

// All sessions; on a server without keys on another machine, which lists none, those that this page has talked in.
async function list() {
  try {
    if (isListed) return await call("GET", `v1/sessions?limit=${MAX}`);
  } catch (error) {
    if (error.code !== "api_keys_needed") throw error;
    isListed = false;
  }
  const found = await Promise.all(talkedIn().map((name) => call("GET", at(name)).catch(() => null)));
  return { data: found.filter(Boolean), has_more: false };
}

// Children behind their parents, roots and siblings as the server lists them: used last first.
function tree() {
  const children = new Map();
  for (const one of state.sessions) {
    const parent = one.forked_from !== one.id && known(one.forked_from) ? one.forked_from : null;
    children.set(parent, [...(children.get(parent) ?? []), one]);
  }
  const found = [];
  const seen = new Set();
  const walk = (parent, depth) => {
    for (const one of children.get(parent) ?? []) {
      if (seen.has(one.id)) continue;
      seen.add(one.id);
      found.push([one, depth]);
      walk(one.id, depth + 1);
    }
  };
  walk(null, 0);
  for (const one of state.sessions) if (!seen.has(one.id)) found.push([one, 0]); // of a circle of reused names
  return found;
}

export const bytesOf = (one) => one.bytes.kv + one.bytes.bank + one.bytes.host + one.bytes.history + one.bytes.disk;

function draw() {
  const rows = tree().map(([one, depth]) => row(one, depth));
  if (state.chosen && !known(state.chosen)) rows.unshift(draft(state.chosen));
  if (hasMore) rows.push(el("p", { class: "hint" }, `The ${MAX} used last; there are more.`));
  by("sessions").replaceChildren(...rows);
  const total = state.sessions.reduce((sum, one) => sum + bytesOf(one), 0);
  by("sessions-sum").textContent = state.sessions.length ? `${state.sessions.length} · ${bytes(total)}` : "";
}

const chosen = (name) => (name === state.chosen ? " chosen" : "");

function opened(name) {
  return {
    role: "treeitem",
    tabIndex: 0,
    onclick: () => {
      doomed = "";
      choose(name);
    },
    onkeydown: (event) => event.key === "Enter" && choose(name),
  };
}

function draft(name) {
  const line = el("div", { class: "facts" }, el("span", {}, "new"));
  return el("div", { class: `session${chosen(name)}`, ...opened(name) }, el("div", { class: "name" }, name), line);
}

function row(one, depth) {
  const orphan = one.forked_from && !known(one.forked_from) ? `, of ${one.forked_from}, which is gone` : "";
  const parts = Object.entries(one.bytes).filter(([, size]) => size);
  const title = parts.map(([name, size]) => `${name} ${bytes(size)}`).join(", ") + orphan;
  return el(
    "div",
    { class: `session depth-${Math.min(depth, 4)}${chosen(one.id)}`, "data-session": one.id, title, ...opened(one.id) },
    el(
      "div",
      { class: "top" },
      el("span", { class: "name" }, depth || orphan ? `↳ ${one.id}` : one.id),
      action("fork", () => fork(one.id)),
      action(one.id === doomed ? "really delete" : "delete", () => drop(one.id)),
    ),
    el(
      "div",
      { class: "facts" },
      el("span", { class: `tier ${one.tier}` }, one.in_use ? `${one.tier} · in use` : one.tier),
      el("span", {}, `${count(one.tokens)} tokens`),
      el("span", {}, bytes(bytesOf(one))),
      el("span", {}, ago(one.last_used)),
    ),
  );
}

function action(name, run) {
  const click = (event) => {
    event.stopPropagation();
    run().catch((error) => tell("problem", error));
  };
  return el("button", { type: "button", onclick: click }, name);
}

async function fork(name) {
  const made = await call("POST", at(name, "/fork"), { session_id: forkName(name) });
  copyConversation(name, made.id);
  await refresh();
  choose(made.id);
}

async function drop(name) {
  if (doomed !== name) {
    doomed = name;
    draw();
    return;
  }
  await call("DELETE", at(name));
  forget(name);
  await refresh();
  if (name === state.chosen) choose(state.sessions[0]?.id ?? newName());
}
