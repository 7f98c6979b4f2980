// Elements made of text, never of markup, and numbers as people read them.

export function el(name, props = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const by = (id) => document.getElementById(id);

export const count = (number) => Math.round(number).toLocaleString("en-US");

export const many = (number, name) => `${count(number)} ${name}${number === 1 ? "" : "s"}`;

export function bytes(number) {
  const names = ["B", "KB", "MB", "GB", "TB"];
  let place = 0;
  while (number >= 1000 && place < names.length - 1) {
    number /= 1024;
    place += 1;
  }
  return `${place && number < 10 ? number.toFixed(1) : Math.round(number)} ${names[place]}`;
}

export function seconds(ms) {
  if (ms < 950) return `${Math.round(ms)} ms`;
  if (ms < 59_500) return `${(ms / 1000).toFixed(ms < 9950 ? 1 : 0)} s`;
  const minutes = Math.round(ms / 60_000);
  return minutes < 90 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}

export function ago(unix) {
  const past = Math.max(0, Date.now() - 1000 * unix);
  return past < 5000 ? "now" : `${seconds(past)} ago`;
}

export const percent = (part) => `${Math.round(100 * part)} %`;

export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
