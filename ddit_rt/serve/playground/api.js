// Requests to the server: the key, errors in the server's own words, and events as they stream.

const ROOT = new URL("../", import.meta.url);

/** What went wrong, as text: the server's error object, or what stood in its place. */
export class RequestError extends Error {
  constructor(error, response = null) {
    const about = [error.type, error.code, error.param && `field ${error.param}`, response && `HTTP ${response.status}`];
    const hints = [about.filter(Boolean).join(", ")];
    const wait = response?.headers.get("retry-after");
    if (wait) hints.push(`try again in ${wait} s`);
    const id = response?.headers.get("x-request-id");
    if (id) hints.push(`request ${id}`);
    super(`${error.message || "The server gave no reason"} (${hints.filter(Boolean).join("; ")})`);
    this.status = response?.status ?? null;
  }
}

/** Sends a request and answers its response; throws RequestError unless it succeeded, AbortError when stopped. */
export async function send(path, { method = "GET", fields = null, files = {}, key = "", signal = null } = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  let body = null;
  if (Object.keys(files).length) {
    body = new FormData();
    for (const [name, value] of Object.entries(fields ?? {})) body.append(name, String(value));
    for (const [name, file] of Object.entries(files)) body.append(name, file);
  } else if (fields) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(fields);
  }
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError({ message: `The server cannot be reached: ${error.message}` });
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new RequestError(answer?.error ?? { message: response.statusText }, response);
}

export async function sendForJson(path, options) {
  return (await send(path, options)).json();
}

/** The data of every server-sent event of a response, parsed; an `error` event is thrown. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r\n\r\n|\n\n|\r\r/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"));
        if (!lines.length) continue;
        const data = JSON.parse(lines.map((line) => line.slice(5).trimStart()).join("\n"));
        if (data.type === "error") throw new RequestError(data.error ?? {});
        yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A picture that came as base64, as a blob. */
export function blobOf(base64, format = "png") {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: `image/${format}` });
}

/** Waits; a signal that aborts ends the wait with AbortError. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("Stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal.aborted) stop();
    else signal.addEventListener("abort", stop, { once: true });
  });
}
