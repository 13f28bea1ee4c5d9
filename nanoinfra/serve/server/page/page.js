// Shared by chat.js and scheduler.js: DOM elements, errors, and server-sent events.
export const $ = id => document.getElementById(id)
export const setText = (id, text) => { $(id).textContent = text }
export const createElement = (tag, name, text = "") =>
  Object.assign(document.createElement(tag), { className: name, textContent: text })

// The server has answered with an error: its message, and OpenAI's type and code of it.
export class APIError extends Error {
  constructor({ message, type, code }) {
    super(message)
    Object.assign(this, { type, code })
  }
}

// The connection to the server is lost.
export class ConnectionLost extends Error {}

// Yields the data of server-sent events as they arrive, until data: [DONE].
// Throws APIError, ConnectionLost, and after an abort its reason.
export async function* readServerSentEvents(path, options) {
  const { signal } = options
  const lost = message => () => { throw signal.aborted ? signal.reason : new ConnectionLost(message) }
  const response = await fetch(path, options).catch(lost("the server cannot be reached"))
  if (!response.ok) throw await errorOfResponse(response)
  const decoder = new TextDecoder(), reader = response.body.getReader(), broken = lost("the connection broke")
  for (let left = ""; ;) {
    const { done, value } = await reader.read().catch(broken)
    if (done) throw new ConnectionLost("the server has ended the connection")
    const parts = (left + decoder.decode(value, { stream: true })).split("\n\n")
    left = parts.pop()
    for (const part of parts.filter(part => part.startsWith("data: "))) {
      if (part == "data: [DONE]") return
      const data = JSON.parse(part.slice(6))
      if (data.error) throw new APIError(data.error)
      yield data
    }
  }
}

// The APIError of a response. A proxy may answer too, and not in JSON.
async function errorOfResponse(response) {
  const said = await response.json().catch(() => null)
  const { status, statusText } = response
  return new APIError(said?.error ?? { message: `the answer was HTTP ${status} ${statusText}` })
}
