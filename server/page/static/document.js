// A question with the document that came with it, and in both the passages that working memory called back.

import { bytes, color, count, el } from "./dom.js";

const OPEN = 4000; // characters that are shown at once

export function drawUser(message) {
  const who = message.role === "tool" ? `result of ${message.name}` : "you";
  const parts = [el("div", { class: "who" }, message.undone ? `${who} (not taken)` : who)];
  if (message.file) parts.push(documentOf(message));
  if (message.text) parts.push(el("div", { class: "said" }, marked(message.text, message.marks?.text ?? [])));
  return el("div", { class: `message ${message.role}${message.undone ? " undone" : ""}` }, parts);
}

function documentOf(message) {
  const { file } = message;
  const marks = message.marks?.file ?? [];
  const head = `${file.name} · ${bytes(file.size)}${marks.length ? ` · ${marks.length} passages called back` : ""}`;
  const text = el("div", { class: "text", tabIndex: 0 }, marked(file.text, marks));
  const map = el("canvas", { class: "map", width: 12, height: 260 });
  const shown = el("details", { class: "document", open: marks.length > 0 || file.text.length < OPEN }, el("summary", {}, head), el("div", { class: "body" }, text, map));
  drawMap(map, file.text.length, marks);
  return shown;
}

// Where in the document the passages stand.
function drawMap(canvas, length, marks) {
  const paint = canvas.getContext("2d");
  paint.fillStyle = color("--mark-best");
  for (const one of marks) {
    const top = (one.start / length) * canvas.height;
    paint.fillRect(1, top, 10, Math.max(2, ((one.end - one.start) / length) * canvas.height));
  }
}

// Text with its passages marked; where two overlap the better one stands.
function marked(text, marks) {
  const parts = [];
  let place = 0;
  for (const one of apart(marks)) {
    parts.push(text.slice(place, one.start));
    const vote = el("span", { class: "vote", title: `vote of the ${one.index} index` }, `#${one.rank + 1} ${one.vote.toPrecision(3)}`);
    parts.push(el("mark", { class: one.rank === 0 ? "best" : "", "data-rank": String(one.rank) }, vote, text.slice(one.start, one.end)));
    place = one.end;
  }
  parts.push(text.slice(place));
  return parts;
}

function apart(marks) {
  const taken = [];
  for (const one of [...marks].sort((a, b) => a.rank - b.rank)) {
    if (taken.every((other) => one.end <= other.start || one.start >= other.end)) taken.push(one);
  }
  return taken.sort((a, b) => a.start - b.start);
}

// Notes in the messages of a conversation where the passages of its latest answer stand. `asked` is the message that the
// passages' own places (`in`) are about; others are found by their words.
export function mark(messages, asked, passages) {
  for (const message of messages) message.marks = undefined;
  passages.forEach((one, rank) => {
    const found = placed(asked, one) ?? searched(messages, one.text);
    if (!found) return;
    const { message, part, start, end } = found;
    message.marks ??= { file: [], text: [] };
    message.marks[part].push({ start, end, rank, vote: one.vote, index: one.index });
  });
}

// `in` counts characters as Python does: whole code points, where a string here has pairs of surrogates.
function placed(asked, passage) {
  if (!passage.in || asked.role !== "user") return null;
  const whole = asked.file ? (asked.text ? `${asked.file.text}\n\n${asked.text}` : asked.file.text) : asked.text;
  const [start, end] = [unit(whole, passage.in.start), unit(whole, passage.in.end)];
  if (!asked.file) return { message: asked, part: "text", start, end };
  const { length } = asked.file.text;
  if (start < length) return { message: asked, part: "file", start, end: Math.min(end, length) };
  return { message: asked, part: "text", start: Math.max(0, start - length - 2), end: end - length - 2 };
}

function unit(text, points) {
  if (text.search(/[\ud800-\udbff]/) < 0) return points;
  let place = 0;
  for (let number = 0; number < points && place < text.length; number += 1) place += text.codePointAt(place) > 0xffff ? 2 : 1;
  return place;
}

function searched(messages, text) {
  const wanted = text.replace(/^\ufffd+|\ufffd+$/g, "").trim();
  if (!wanted) return null;
  for (const message of messages.toReversed()) {
    if (message.role !== "user" || message.undone) continue;
    for (const part of ["file", "text"]) {
      const start = (part === "file" ? message.file?.text : message.text)?.indexOf(wanted) ?? -1;
      if (start >= 0) return { message, part, start, end: start + wanted.length };
    }
  }
  return null;
}

// The list below an answer: each passage with its vote; a click shows it where it stands.
export function passagesOf(memory, show) {
  if (!memory?.view) return null;
  const { passages, called_back: spans, resident_tokens: seen, budget_tokens: budget } = memory;
  const best = {}; // by index: their votes are of different scales
  for (const one of passages) best[one.index] = Math.max(best[one.index] ?? Number.MIN_VALUE, one.vote);
  const called = spans.reduce((sum, [start, end]) => sum + end - start, 0);
  const rows = passages.map((one, rank) => {
    const bar = el("i", {});
    bar.style.width = `${Math.max(2, (100 * one.vote) / best[one.index])}%`;
    return el(
      "div",
      { class: "passage", tabIndex: 0, title: "show it in the text", onclick: () => show(rank), onkeydown: (event) => event.key === "Enter" && show(rank) },
      el("b", {}, `#${rank + 1}`),
      el("span", { class: "quiet" }, one.index, el("div", { class: "vote", title: `vote ${one.vote}` }, bar)),
      el("span", { class: "quiet number" }, `${count(one.start)}–${count(one.end)}`),
      el("span", { class: "words" }, one.text),
    );
  });
  const head = `${count(called)} tokens called back, ${count(seen)} of at most ${count(budget)} seen; the passages with most votes`;
  return el("details", { class: "passages", open: true }, el("summary", {}, head), rows);
}
