// What the page knows: the server's config, the chosen session, and what was said in each while the page was open.

const listeners = new Map();

export const state = {
  config: null,
  sessions: [],
  chosen: "",
  layer: null,
  busy: new Set(), // sessions with an answer under way here
};

const conversations = new Map();

// Messages of a session: {role, text, file, answer …}; the server keeps none of their texts.
export function conversation(name) {
  if (!conversations.has(name)) conversations.set(name, []);
  return conversations.get(name);
}

export function copyConversation(name, target) {
  const kept = conversation(name).filter((message) => !message.undone && !message.running);
  conversations.set(target, kept.map((message) => ({ ...message })));
}

// Sessions that the server has had a message of.
export const talkedIn = () => [...conversations].filter(([, messages]) => messages.some((one) => one.sent)).map(([name]) => name);

export const forget = (name) => conversations.delete(name);

export const known = (name) => state.sessions.find((one) => one.id === name);

export function on(event, run) {
  listeners.set(event, [...(listeners.get(event) ?? []), run]);
}

export function tell(event, ...args) {
  for (const run of listeners.get(event) ?? []) run(...args);
}

export function choose(name) {
  if (state.chosen === name) return;
  state.chosen = name;
  tell("chosen");
}

const isTaken = (name) => known(name) !== undefined || conversations.has(name);

// The first name with a number that nothing has.
function numbered(prefix, first) {
  let number = first;
  while (isTaken(prefix + number)) number += 1;
  return prefix + number;
}

export const newName = () => numbered("chat-", 1);

export const forkName = (name) => numbered(`${name.slice(0, 240)}.`, 2);
