// Shows the scheduler's statistics, five times a second, and whether the server can be reached.
import { setChats } from "./chat.js"
import { $, ConnectionLost, createElement, readServerSentEvents, setText } from "./page.js"

const SILENCE_TIMEOUT_MS = 5000              // ms without a message after which the connection counts as lost
const RETRY_DELAY_MS = 2000                  // ms until the next try
const MAX_SAMPLES = 300                      // points in the chart: a minute
const MAX_BATCH_ROWS = 64                    // requests of the batch
const STATES = { loading: "the model is being loaded", restarting: "the engine starts again" }

let samples = []

// A browser opens six connections to a server, for all its tabs, so hidden tabs close theirs.
async function watch() {
  for (;;) {
    if (!document.hidden) await readSamples().catch(lost)
    await (document.hidden ? shown() : new Promise(over => setTimeout(over, RETRY_DELAY_MS)))
  }
}

const shown = () => new Promise(over => document.addEventListener("visibilitychange", over, { once: true }))

async function readSamples() {
  const ending = new AbortController(), { signal } = ending
  const silent = () => ending.abort(new ConnectionLost("the server says nothing"))
  document.addEventListener("visibilitychange", () => ending.abort(), { signal })
  let timer = setTimeout(silent, SILENCE_TIMEOUT_MS)
  try {
    for await (const now of readServerSentEvents("stats", { signal })) {
      clearTimeout(timer)
      timer = setTimeout(silent, SILENCE_TIMEOUT_MS)
      draw(now)
    }
  } finally {
    clearTimeout(timer)
    ending.abort()
  }
}

function lost(error) {
  samples = []
  if (document.hidden) return                // hidden: the stream was closed on purpose
  state(`${error.message}; trying again`, "")
}

function state(words, name) {
  if ($("state").textContent != words) setText("state", words)  // screen readers read each change aloud
  $("state").className = name
  $("scheduler").classList.toggle("stale", name != "ready")
}

function draw(now) {
  setText("model", now.model)
  state(STATES[now.state] ?? now.state, now.state)
  setChats(now.chat)
  if (now.blocks === undefined) { samples = []; return }
  samples = [...samples, { ...now, at: performance.now() }].slice(-MAX_SAMPLES)
  const points = rates(), lately = points.slice(-5)
  setText("speed", (lately.reduce((sum, [made]) => sum + made, 0) / Math.max(1, lately.length)).toFixed(0))
  drawChart(points)
  for (const id of ["running", "waiting", "preemptions"]) setText(id, now[id])
  setText("hits", now.prefix_queries ? (100 * now.prefix_hits / now.prefix_queries).toFixed(0) + "%" : "–")
  drawBlocks(now)
  drawBatch(now.running ? now.batch : [])
}

function rates() {
  return samples.slice(1).map((sample, i) => {
    const rate = key => Math.max(0, sample[key] - samples[i][key]) / (sample.at - samples[i].at) * 1e3
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
    const x = n => width - (points.length - 1 - n) * width / (MAX_SAMPLES - 1)
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
  setText("pool", `${now.blocks_used} of ${now.blocks} blocks of ${now.block_size} tokens held`)
  $("blocks").replaceChildren(...bar({ done: own, hit: now.blocks_shared }, now.blocks))
  setText("own", own + " by one")
  setText("shared", now.blocks_shared + " shared")
  setText("free", now.blocks - now.blocks_used + " free")
  setText("known", `${now.blocks_known} are known for what they hold, until they are needed`)
}

function drawBatch(batch) {
  const sum = batch.reduce((n, run) => n + run.new, 0)
  const longest = Math.max(64, ...batch.map(run => run.tokens))
  setText("step", batch.length ? `${sum} tokens in the last step` : "nobody")
  $("batch").replaceChildren(...batch.slice(0, MAX_BATCH_ROWS).map(run => row(run, longest)))
  setText("more", batch.length > MAX_BATCH_ROWS ? `and ${batch.length - MAX_BATCH_ROWS} more` : "")
}

function row(run, longest) {
  const line = createElement("div", "run"), blocks = createElement("div", "bar")
  const hit = Math.min(run.hit, run.computed - run.new)
  const parts = { hit, done: run.computed - run.new - hit, new: run.new, left: run.tokens - run.computed }
  blocks.append(...bar(parts, longest))
  const name = run.request.replace(/^[a-z]+[-_]/, "").slice(0, 6) + (run.index ? "." + run.index : "")
  const count = createElement("span", "", `${run.computed} / ${run.tokens}  +${run.new}`)
  line.append(createElement("code", "", name), blocks, count)
  return line
}

function bar(parts, whole) {
  return Object.entries(parts).map(([name, n]) => {
    const part = createElement("i", name)
    part.style.width = 100 * n / whole + "%"
    return part
  })
}

watch()
