// What both halves of the page use: elements, and the server's streams.
export const $ = id => document.getElementById(id)
export const show = (id, text) => { $(id).textContent = text }
export const make = (tag, name, text = "") =>
  Object.assign(document.createElement(tag), { className: name, textContent: text })

// The server has said no: why, and OpenAI's type and code of it.
export class Refused extends Error {
  constructor({ message, type, code }) {
    super(message)
    Object.assign(this, { type, code })
  }
}

// The server, or the way to it, is gone.
export class Lost extends Error {}

// What a stream of server-sent events brings, as it comes, until it says that it is done.
// Throws Refused, Lost, and after an abort the reason of it.
export async function* events(path, options) {
  const { signal } = options, lost = why => () => { throw signal.aborted ? signal.reason : new Lost(why) }
  const response = await fetch(path, options).catch(lost("the server cannot be reached"))
  if (!response.ok) throw await refusal(response)
  const decoder = new TextDecoder(), reader = response.body.getReader(), broken = lost("the connection broke")
  for (let left = ""; ;) {
    const { done, value } = await reader.read().catch(broken)
    if (done) throw new Lost("the server has ended the connection")
    const parts = (left + decoder.decode(value, { stream: true })).split("\n\n")
    left = parts.pop()
    for (const part of parts.filter(part => part.startsWith("data: "))) {
      if (part == "data: [DONE]") return
      const news = JSON.parse(part.slice(6))
      if (news.error) throw new Refused(news.error)
      yield news
    }
  }
}

// What stands between may answer too, a proxy say, and not in JSON.
async function refusal(response) {
  const said = await response.json().catch(() => null)
  const { status, statusText } = response
  return new Refused(said?.error ?? { message: `the answer was HTTP ${status} ${statusText}` })
}
