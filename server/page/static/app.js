// Puts the parts together, and asks the server again as long as somebody looks.

import { call, key } from "./api.js";
import * as banks from "./banks.js";
import * as chat from "./chat.js";
import { mark } from "./document.js";
import { by, el } from "./dom.js";
import * as sessions from "./sessions.js";
import { choose, conversation, newName, on, state } from "./state.js";
import * as strip from "./strip.js";

const SESSIONS_MS = 5000;

let passing = false; // what is shown goes with the next answer of the server

function problem(error) {
  by("problem").textContent = error ? error.message : "";
  passing = false;
  if (error?.status === 401) by("key-form").hidden = false;
}

// Run it and say what went wrong, if anything did.
async function attempt(run) {
  try {
    await run();
    if (passing) problem(null);
  } catch (error) {
    problem(error instanceof TypeError ? new Error("the server does not answer") : error);
    passing = true;
  }
}

async function begin() {
  state.config = await call("GET", "v1/config");
  const { model, engine, version } = state.config;
  const memory = engine.working_memory ? `, views of ${engine.working_memory.toLocaleString("en-US")} tokens` : "";
  by("model").textContent = `${model.id} · ${model.device} ${model.dtype} · ${engine.max_model_len.toLocaleString("en-US")} tokens${memory} · ${version}`;
  document.title = `${model.id} · PaceLLM`;
  by("pa").replaceChildren(
    el("option", { value: "" }, engine.pa ? `server's (${engine.bank.preset})` : "off"),
    ...(engine.pa ? ["observe", "reference", "paper", "off"] : []).map((name) => el("option", { value: name }, name)),
  );
  banks.layers(engine.pa ? engine.pa_layers : []);
  await sessions.refresh();
  if (!state.chosen) choose(state.sessions[0]?.id ?? newName());
  await strip.refresh();
}

function connect() {
  on("problem", problem);
  on("chosen", () => {
    chat.draw();
    attempt(sessions.refresh);
    attempt(banks.refresh);
  });
  on("sessions", () => {
    chat.drawState();
    if (banks.isBehind()) attempt(banks.refresh);
  });
  on("answered", (name) => {
    const messages = conversation(name);
    const { asked, report } = messages.at(-1);
    if (report?.memory?.view) mark(messages, asked, report.memory.passages);
    attempt(async () => {
      await sessions.refresh();
      if (name === state.chosen) {
        chat.draw();
        await banks.refresh();
      }
    });
  });
  on("redraw", chat.draw);
  on("asked", () => {
    problem(null);
    attempt(strip.soon);
  });
  on("show-passage", (answer, rank) => {
    mark(conversation(state.chosen), answer.asked, answer.report.memory.passages);
    chat.draw();
    const found = document.querySelector(`mark[data-rank="${rank}"]`);
    if (!found) return problem(new Error("this passage is in no text that the page has"));
    found.closest("details")?.setAttribute("open", "");
    found.classList.add("shown");
    found.scrollIntoView({ block: "center" });
  });
  by("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(by("key").value.trim());
    by("key").value = "";
    attempt(begin);
  });
  by("new-session").addEventListener("click", () => choose(newName()));
}

async function watch() {
  let seen = 0;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, strip.pause()));
    if (document.hidden || state.config === null) continue;
    await attempt(strip.refresh);
    if (Date.now() - seen > SESSIONS_MS) {
      seen = Date.now();
      await attempt(sessions.refresh);
    }
  }
}

connect();
chat.start();
banks.start();
attempt(begin);
watch();
