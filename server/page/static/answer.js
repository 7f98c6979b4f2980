// One answer: reasoning, text or JSON, calls of tools, the tokens' outcomes in the banks, what was reported.

import { count, el, percent, seconds } from "./dom.js";
import { passagesOf } from "./document.js";
import { state, tell } from "./state.js";

export const OUTCOMES = { h: "hit", f: "fuse", m: "miss", e: "empty" };

export function drawAnswer(message, { answerCall }) {
  const parts = [el("div", { class: "who" }, "model")];
  if (message.reasoning) parts.push(el("details", { class: "reasoning", open: message.running }, el("summary", {}, "reasoning"), el("div", { class: "said" }, message.reasoning)));
  parts.push(body(message));
  message.calls.forEach((call) => parts.push(drawCall(call, message, answerCall)));
  if (message.error) parts.push(el("div", { class: "failed" }, message.error));
  if (message.report) parts.push(report(message), passagesOf(message.report.memory, (rank) => tell("show-passage", message, rank)));
  return el("div", { class: `message assistant${message.running ? " running" : ""}` }, parts);
}

const layerOf = (trace) => (trace.layers[state.layer] === undefined ? Object.keys(trace.layers)[0] : String(state.layer));

function body(message) {
  const trace = message.report?.trace;
  if (trace && !isPlain(message)) return tokens(trace);
  const found = message.form && !message.running ? json(message.text) : null;
  if (found) return found;
  return el("div", { class: "said" }, message.text || (message.running ? "…" : ""));
}

// Whether the text is shown rather than the tokens: until somebody chooses, where what was generated is more than text, as
// calls of tools are, or is to be read as JSON.
function isPlain(message) {
  if (message.plain !== undefined) return message.plain;
  const said = message.report.trace.tokens.slice(0, -1).join("").trim();
  return Boolean(message.form) || !(said === message.text.trim() || message.text.startsWith(said));
}

function tokens(trace) {
  const layer = layerOf(trace);
  const spans = trace.tokens.map((text, place) => {
    const told = Object.entries(trace.layers).map(([name, letters]) => `layer ${name}: ${OUTCOMES[letters[place]] ?? "not fed"}`);
    return el("span", { class: `token ${trace.layers[layer][place] ?? "quiet"}`, title: `token ${place + 1} · ${told.join(" · ")}` }, text);
  });
  if (trace.left_out) spans.push(el("span", { class: "quiet" }, ` … ${count(trace.left_out)} more tokens`));
  return el("div", { class: "said tokens" }, spans);
}

// The text as JSON with its parts told apart; null where it is none.
export function json(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    return null;
  }
  const parts = JSON.stringify(value, null, 2).split(/("(?:[^"\\]|\\.)*"(?:\s*:)?)/);
  const kind = (part) => (part.startsWith('"') ? (part.endsWith(":") ? "k" : "s") : "n");
  return el("pre", { class: "json" }, parts.map((part) => (/[\w"]/.test(part) ? el("span", { class: kind(part) }, part) : part)));
}

function drawCall(call, message, answerCall) {
  const shown = json(call.arguments) ?? el("pre", {}, call.arguments);
  const parts = [el("div", {}, "calls ", el("b", {}, call.name)), shown];
  if (message.reason === "tool_calls" && !call.answered) {
    const input = el("input", { placeholder: "its result", "aria-label": `result of ${call.name}` });
    const submit = (event) => {
      event.preventDefault();
      call.answered = true;
      answerCall(call, input.value);
    };
    parts.push(el("form", { class: "row", onsubmit: submit }, input, el("button", {}, "Send result")));
  }
  return el("div", { class: "call" }, parts);
}

function report(message) {
  const { report: told, usage, reason } = message;
  const { timings } = told;
  const made = usage?.completion_tokens ?? 0;
  const speed = made > 1 && timings.decode_ms ? `${(((made - 1) * 1000) / timings.decode_ms).toFixed(1)} a second` : null;
  const parts = [
    el("span", {}, `${count(usage?.prompt_tokens ?? 0)} tokens in, ${count(told.cached_tokens)} known, first after ${seconds(timings.queue_ms + timings.prefill_ms)}`),
    el("span", {}, [`${count(made)} tokens out`, speed].filter(Boolean).join(", ")),
    reason === "length" && made ? el("span", {}, "cut at the token limit") : null,
    el("span", { title: "how the session's banks took part" }, `banks: ${told.pa}`),
    told.note ? el("span", { class: "failed" }, told.note) : null,
  ];
  if (told.trace) parts.push(...shares(told.trace), toggle(message));
  return el("div", { class: "report" }, parts);
}

function shares(trace) {
  const layer = layerOf(trace);
  const letters = trace.layers[layer];
  const each = Object.entries(OUTCOMES).map(([letter, name]) => [letter, name, letters.split(letter).length - 1]);
  const bar = each.map(([letter, , found]) => {
    const piece = el("i", { class: letter });
    piece.style.width = `${(100 * found) / Math.max(1, letters.length)}%`;
    return piece;
  });
  const words = each.filter(([, , found]) => found).map(([letter, name, found]) => el("span", {}, el("i", { class: `dot ${letter}` }), `${name} ${percent(found / letters.length)}`));
  return [el("span", {}, `layer ${layer}`), el("span", { class: "shares" }, bar), ...words];
}

function toggle(message) {
  const click = () => {
    message.plain = !isPlain(message);
    tell("redraw", message);
  };
  return el("button", { type: "button", onclick: click }, isPlain(message) ? "tokens" : "plain text");
}
