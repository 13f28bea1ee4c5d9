// The scheduler, five times a second, and whether there is a server at all.
import { setChats } from "./chat.js"
import { $, Lost, events, make, show } from "./page.js"

const SILENCE = 5000                         // ms without a word after which a server is gone
const AGAIN = 2000                           // ms until it is looked for again
const MOST_LOOKS = 300                       // in the chart: a minute
const MOST_ROWS = 64                         // of the batch
const STATES = { loading: "the model is being loaded", restarting: "the engine starts again" }

let looks = []

// A browser holds six connections to a server, for all its tabs: the hidden ones need none.
async function watch() {
  for (;;) {
    if (!document.hidden) await look().catch(lost)
    await (document.hidden ? shown() : new Promise(over => setTimeout(over, AGAIN)))
  }
}

const shown = () => new Promise(over => document.addEventListener("visibilitychange", over, { once: true }))

async function look() {
  const ending = new AbortController(), { signal } = ending
  const silent = () => ending.abort(new Lost("the server says nothing"))
  document.addEventListener("visibilitychange", () => ending.abort(), { signal })
  let timer = setTimeout(silent, SILENCE)
  try {
    for await (const now of events("stats", { signal })) {
      clearTimeout(timer)
      timer = setTimeout(silent, SILENCE)
      draw(now)
    }
  } finally {
    clearTimeout(timer)
    ending.abort()
  }
}

function lost(error) {
  looks = []
  if (document.hidden) return                // we have left
  state(`${error.message}; trying again`, "")
}

function state(words, name) {
  if ($("state").textContent != words) show("state", words)  // or it would be read out each time
  $("state").className = name
  $("scheduler").classList.toggle("stale", name != "ready")
}

function draw(now) {
  show("model", now.model)
  state(STATES[now.state] ?? now.state, now.state)
  setChats(now.chat)
  if (now.blocks === undefined) { looks = []; return }
  looks = [...looks, { ...now, at: performance.now() }].slice(-MOST_LOOKS)
  const points = rates(), lately = points.slice(-5)
  show("speed", (lately.reduce((sum, [made]) => sum + made, 0) / Math.max(1, lately.length)).toFixed(0))
  drawChart(points)
  for (const id of ["running", "waiting", "preemptions"]) show(id, now[id])
  show("hits", now.prefix_queries ? (100 * now.prefix_hits / now.prefix_queries).toFixed(0) + "%" : "–")
  drawBlocks(now)
  drawBatch(now.running ? now.batch : [])
}

function rates() {
  return looks.slice(1).map((look, i) => {
    const rate = key => Math.max(0, look[key] - looks[i][key]) / (look.at - looks[i].at) * 1e3
    return [rate("generation_tokens"), rate("prompt_tokens")]
  })
}

function drawChart(points) {
  const canvas = $("chart"), pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement)
  const scale = devicePixelRatio
  const width = canvas.width = canvas.clientWidth * scale
  const height = canvas.height = canvas.clientHeight * scale
  for (const [i, color] of [[1, "--new"], [0, "--done"]]) {
    const most = Math.max(1, ...points.map(point => point[i]))
    const x = n => width - (points.length - 1 - n) * width / (MOST_LOOKS - 1)
    pen.beginPath()
    points.forEach((point, n) => pen.lineTo(x(n), height - 2 - point[i] / most * (height - 16 * scale)))
    pen.strokeStyle = pen.fillStyle = style.getPropertyValue(color)
    pen.lineWidth = 1.5 * scale
    pen.stroke()
    pen.font = 11 * scale + "px system-ui"
    pen.fillText("≤ " + most.toFixed(0), i ? 60 * scale : 2, 11 * scale)
  }
}

function drawBlocks(now) {
  const own = now.blocks_used - now.blocks_shared
  show("pool", `${now.blocks_used} of ${now.blocks} blocks of ${now.block_size} tokens held`)
  $("blocks").replaceChildren(...bar({ done: own, hit: now.blocks_shared }, now.blocks))
  show("own", own + " by one")
  show("shared", now.blocks_shared + " shared")
  show("free", now.blocks - now.blocks_used + " free")
  show("known", `${now.blocks_known} are known for what they hold, until they are needed`)
}

function drawBatch(batch) {
  const sum = batch.reduce((n, run) => n + run.new, 0)
  const longest = Math.max(64, ...batch.map(run => run.tokens))
  show("step", batch.length ? `${sum} tokens in the last step` : "nobody")
  $("batch").replaceChildren(...batch.slice(0, MOST_ROWS).map(run => row(run, longest)))
  show("more", batch.length > MOST_ROWS ? `and ${batch.length - MOST_ROWS} more` : "")
}

function row(run, longest) {
  const line = make("div", "run"), blocks = make("div", "bar")
  const hit = Math.min(run.hit, run.computed - run.new)
  const parts = { hit, done: run.computed - run.new - hit, new: run.new, left: run.tokens - run.computed }
  blocks.append(...bar(parts, longest))
  const name = run.request.replace(/^[a-z]+[-_]/, "").slice(0, 6) + (run.index ? "." + run.index : "")
  const count = make("span", "", `${run.computed} / ${run.tokens}  +${run.new}`)
  line.append(make("code", "", name), blocks, count)
  return line
}

function bar(parts, whole) {
  return Object.entries(parts).map(([name, n]) => {
    const part = make("i", name)
    part.style.width = 100 * n / whole + "%"
    return part
  })
}

watch()
