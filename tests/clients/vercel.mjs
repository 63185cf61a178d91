// What Vercel's AI SDK may rely on, tried against a running cluster: its own parser of server-sent events reads our streams.
// Usage: node vercel.mjs URL FOLDER        URL: http://HOST:PORT of an HTTP front door; FOLDER: where the SDK is installed

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, folder] = process.argv.slice(2);
const installed = createRequire(`${folder}/package.json`);
const load = (name) => import(pathToFileURL(installed.resolve(name)));
const { generateText, streamText, APICallError } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const TOKENS = 12;
const listed = (await (await fetch(`${url}/v1/models`)).json()).data;
const base = listed.find((model) => model.uniarm.role === "base").id;
const objectives = [...new Set(listed.filter((model) => model.uniarm.role === "reward").flatMap((model) => model.uniarm.objectives.map(({ name }) => name)))].sort().slice(0, 2);

const uniarm = createOpenAICompatible({ name: "uniarm", baseURL: `${url}/v1`, includeUsage: true });
const preference = Object.fromEntries(objectives.map((name) => [name, 1]));
const asked = {
  model: uniarm(base),
  prompt: "Why is the sky blue?",
  seed: 7,
  temperature: 0.8,
  maxOutputTokens: TOKENS,
  maxRetries: 0,
  providerOptions: { uniarm: { guidance: { preference, strength: 1.5 }, ignore_eos: true } },
};

const situations = {
  async "a guided text is the same whole and streamed"() {
    const whole = await generateText(asked);
    assert.equal(whole.finishReason, "length");
    assert.equal(whole.usage.outputTokens, TOKENS);
    const stream = streamText(asked);
    const parts = [];
    for await (const part of stream.textStream) parts.push(part);
    assert.ok(parts.length > 1, "it came as one piece");
    assert.equal(parts.join(""), whole.text);
    assert.equal(await stream.finishReason, "length");
    assert.equal((await stream.usage).outputTokens, TOKENS);
    const plain = await generateText({ ...asked, providerOptions: { uniarm: { ignore_eos: true } } });
    assert.notEqual(plain.text, whole.text, "the guidance never came");
  },

  async "a stream that is aborted ends"() {
    const abort = new AbortController();
    const parts = [];
    const stream = streamText({ ...asked, maxOutputTokens: 400, abortSignal: abort.signal, onError() {} });
    for await (const part of stream.textStream) {
      parts.push(part);
      if (parts.length === 3) abort.abort();
    }
    assert.ok(parts.length >= 3 && parts.length < 400, `${parts.length} parts`);
  },

  async "a refusal is an error with our words"() {
    const wrong = { ...asked, providerOptions: { uniarm: { guidance: { preference: { nonsense: 1 } } } } };
    await assert.rejects(generateText(wrong), (error) => {
      assert.ok(APICallError.isInstance(error), error);
      assert.ok(error.statusCode >= 400 && error.statusCode < 500, error.statusCode);
      assert.match(error.message, /nonsense/);
      return true;
    });
  },
};

let failed = 0;
for (const [name, situation] of Object.entries(situations)) {
  try {
    await situation();
    console.log(`ok      vercel: ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  vercel: ${name}\n        ${String(error.stack).replaceAll("\n", "\n        ")}`);
  }
}
console.log(`vercel: ${Object.keys(situations).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
