// Vercel's AI SDK, by its own provider (chat, responses, completion) and the compatible one.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "here", baseURL, apiKey: "none", supportsStructuredOutputs: true, includeUsage: true,
});
const done = (name) => console.log("done", name);
const weather = tool({
  description: "the weather of a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `12 C in ${city}`,
});
const schema = z.object({ city: z.string(), count: z.number().int() });

for (const [name, model] of Object.entries({
  chat: openai.chat("tiny"), responses: openai.responses("tiny"), compatible: compatible("tiny"),
})) {
  const options = { model, maxRetries: 0 };
  const { text } = await generateText({ ...options, system: "Be brief.", prompt: "hi" });
  assert.equal(text, "Hello from Bern.");

  const stream = streamText({ ...options, prompt: "hi" });
  let streamed = "";
  for await (const part of stream.textStream) streamed += part;
  assert.equal(streamed, "Hello from Bern.");

  const steps = await generateText({
    ...options, prompt: "weather?", tools: { weather }, stopWhen: stepCountIs(2),
  });
  assert.match(steps.text, /12 C in Bern/);

  const found = await generateText({
    ...options, prompt: "Which city?", output: Output.object({ schema }),
  });
  assert.deepEqual(found.output, { city: "Bern", count: 7 });

  const thinking = await generateText({
    ...options, prompt: "hi",
    providerOptions: { openai: { reasoningEffort: "low" }, here: { reasoningEffort: "low" } },
  });
  assert.equal(thinking.text, "Hello from Bern.");
  done(name);
}

const { text } = await generateText({
  model: openai.completion("tiny"), prompt: "The capital is", maxRetries: 0,
});
assert.equal(text, " Bern.");
done("completion");
