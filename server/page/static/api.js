// The server's API. The key stays in this tab: sessionStorage goes with it.

const STORED = "pacellm-key";

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

const at = (path) => new URL(path, document.baseURI);

async function send(method, path, body, signal) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method, headers, signal, cache: "no-store" };
  const answer = await fetch(at(path), { ...options, body: body === undefined ? undefined : JSON.stringify(body) });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Refused(answer.status, told?.error);
}

export async function call(method, path, body) {
  return (await send(method, path, body)).json();
}

export const session = (name, rest = "") => `v1/sessions/${encodeURIComponent(name)}${rest}`;

// Chunks of a streamed answer, as they come.
export async function* chat(body, signal) {
  const answer = await send("POST", "v1/chat/completions", body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  let whole = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    left += value;
    const events = left.split("\n\n");
    left = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") {
        whole = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(0, chunk.error);
      yield chunk;
    }
  }
  if (!whole) throw new Refused(0, { message: "the connection ended before the answer did" });
}
