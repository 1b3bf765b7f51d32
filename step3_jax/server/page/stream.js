// A chat completion as a stream of chunks, read from server-sent events.

/** What went wrong, in words for a person. `status` is the HTTP status, 0 where there was none. */
export class ChatError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Splits text that comes in pieces into the data of its events; comments, which keep the connection alive, say nothing. */
export class EventReader {
  #rest = "";
  #data = [];

  /** The data of all events that a piece completes. */
  push(piece) {
    const lines = (this.#rest + piece).split("\n");
    this.#rest = lines.pop();
    const events = [];
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line === "" && this.#data.length) {
        events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return events;
  }
}

/** The error that a response without success tells of. */
export async function readError(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // A proxy's page, or nothing.
  }
  const wait = response.headers.get("Retry-After");
  const again = response.status === 503 && wait ? ` Try again in ${wait} s.` : "";
  return new ChatError(`${message || `The server answered ${response.status}.`}${again}`, response.status);
}

export function authorise(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Yields the chunks of an answer; ends with a ChatError unless the server said that it is complete. */
export async function* streamChat(request, { key, signal }) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorise(key) },
    body: JSON.stringify({ ...request, stream: true }),
    signal,
  });
  if (!response.ok) throw await readError(response);
  const events = new EventReader();
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ChatError("The connection ended before the answer did.");
    for (const data of events.push(decoder.decode(value, { stream: true }))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ChatError(chunk.error.message);
      yield chunk;
    }
  }
}
