// The chat: the whole conversation goes to the server each time, which knows most of it already.
// It is kept until New, also through a reload, for this tab alone and no longer than it is open.
import { $, Lost, Refused, events, make, show } from "./page.js"

const HINTS = {
  true: "Ask something. Enter sends, Shift+Enter starts a new line.",
  false: "This model has no chat template: it goes on with your text. Enter sends.",
}
const WORDS = {                              // for a refusal, by its code or type
  authentication_error: () => $("key").value ? "this key is not right" : "a key is needed; give it below",
  rate_limit_error: why => `the server has too much to do; ${why}`,
  service_unavailable_error: why => `the server cannot answer now: ${why}`,
  context_length_exceeded: why => `${why}. Ask for fewer tokens, or begin another conversation with New`,
}
const turns = $("turns"), prompt = $("prompt")

let messages = []                            // what the model is told: {role, content}
let answering = null                         // the AbortController of the answer that is being written
let chats = true                             // the model has a chat template

export function setChats(does) {
  chats = does
  prompt.placeholder = HINTS[chats]
}

$("form").onsubmit = event => {
  event.preventDefault()
  const question = prompt.value
  if (answering || !question.trim()) return
  prompt.value = ""
  ask(question)
}
$("send").onclick = event => {
  if (!answering) return
  event.preventDefault()
  if (event.detail < 2) stop()               // the second click of two was meant for Send
}
$("clear").onclick = () => {
  stop()
  messages = []
  turns.replaceChildren()
  prompt.focus()
}
prompt.onkeydown = event => {
  const composing = event.isComposing || event.keyCode == 229            // 229: the same, in Safari
  if (event.key != "Enter" || event.shiftKey || composing) return
  event.preventDefault()
  if (!answering) $("form").requestSubmit()
}

async function ask(question) {
  const told = messages, mine = answering = new AbortController()
  for (const old of turns.querySelectorAll(".unheard")) old.remove()
  const asked = say("user", question), turn = say("assistant", "")
  told.push({ role: "user", content: question })
  show("send", "Stop")
  following = true
  follow()
  turn.ariaBusy = true
  try {
    await answer(told, turn, mine.signal)
  } catch (error) {
    if (told == messages) broken(error, question, asked, turn)           // else New was pressed
  }
  turn.ariaBusy = false
  if (answering == mine) stop()
}

function stop() {
  answering?.abort()
  answering = null
  show("send", "Send")
}

async function answer(told, turn, signal) {
  const [path, question] = chats ? ["v1/chat/completions", { messages: told }]
    : ["v1/completions", { prompt: told.map(message => message.content).join("") }]
  const body = JSON.stringify({
    ...question, stream: true, stream_options: { include_usage: true },
    temperature: +$("temperature").value, max_tokens: +$("tokens").value,
  })
  const begin = performance.now(), said = { role: "assistant", content: "" }
  let first, finish
  told.push(said)
  for await (const chunk of events(path, { method: "POST", headers: headers(), signal, body })) {
    for (const choice of chunk.choices) {
      first ??= performance.now()
      finish = choice.finish_reason
      const text = choice.delta?.content ?? choice.text ?? ""
      said.content += text
      turn.firstChild.append(text)           // and never all of it again
      requestAnimationFrame(follow)
    }
    if (chunk.usage) turn.lastChild.textContent = summary(chunk.usage, finish, first - begin, first)
  }
}

function headers() {
  const kind = { "Content-Type": "application/json" }, key = $("key").value
  const bytes = new TextEncoder().encode(key)                // a header holds bytes; the key may be any text
  return key ? { ...kind, Authorization: "Bearer " + String.fromCharCode(...bytes) } : kind
}

function summary(usage, finish, wait, first) {
  const { prompt_tokens: given, completion_tokens: made } = usage
  const known = usage.prompt_tokens_details.cached_tokens
  const rate = made > 1 ? `, ${((made - 1) / (performance.now() - first) * 1e3).toFixed(0)}/s` : ""
  const cut = finish == "length" ? ", cut off there" : ""
  const inward = `${given} tokens in, ${known} of them known; first after ${wait.toFixed(0)} ms`
  return `${inward}; ${made} out${cut}${rate}`
}

// The answer has no end. What came of it stays to be read and, if it was stopped, in the conversation.
// Else the question goes back to where it can be asked again.
function broken(error, question, asked, turn) {
  const stopped = error.name == "AbortError", { content } = messages.at(-1)
  if (stopped && content) {
    turn.lastChild.textContent = "stopped"
    return
  }
  messages.splice(-2)
  prompt.value = [question, prompt.value].filter(Boolean).join("\n\n")
  if (!content) asked.remove()
  if (stopped) return turn.remove()
  for (const each of [asked, turn]) each.classList.add(content ? "broken" : "unheard")
  const line = turn.appendChild(make("span", "error"))
  line.role = "alert"
  const what = content ? "It breaks off here" : "No answer"
  line.textContent = `${what}: ${reason(error)}. Your question is back in the box.`
  requestAnimationFrame(follow)
}

function reason(error) {
  if (error.type == "authentication_error") {
    $("locked").hidden = false
    $("key").focus()
  }
  if (error instanceof Lost || error instanceof Refused) {
    return (WORDS[error.code] ?? WORDS[error.type] ?? String)(error.message)
  }
  console.error(error)
  return `the page made a mistake, ${error}`
}

function say(role, text) {
  const turn = turns.appendChild(make("div", `turn ${role}`))
  turn.role = "article"
  turn.ariaLabel = role == "user" ? "You" : "The model"
  turn.append(make("span", "", text), make("small", ""))
  return turn
}

// The log follows what is written, but for who has scrolled up to read, until the end is in sight again.
let following = true, top = 0
const follow = () => { if (following) turns.scrollTop = turns.scrollHeight }

turns.onscroll = () => {
  const below = turns.scrollHeight - turns.scrollTop - turns.clientHeight
  if (turns.scrollTop < top && below > 1) following = false
  else if (below < 60) following = true      // some lines may have come since
  top = turns.scrollTop
}
addEventListener("resize", follow)

// What a reload brings back.
addEventListener("pagehide", () => {
  sessionStorage.setItem("key", $("key").value)
  sessionStorage.setItem("conversation", JSON.stringify(messages))
})

function restore() {
  $("key").value = sessionStorage.getItem("key") ?? ""
  $("locked").hidden = !$("key").value
  messages = JSON.parse(sessionStorage.getItem("conversation") ?? "[]")
  if (messages.at(-1)?.content == "") [{ content: prompt.value }] = messages.splice(-2)
  for (const { role, content } of messages) say(role, content)
  follow()
}

setChats(true)
try { restore() } catch (error) { console.warn("nothing is kept through a reload:", error.message) }
