// Middle: what is asked and answered in the chosen session.

import { chat } from "./api.js";
import { by, bytes, count, el, many, seconds } from "./dom.js";
import { drawAnswer } from "./answer.js";
import { drawUser } from "./document.js";
import { conversation, known, state, tell } from "./state.js";

const MAX_FILE = 60 * 2 ** 20;
let file = null;
const running = new Map(); // by session: what cancels its answer
const progress = new Map(); // by session: how far its prompt is read

export function draw() {
  const messages = conversation(state.chosen);
  const nodes = messages.map((message) => node(message));
  const session = known(state.chosen);
  if (!messages.length) {
    const text = session?.tokens
      ? `This session has read ${count(session.tokens)} tokens; their text is not kept. What you ask goes on from there.`
      : "Ask something, or drop a text file and ask about it. The session keeps what it has read: only what is new is sent.";
    nodes.push(el("p", { class: "hint" }, text));
  }
  by("messages").replaceChildren(...nodes);
  by("messages").scrollTop = by("messages").scrollHeight;
  drawState();
}

function node(message) {
  message.node = message.role === "assistant" ? drawAnswer(message, { answerCall }) : drawUser(message);
  return message.node;
}

function redraw(message) {
  if (!message.node?.isConnected) return;
  const box = by("messages");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  const old = message.node;
  old.replaceWith(node(message));
  if (atEnd) box.scrollTop = box.scrollHeight;
}

export function drawState() {
  const session = known(state.chosen);
  by("session-name").textContent = state.chosen;
  by("session-facts").textContent = session
    ? `${many(session.tokens, "token")}, ${many(session.commits, "turn")}${session.forked_from ? `, a fork of ${session.forked_from}` : ""}`
    : "begins with the first question";
  const busy = running.has(state.chosen);
  by("send").disabled = busy;
  by("cancel").hidden = !busy;
  drawProgress();
}

function drawProgress() {
  const told = progress.get(state.chosen);
  by("reading").hidden = !told;
  if (!told) return;
  const { total, cached, processed, estimated_ms: left, queue } = told;
  by("reading-cached").style.width = `${(100 * cached) / Math.max(1, total)}%`;
  by("reading-done").style.width = `${(100 * (processed - cached)) / Math.max(1, total)}%`;
  const wait = queue ? `queued, place ${queue.position}, ${count(queue.prompt_tokens_ahead)} tokens ahead` : null;
  const time = queue ? queue.estimated_ms : left;
  const rest = time === null || time === undefined ? "" : `, ${seconds(time)} left`;
  const known = cached ? ` (${count(cached)} known)` : "";
  by("reading-text").textContent = (wait ?? `read ${count(processed)} of ${count(total)} tokens${known}`) + rest;
}

function parsed(id, what) {
  const text = by(id).value.trim();
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch {
    throw new Error(`${what} are no JSON`);
  }
}

function options() {
  const found = { temperature: Number(by("temperature").value || 0) };
  if (by("max-tokens").value !== "") found.max_tokens = Number(by("max-tokens").value);
  const tools = parsed("tools", "the tools");
  if (tools !== undefined) found.tools = tools;
  const schema = parsed("schema", "the answer's form");
  if (schema !== undefined) {
    const named = { name: "answer", schema };
    found.response_format = Object.keys(schema).length ? { type: "json_schema", json_schema: named } : { type: "json_object" };
  }
  return found;
}

// The server has the session, whether or not it was listed since.
const isThere = (name) => known(name) !== undefined || conversation(name).some((message) => message.sent);

async function submit() {
  const text = by("question").value.trim();
  const name = state.chosen;
  if (!name || (!text && !file) || running.has(name)) return; // no name: the server has not answered yet
  const message = { role: "user", text, file };
  const content = file ? (text ? `${file.text}\n\n${text}` : file.text) : text;
  const sent = [{ role: "user", content }];
  const system = by("system").value.trim();
  if (system && !isThere(name)) sent.unshift({ role: "system", content: system });
  let chosen;
  try {
    chosen = options();
  } catch (error) {
    tell("problem", error);
    return;
  }
  if (!text) chosen.max_tokens = 0; // a document alone is read, not answered
  by("question").value = "";
  take(null);
  await ask(name, message, sent, chosen);
}

async function answerCall(call, result) {
  const message = { role: "tool", text: result, name: call.name };
  const sent = [{ role: "tool", tool_call_id: call.id, name: call.name, content: result }];
  await ask(state.chosen, message, sent, options());
}

async function ask(name, message, messages, chosen) {
  const answer = { role: "assistant", text: "", reasoning: "", calls: [], running: true, asked: message, form: chosen.response_format };
  const canceller = new AbortController();
  conversation(name).push(message, answer);
  running.set(name, canceller);
  draw();
  tell("asked");
  const body = {
    model: state.config.model.id, messages, session_id: name, stream: true, return_progress: true,
    stream_options: { include_usage: true },
    pacellm: { append: isThere(name), trace: by("trace").checked, ...(by("pa").value ? { pa: by("pa").value } : {}) },
    ...chosen,
  };
  try {
    for await (const chunk of chat(body, canceller.signal)) takeIn(name, answer, chunk);
    message.sent = true;
  } catch (error) {
    message.undone = true;
    answer.error = canceller.signal.aborted ? "cancelled; the session is as it was before" : error.message;
    if (name === state.chosen && message.role === "user" && !by("question").value) {
      by("question").value = message.text; // to be asked again
      if (message.file && !file) take(message.file);
    }
    if (error.status === 401) tell("problem", error);
  }
  answer.running = false;
  running.delete(name);
  progress.delete(name);
  await Promise.resolve(tell("answered", name));
  if (name === state.chosen) {
    redraw(message);
    redraw(answer);
    drawState();
  }
}

function takeIn(name, answer, chunk) {
  if (chunk.prompt_progress) {
    progress.set(name, chunk.prompt_progress);
    if (name === state.chosen) drawProgress();
    return;
  }
  if (chunk.usage) answer.usage = chunk.usage;
  if (chunk.pacellm) answer.report = chunk.pacellm;
  for (const choice of chunk.choices) {
    const { delta } = choice;
    if (delta.content) answer.text += delta.content;
    if (delta.reasoning_content) answer.reasoning += delta.reasoning_content;
    for (const piece of delta.tool_calls ?? []) addCall(answer.calls, piece);
    if (choice.finish_reason) answer.reason = choice.finish_reason;
  }
  if ((answer.text || answer.reasoning || answer.calls.length) && progress.delete(name)) drawState();
  if (name === state.chosen && !answer.waiting) {
    answer.waiting = true;
    requestAnimationFrame(() => {
      answer.waiting = false;
      redraw(answer);
    });
  }
}

function addCall(calls, piece) {
  calls[piece.index] ??= { id: piece.id, name: piece.function.name, arguments: "" };
  calls[piece.index].arguments += piece.function.arguments ?? "";
}

// A file to be read with the next question; null takes it out.
function take(taken) {
  file = taken;
  by("file-chip").hidden = !file;
  by("file-name").textContent = file ? `${file.name}, ${bytes(file.size)}` : "";
}

async function read(taken) {
  if (!taken) return;
  if (taken.size > MAX_FILE) return tell("problem", new Error(`${taken.name} has ${bytes(taken.size)}; at most ${bytes(MAX_FILE)} are read`));
  const data = await taken.arrayBuffer();
  try {
    take({ name: taken.name, size: taken.size, text: new TextDecoder("utf-8", { fatal: true }).decode(data) });
    by("question").focus();
  } catch {
    tell("problem", new Error(`${taken.name} is no text in UTF-8`));
  }
}

export function start() {
  by("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  by("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  by("cancel").addEventListener("click", () => running.get(state.chosen)?.abort());
  by("file").addEventListener("change", () => {
    read(by("file").files[0]);
    by("file").value = "";
  });
  by("file-drop").addEventListener("click", () => take(null));
  const over = (is) => by("composer").classList.toggle("over", is);
  for (const name of ["dragover", "dragenter"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      over(true);
    });
  }
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && over(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    read(event.dataTransfer.files[0]);
  });
}
