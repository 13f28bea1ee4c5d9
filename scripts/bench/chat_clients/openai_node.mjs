// openai's package for Node against a server: node openai_node.mjs URL MODEL
// Prints what report.py's programs print.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const ai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const question = "What is 2+2? Answer with a number alone.";
const chat = { model, messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 4 };
const response = { model, input: question, temperature: 0, max_output_tokens: 4 };
const answer = async () => (await ai.chat.completions.create(chat)).choices[0].message.content;

async function refusal(call, status, says) {
  try {
    await call();
  } catch (error) {
    assert.equal(error.status, status);
    assert.match(error.message, says);
    return `refused: ${error.message}`;
  }
  assert.fail("it was not refused");
}

const cases = {
  async models() {
    const found = [];
    for await (const each of ai.models.list()) found.push(each.id);
    assert.deepEqual(found, [model]);
    return found[0];
  },
  async completions() {
    const asked = { model, prompt: "The capital of France is", max_tokens: 4, temperature: 0 };
    const whole = (await ai.completions.create(asked)).choices[0].text;
    let text = "";
    for await (const part of await ai.completions.create({ ...asked, stream: true })) text += part.choices[0].text;
    assert.equal(text, whole);
    return text;
  },
  chat: answer,
  async "chat streamed"() {
    let text = "";
    for await (const chunk of await ai.chat.completions.create({ ...chat, stream: true }))
      text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, await answer());
    const whole = await ai.chat.completions.stream({ ...chat, max_tokens: 60 }).finalContent();
    assert.ok(whole.startsWith(text));
    return "the same text; by the helper too";
  },
  async responses() {
    const got = await ai.responses.create(response);
    assert.equal(got.output_text, await answer());
    assert.equal(got.status, "incomplete");
    return got.output_text;
  },
  async "responses streamed"() {
    let text = "", last = null;
    for await (const event of await ai.responses.create({ ...response, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
      last = event;
    }
    assert.equal(text, await answer());
    assert.equal(last.type, "response.incomplete");
    const final = await ai.responses.stream({ ...response, max_output_tokens: 60 }).finalResponse();
    assert.equal(final.status, "completed");
    assert.ok(final.output_text.startsWith(text));
    return `the same text; by the helper ${final.usage.output_tokens} tokens to the end`;
  },
  async "several at once"() {
    const said = await Promise.all(Array.from({ length: 4 }, () => ai.responses.create(response)));
    assert.deepEqual(new Set(said.map((each) => each.output_text)), new Set([await answer()]));
    return `${said.length} answers, the same text`;
  },
  async "given up"() {
    const stream = await ai.responses.create({ ...response, max_output_tokens: 400, stream: true });
    for await (const event of stream) break;
    return `a stream left after its first event; the next answer: ${await answer()}`;
  },
  "an unknown model": () => refusal(() => ai.responses.create({ ...response, model: "gpt-4" }), 404, /gpt-4/),
  "an answer that was stored": () => refusal(() => ai.responses.retrieve("resp_1"), 404, /stored/),
  "a json schema": () => refusal(() => ai.responses.create({ ...response, text: {
    format: { type: "json_schema", name: "x", schema: {} } } }), 400, /json_schema/),
};

const { version } = JSON.parse(readFileSync("node_modules/openai/package.json", "utf8"));
console.log(JSON.stringify({ client: "openai-node", version }));
for (const [name, run] of Object.entries(cases)) {
  const line = { case: name };
  try {
    line.result = await run();
  } catch (error) {
    line.wrong = `${error.name}: ${error.message}`.slice(0, 500);
    process.exitCode = 1;
  }
  console.log(JSON.stringify(line));
}
