// Right: the banks of the chosen session, a layer at a time.

import { Refused, call, session as at } from "./api.js";
import { by, color, count, el, many } from "./dom.js";
import { OUTCOMES } from "./answer.js";
import { known, state, tell } from "./state.js";

const WIDTH = 324;
const MAP = 270;
const STRIP = 20;
const ALIKE = 90; // hundredths of cosine above which keys say the same
let bank = null;
let order = [];
let slot = null;
let asked = 0; // the latest question; answers to earlier ones are dropped
let ranks = {}; // by layer, turn by turn
let drawn = null; // the session's generation

export function layers(numbers) {
  if (!numbers.includes(state.layer)) state.layer = numbers[0] ?? null;
  by("layers").replaceChildren(...numbers.map((layer) => el("button", { type: "button", role: "tab", "aria-selected": String(layer === state.layer), onclick: () => pick(layer) }, String(layer))));
}

function pick(layer) {
  state.layer = layer;
  slot = null;
  layers(state.config.engine.pa_layers);
  refresh();
  tell("redraw");
}

export function start() {
  by("by-likeness").addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
}

export async function refresh() {
  const number = (asked += 1);
  const session = known(state.chosen);
  let found = null;
  let told = null;
  drawn = session?.generation ?? null;
  let why = "This session has no banks yet.";
  if (state.layer === null) why = "This server runs without banks.";
  else if (session?.commits) {
    try {
      [told, found] = await Promise.all([call("GET", at(session.id)), call("GET", at(session.id, `/banks/${state.layer}`))]);
    } catch (error) {
      if (!(error instanceof Refused) || ![404, 409].includes(error.status)) throw error;
      why = error.message;
    }
  }
  if (number !== asked) return;
  if (found?.id !== bank?.id || found?.layer !== bank?.layer) slot = null;
  bank = found;
  ranks = Object.fromEntries(Object.entries(told?.bank?.layers ?? {}).map(([layer, { ranks: turns }]) => [layer, turns]));
  draw(why);
}

// The session was written to since, by whomever.
export const isBehind = () => (known(state.chosen)?.generation ?? null) !== drawn;

function draw(why) {
  if (!bank?.usage.length) {
    by("banks").replaceChildren(el("p", { class: "hint" }, typeof why === "string" ? why : "This session has no banks yet."));
    return;
  }
  order = by("by-likeness").checked ? byLikeness() : bank.usage.map((_, number) => number);
  const map = el("canvas", { id: "cosines", title: "cosines of keys: click a slot" });
  const use = el("canvas", { id: "usage" });
  const age = el("canvas", { id: "age" });
  by("banks").replaceChildren(
    facts(), finding(),
    el("h3", {}, "cosines of keys"), el("div", { class: "beside" }, map, scale()),
    el("h3", {}, `uses of each slot, up to ${count(Math.max(...bank.usage))}`), use,
    el("h3", {}, `age in writes, up to ${count(Math.max(...bank.age))}`), age,
    el("div", { id: "slot" }),
    el("h3", {}, "effective rank of the keys, turn by turn"), el("div", { id: "ranks" }),
    el("h3", {}, "reads of the session so far"), reads(),
  );
  paintMap(map);
  paintBars(use, bank.usage, "--accent");
  paintBars(age, bank.age, "--empty");
  for (const canvas of [map, use, age]) listen(canvas);
  drawSlot();
  drawRanks();
}

function facts() {
  const { filled, slots, writes, effective_rank: rank, segment } = bank;
  const rows = [["slots in use", `${filled} of ${slots}`], ["effective rank", `${rank.toFixed(1)} of ${filled}`], ["writes", `${count(writes)} of ${count(segment)} tokens or one decoded`]];
  if (bank.usage.length < filled) rows.push(["shown", `${bank.usage.length} slots from ${bank.start}`]);
  return el("dl", { class: "facts-grid" }, rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

// The largest set of slots whose keys are nearly those of one of them.
function finding() {
  const sizes = bank.cosines.map((row) => row.filter((cosine) => cosine > ALIKE).length);
  const most = Math.max(...sizes);
  const share = most / sizes.length;
  const words = [el("b", {}, `${most} of ${sizes.length}`), ` slots are alike: cosines above ${ALIKE / 100} with slot ${bank.start + sizes.indexOf(most)}.`];
  return el("p", { class: "finding" }, share < 0.1 ? `No more than ${most} of ${sizes.length} slots are alike.` : words);
}

// Slots along the direction in which keys differ most: blocks of like ones come to stand together.
function byLikeness() {
  const left = new Set(bank.usage.keys());
  const sums = bank.cosines.map((row) => row.reduce((sum, one) => sum + one, 0));
  let last = sums.indexOf(Math.max(...sums));
  const found = [];
  while (left.size) {
    found.push(last);
    left.delete(last);
    let best = null;
    for (const other of left) if (best === null || bank.cosines[last][other] > bank.cosines[last][best]) best = other;
    last = best;
  }
  return found;
}

function rgb(name) {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  paint.fillStyle = color(name);
  paint.fillRect(0, 0, 1, 1);
  return [...paint.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

function sized(canvas, height) {
  // all of one width, so that a slot stands above itself
  const dense = window.devicePixelRatio || 1;
  canvas.width = MAP * dense;
  canvas.height = height * dense;
  canvas.style.width = `${MAP}px`;
  canvas.style.height = `${height}px`;
  const paint = canvas.getContext("2d");
  paint.imageSmoothingEnabled = false;
  return paint;
}

function paintMap(canvas) {
  const paint = sized(canvas, MAP);
  const [low, high, under] = [rgb("--field"), rgb("--accent"), rgb("--warm")];
  const size = order.length;
  const image = new ImageData(size, size);
  order.forEach((row, y) => order.forEach((column, x) => {
    const value = bank.cosines[row][column] / 100;
    const target = value < 0 ? under : high;
    const part = Math.abs(value) ** 1.5; // most keys have something in common: what is nearly all the same shows
    for (let channel = 0; channel < 3; channel += 1) image.data[4 * (y * size + x) + channel] = low[channel] + part * (target[channel] - low[channel]);
    image.data[4 * (y * size + x) + 3] = 255;
  }));
  const small = document.createElement("canvas");
  small.width = small.height = size;
  small.getContext("2d").putImageData(image, 0, 0);
  paint.drawImage(small, 0, 0, canvas.width, canvas.height);
  outline(paint, canvas);
}

function outline(paint, canvas) {
  const place = order.indexOf(slot);
  if (place < 0) return;
  const step = canvas.width / order.length;
  paint.strokeStyle = color("--text");
  paint.lineWidth = 2;
  paint.strokeRect(place * step, 0, step, canvas.height);
  if (canvas.id === "cosines") paint.strokeRect(0, place * step, canvas.width, step);
}

function paintBars(canvas, values, name) {
  const paint = sized(canvas, STRIP);
  const most = Math.max(1, ...values);
  const step = canvas.width / order.length;
  order.forEach((one, place) => {
    const height = (canvas.height * values[one]) / most;
    paint.fillStyle = color(one === slot ? "--text" : name);
    paint.fillRect(place * step, canvas.height - height, Math.max(1, step - 0.5), height);
  });
}

function listen(canvas) {
  const at = (event) => order[Math.min(order.length - 1, Math.max(0, Math.floor((event.offsetX / MAP) * order.length)))];
  canvas.addEventListener("click", (event) => {
    slot = at(event);
    draw();
  });
  canvas.addEventListener("mousemove", (event) => {
    const column = at(event);
    if (canvas.id !== "cosines") canvas.title = `slot ${bank.start + column}: ${many(bank.usage[column], "use")}, age ${count(bank.age[column])}`;
    else {
      const row = order[Math.min(order.length - 1, Math.floor((event.offsetY / MAP) * order.length))];
      canvas.title = `slots ${bank.start + row} and ${bank.start + column}: ${(bank.cosines[row][column] / 100).toFixed(2)}`;
    }
  });
}

function scale() {
  const parts = [["--warm", "-1"], ["--field", "0"], ["--accent", "1"]].map(([name, text]) => {
    const box = el("i", { class: "dot" });
    box.style.background = color(name);
    box.style.outline = `1px solid ${color("--line")}`;
    return el("span", {}, box, text);
  });
  return el("div", { class: "legend" }, parts);
}

function drawSlot() {
  const box = by("slot");
  if (slot === null) return box.replaceChildren(el("p", { class: "quiet" }, "Click a slot to see the tokens that last wrote it."));
  const writer = bank.writers.find((one) => one.stamp === bank.stamp[slot]);
  const facts = `slot ${bank.start + slot}: ${many(bank.usage[slot], "use")}, last written ${many(bank.age[slot], "write")} ago`;
  const parts = [el("div", {}, facts)];
  if (writer) {
    const where = writer.decoded ? `by token ${count(writer.start)}, of an answer` : `by tokens ${count(writer.start)} to ${count(writer.end - 1)}, a segment of a prompt`;
    parts.push(el("div", { class: "quiet" }, `${where}, in turn ${writer.turn + 1} of the log`));
    parts.push(el("div", { class: "wrote" }, writer.text, writer.left_out ? el("span", { class: "quiet" }, ` … ${count(writer.left_out)} more tokens`) : null));
  } else parts.push(el("div", { class: "quiet" }, "Its write is older than the session's log."));
  return box.replaceChildren(el("div", { class: "slot" }, parts));
}

function reads() {
  const told = known(state.chosen)?.bank?.layers?.[state.layer];
  const names = { h: "hits", f: "fuses", m: "misses", e: "empty" };
  if (!told) return el("p", { class: "quiet" }, "None.");
  const total = Object.values(names).reduce((sum, name) => sum + told[name], 0);
  return el("div", { class: "legend" }, Object.entries(names).map(([letter, name]) => el("span", {}, el("i", { class: `dot ${letter}` }), `${OUTCOMES[letter]} ${count(told[name])} (${Math.round((100 * told[name]) / Math.max(1, total))} %)`)));
}

// Lines of all layers over the session's turns.
function drawRanks() {
  const box = by("ranks");
  const numbers = Object.keys(ranks);
  const turns = Math.max(0, ...numbers.map((layer) => ranks[layer].length));
  if (!turns) return box.replaceChildren(el("p", { class: "quiet" }, "Not known of this session."));
  const data = [Array.from({ length: turns }, (_, number) => number + 1), ...numbers.map((layer) => ranks[layer])];
  const palette = ["--accent", "--warm", "--fuse", "--hit", "--empty"].map(color);
  const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: "10px system-ui" };
  const series = numbers.map((layer, number) => ({ label: `layer ${layer}`, stroke: palette[number % palette.length], width: String(state.layer) === layer ? 2.5 : 1.2, points: { show: turns < 40, size: 4 }, value: (_, rank) => rank?.toFixed(1) ?? "" }));
  new uPlot({ width: WIDTH, height: 104, cursor: { y: false }, scales: { x: { time: false }, y: { range: (_, __, top) => [0, Math.max(1, 1.1 * top)] } }, axes: [{ ...axis, size: 24, incrs: [1, 2, 5, 10, 20, 50, 100] }, { ...axis, size: 32 }], series: [{ label: "turn" }, ...series] }, data, box);
}
