// Bottom: what the server is at, and the caller's requests.

import { call } from "./api.js";
import { by, bytes, count, el, seconds } from "./dom.js";
import { choose, tell } from "./state.js";

const TIERS = { device: "KV on the device", banks: "banks", host: "host memory", disk: "disk" };
let going = 0;
let isTold = true; // without keys a server tells requests and load to its own machine alone

export const pause = () => (going ? 1000 : 3000);

// A request has just been sent.
export async function soon() {
  await new Promise((resolve) => setTimeout(resolve, 300));
  await refresh();
}

async function list() {
  try {
    if (isTold) return await call("GET", "v1/requests");
  } catch (error) {
    if (error.code !== "api_keys_needed") throw error;
    isTold = false;
  }
  return { data: [], server: null };
}

export async function refresh() {
  const { data, server } = await list();
  going = data.length;
  by("load").replaceChildren(...(server ? load(server) : [el("span", { class: "line" }, isTold ? "What the server holds is told to the keys that may read /metrics." : "Without API keys the server tells what it does to its own machine alone.")]));
  by("requests").replaceChildren(data.length ? table(data) : el("p", { class: "quiet" }, "No request of yours runs or waits."));
}

function load(server) {
  const { running, queued, max_running: most, max_queued: room, sessions } = server;
  const tiers = Object.entries(sessions).filter(([, number]) => number).map(([tier, number]) => `${number} on ${tier === "log" ? "the log alone" : tier}`);
  const head = [`${running} of ${most} run, ${queued} of ${room} wait`, tiers.length ? `sessions: ${tiers.join(", ")}` : "no sessions"].join(" · ");
  const rows = Object.entries(server.memory).filter(([, space]) => space.size !== 0).flatMap(([tier, space]) => memory(TIERS[tier], space));
  return [el("span", { class: "line" }, head), ...rows];
}

function memory(name, { used, size }) {
  return [el("span", {}, name), meter(size ? used / size : 0), el("span", { class: "number" }, size ? `${bytes(used)} of ${bytes(size)}` : bytes(used))];
}

function meter(part) {
  const done = el("i", {});
  done.style.width = `${100 * Math.min(1, part)}%`;
  return el("div", { class: "meter" }, done);
}

function table(data) {
  const head = el("tr", {}, ["session", "status", "prompt", "", "out", "since", ""].map((name, place) => el("th", { class: [2, 4, 5].includes(place) ? "number" : "" }, name)));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, data.map(row)));
}

function row(one) {
  const status = one.queue ? `queued, place ${one.queue.position}` : one.status;
  const read = one.to_read ? one.read / one.to_read : 0;
  const name = one.session_id ? el("a", { href: "#", onclick: (event) => { event.preventDefault(); choose(one.session_id); } }, one.session_id) : "none";
  const left = one.status === "reading" ? `${count(one.read)} of ${count(one.to_read)} read` : `${count(one.prompt_tokens)} tokens`;
  return el(
    "tr",
    { title: one.request_id },
    el("td", { class: "long" }, name), el("td", {}, status), el("td", { class: "number" }, left), el("td", {}, meter(one.status === "queued" ? 0 : read)),
    el("td", { class: "number" }, count(one.generated)), el("td", { class: "number" }, seconds(one.age_ms)),
    el("td", {}, el("button", { type: "button", onclick: () => cancel(one.id) }, "cancel")),
  );
}

async function cancel(id) {
  try {
    await call("POST", `v1/requests/${encodeURIComponent(id)}/cancel`);
    await refresh();
  } catch (error) {
    if (error.status !== 404) tell("problem", error); // it ended by itself
  }
}
