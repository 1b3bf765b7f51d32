// The openai client for JavaScript against a service: `openai_js.mjs URL KEY`.
import assert from "node:assert/strict";

import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
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

await assert.rejects(
  client.chat.completions.create({ model: "another", messages }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
await assert.rejects(
  client.chat.completions.create({ model, messages, temperature: -1 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);
console.log("openai for JavaScript: all checks held");
