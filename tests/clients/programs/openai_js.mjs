// The openai client for JavaScript against a service: `openai_js.mjs URL KEY IMAGE`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import OpenAI from "openai";

const [baseURL, apiKey, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];

const models = await client.models.list();
const model = models.data[0].id;
const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
assert.match(whole.choices[0].message.content, /Paris/);
assert.ok(whole.usage.completion_tokens_details.reasoning_tokens > 0);

const stream = await client.chat.completions.create({
  model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
});
let content = "";
let reasoning = "";
let usage = null;
for await (const chunk of stream) {
  content += chunk.choices[0]?.delta.content ?? "";
  reasoning += chunk.choices[0]?.delta.reasoning_content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(content, whole.choices[0].message.content);
assert.equal(reasoning, whole.choices[0].message.reasoning_content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const tools = [{
  type: "function",
  function: {
    name: "get_weather",
    parameters: { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] },
  },
}];
const asked = { model, messages, tools, tool_choice: "required", temperature: 0, max_tokens: 400 };
const called = await client.chat.completions.stream(asked).finalChatCompletion();
assert.equal(called.choices[0].message.tool_calls[0].function.name, "get_weather");
assert.match(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city, /^(Paris|Rome)$/);

const url = `data:image/png;base64,${readFileSync(image).toString("base64")}`;
const text = { type: "text", text: "What is this?" };
const look = (content) => client.chat.completions.create({
  model, messages: [{ role: "user", content }], temperature: 0, max_completion_tokens: 200,
});
const seen = await look([{ type: "image_url", image_url: { url } }, text]);
assert.ok(seen.choices[0].message.content);
assert.ok(seen.usage.prompt_tokens > (await look([text])).usage.prompt_tokens + 10);

// The tiny model does not know how to end a free-form string in JSON, so none is asked for.
const schema = {
  type: "object",
  properties: { name: { enum: ["Paris", "Rome"] }, is_capital: { type: "boolean" } },
  required: ["name", "is_capital"],
  additionalProperties: false,
};
const parsed = await client.chat.completions.parse({
  model, messages, temperature: 0, max_tokens: 400,
  response_format: { type: "json_schema", json_schema: { name: "town", schema, strict: true } },
});
assert.match(parsed.choices[0].message.parsed.name, /^(Paris|Rome)$/);
assert.equal(typeof parsed.choices[0].message.parsed.is_capital, "boolean");

const short = { model, messages, max_tokens: 12 };
const warm = { ...short, n: 2, seed: 7, temperature: 1.5, logprobs: true, top_logprobs: 2 };
const [first, second] = await Promise.all([1, 2].map(() => client.chat.completions.create(warm)));
const texts = (answer) => answer.choices.map((choice) => choice.message.reasoning_content);
assert.equal(first.choices.length, 2);
assert.deepEqual(texts(first), texts(second));
assert.ok(first.choices[0].logprobs.content.every((token) => token.top_logprobs.length === 2 && token.logprob <= 0));
const cold = (await client.chat.completions.create({ ...short, temperature: 0 })).choices[0].message;
const word = (cold.reasoning_content ?? cold.content).split(/\s+/)[1];
const stopped = (await client.chat.completions.create({ ...short, temperature: 0, stop: [word] })).choices[0];
assert.ok(!(stopped.message.reasoning_content ?? "").includes(word));
assert.equal(stopped.finish_reason, "stop");

await assert.rejects(
  client.withOptions({ apiKey: "wrong" }).models.list(),
  (error) => error instanceof OpenAI.AuthenticationError && error.code === "invalid_api_key",
);
await assert.rejects(
  client.chat.completions.create({ model: "another", messages }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
await assert.rejects(
  client.chat.completions.create({ model, messages, temperature: -1 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);
console.log("openai for JavaScript: all checks held");
