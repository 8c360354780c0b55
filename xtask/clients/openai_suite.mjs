// The openai package for Node against `graft server`: a second decoder, written by others. The servers are those of
// openai_suite.py: openai_suite.mjs TOOLS PLAIN LOCKED.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(process.env.GRAFT_NODE_MODULES + "/");
const OpenAI = require("openai");

const [tools, plain, locked] = process.argv.slice(2);
const client = (address, apiKey = "none") => new OpenAI({ baseURL: `http://${address}/v1`, apiKey, maxRetries: 0, timeout: 60000 });
const user = [{ role: "user", content: "What is the weather?" }];
const schema = {
  type: "object",
  properties: { city: { enum: ["Seoul", "Paris"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const follows = (value) => {
  assert.deepEqual(Object.keys(value), ["city", "days"]);
  assert.ok(["Seoul", "Paris"].includes(value.city) && value.days >= 1 && value.days <= 9, JSON.stringify(value));
};
const fails = async (kind, status, call) => {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof kind, `${error}`);
    assert.equal(error.status, status);
    return error;
  }
  assert.fail(`expected ${kind.name}, the call went through`);
};

const checks = {
  async models() {
    const c = client(tools);
    const found = [];
    for await (const model of c.models.list()) found.push(model.id);
    assert.ok(found.length >= 2);
    assert.equal((await c.models.retrieve(found[1])).id, found[1]);
    await fails(OpenAI.NotFoundError, 404, () => c.models.retrieve("nobody"));
  },
  async chatAndStream() {
    const c = client(plain);
    const fields = { model: "default_model", messages: user, max_tokens: 20 };
    const whole = await c.chat.completions.create(fields);
    let said = "", usage = null, last = null;
    for await (const chunk of await c.chat.completions.create({ ...fields, stream: true, stream_options: { include_usage: true } })) {
      said += chunk.choices[0]?.delta.content ?? "";
      last = chunk.choices[0]?.finish_reason ?? last;
      usage = chunk.usage ?? usage;
    }
    assert.equal(said, whole.choices[0].message.content);
    assert.equal(last, whole.choices[0].finish_reason);
    assert.deepEqual(usage, whole.usage);
    const helper = c.chat.completions.stream(fields);
    assert.equal((await helper.finalChatCompletion()).choices[0].message.content, said);
  },
  async completions() {
    const whole = await client(plain).completions.create({ model: "default_model", prompt: "Once upon", max_tokens: 6, logprobs: 2 });
    assert.equal(whole.choices[0].logprobs.tokens.join(""), whole.choices[0].text);
  },
  async logprobs() {
    const whole = await client(plain).chat.completions.create({ model: "default_model", messages: user, max_tokens: 5, logprobs: true, top_logprobs: 4 });
    for (const token of whole.choices[0].logprobs.content) assert.equal(token.top_logprobs.length, 4);
  },
  async structured() {
    const format = { type: "json_schema", json_schema: { name: "weather", strict: true, schema } };
    const whole = await client(plain).chat.completions.create({ model: "default_model", messages: user, max_tokens: 200, response_format: format });
    follows(JSON.parse(whole.choices[0].message.content));
    const parsed = await client(plain).chat.completions.parse({ model: "default_model", messages: user, max_tokens: 200, response_format: format });
    follows(parsed.choices[0].message.parsed);
  },
  async toolCalls() {
    const tool = { type: "function", function: { name: "weather", parameters: schema } };
    const fields = {
      model: "default_model", messages: user, tools: [tool], tool_choice: "required", max_tokens: 300, temperature: 1, seed: 2,
      parallel_tool_calls: false, chat_template_kwargs: { enable_thinking: false },
    };
    const whole = await client(tools).chat.completions.create(fields);
    assert.equal(whole.choices[0].finish_reason, "tool_calls");
    const call = whole.choices[0].message.tool_calls[0];
    follows(JSON.parse(call.function.arguments));
    const final = await client(tools).chat.completions.stream(fields).finalChatCompletion();
    assert.deepEqual(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    const run = client(tools).chat.completions.create({
      model: "default_model", max_tokens: 4, tools: [tool],
      messages: [...user, whole.choices[0].message, { role: "tool", tool_call_id: call.id, content: "sun" }],
    });
    assert.ok((await run).choices.length === 1);
  },
  async errors() {
    const c = client(plain);
    const ask = (more) => () => c.chat.completions.create({ model: "default_model", messages: user, max_tokens: 2, ...more });
    await fails(OpenAI.NotFoundError, 404, ask({ model: "nobody" }));
    for (const [more, param] of [[{ temperature: -1 }, "temperature"], [{ n: 0 }, "n"], [{ messages: [] }, "messages"], [{ store: true }, "store"]]) {
      for (const stream of [false, true]) {
        const error = await fails(OpenAI.BadRequestError, 400, ask({ ...more, stream }));
        assert.equal(error.param, param);
        assert.ok(error.code && error.type === "invalid_request_error" && error.requestID);
      }
    }
    await fails(OpenAI.AuthenticationError, 401, () => client(locked, "wrong").models.list());
    assert.ok((await client(locked, "secret").models.list()).data.length);
  },
  async leaving() {
    const stream = await client(plain).chat.completions.create({ model: "default_model", messages: user, max_tokens: 500, stream: true, ignore_eos: true });
    for await (const _ of stream) break;
    assert.ok((await client(plain).chat.completions.create({ model: "default_model", messages: user, max_tokens: 1 })).choices);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
  } catch (error) {
    failed += 1;
    console.error(`FAILED ${name}\n${error.stack}`);
  }
}
const count = Object.keys(checks).length;
console.log(`openai (Node): ${count - failed} of ${count} checks passed`);
process.exit(failed ? 1 : 0);
