// The router's HTTP API: what is served, how the pools are, and answers as they stream.

/** An error that the router explained; `code` is its word for programs. */
export class Refused extends Error {
  constructor({ message, code, param }, retryAfterMs = null) {
    super(message);
    Object.assign(this, { code, param, retryAfterMs });
  }
}

/** The key that the router knows this page by, where it asks for one. Gone with the tab. */
const KEY = "api-key";
export const useKey = (key) => sessionStorage.setItem(KEY, key);

function signed(headers = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...headers, authorization: `Bearer ${key}` } : headers;
}

/** @returns {Promise<{bases: object[], rewards: object[]}>} */
export async function served() {
  const { data } = await read("/v1/models");
  const of = (role) => data.filter((model) => model.uniarm.role === role);
  return { bases: of("base"), rewards: of("reward") };
}

export const status = () => read("/status");

/** Chunks of one answer, as objects; ends early with `signal`. */
export async function* chat(body, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: signed({ "content-type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  let isWhole = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      isWhole = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error);
    yield chunk;
  }
  if (!isWhole) throw new Error("The connection broke before the answer was whole.");
}

async function read(path) {
  const response = await fetch(path, { headers: signed() });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

async function refusal(response) {
  const delay = Number(response.headers.get("retry-after-ms")) || null;
  try {
    return new Refused((await response.json()).error, delay);
  } catch {
    return new Error(`The router answered ${response.status}.`);
  }
}

/** Data of server-sent events. Lines may break anywhere, characters too. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, data] = ["", []];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
