// openai-node: chat, stream, parse, tools, runTools, functions, responses, abort.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "tiny";
const messages = [{ role: "user", content: "hi" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const done = (name) => console.log("done", name);

const answer = await client.chat.completions.create({ model, messages });
assert.equal(answer.choices[0].message.content, "Hello from Bern.");
done("chat");

let text = "";
const stream = await client.chat.completions.create({
  model, messages, stream: true, stream_options: { include_usage: true, include_obfuscation: true },
});
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, "Hello from Bern.");
done("stream");

const City = z.object({ city: z.string(), count: z.number().int() });
const parsed = await client.chat.completions.parse({
  model, messages, response_format: zodResponseFormat(City, "city"),
});
assert.deepEqual(parsed.choices[0].message.parsed, { city: "Bern", count: 7 });
done("parse");

const runner = client.chat.completions.runTools({
  model, messages,
  tools: [{
    type: "function",
    function: {
      name: "weather", parameters, parse: JSON.parse,
      function: ({ city }) => `12 C in ${city}`, description: "the weather of a city",
    },
  }],
});
assert.equal(await runner.finalContent(), "The tool says 12 C in Bern.");
done("runTools");

const old = await client.chat.completions.create({
  model, messages, functions: [{ name: "weather", parameters }], function_call: { name: "weather" },
});
assert.equal(old.choices[0].finish_reason, "function_call");
assert.deepEqual(JSON.parse(old.choices[0].message.function_call.arguments), { city: "Bern" });
done("functions");

const chosen = await client.chat.completions.create({
  model, messages,
  tools: ["weather", "time"].map((name) => ({ type: "function", function: { name, parameters } })),
  tool_choice: {
    type: "allowed_tools",
    allowed_tools: { mode: "required", tools: [{ type: "function", function: { name: "time" } }] },
  },
});
assert.equal(chosen.choices[0].message.tool_calls[0].function.name, "time");
done("allowed_tools");

const response = await client.responses.create({
  model, input: "hi", reasoning: { effort: "low" }, include: ["reasoning.encrypted_content"],
  tools: [{ type: "web_search" }], truncation: "auto", store: true,
});
assert.equal(response.output_text, "Hello from Bern.");
const again = await client.responses.create({
  model, input: [{ role: "user", content: "hi" }, ...response.output, { role: "user", content: "?" }],
});
assert.equal(again.output_text, "Hello from Bern.");
done("responses");

const events = [];
for await (const event of client.responses.stream({ model, input: "hi" })) events.push(event.type);
assert.equal(events.at(-1), "response.completed");
done("responses.stream");

const cut = await client.chat.completions.create({ model, messages, stream: true });
for await (const _ of cut) { cut.controller.abort(); break; }
done("abort");

const models = [];
for await (const each of client.models.list()) models.push(each.id);
assert.ok(models.includes("tiny"));
done("models");
