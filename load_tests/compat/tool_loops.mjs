// The loops of AI SDK (chat and responses) and of LangChain.js, whole and streamed, against a server with an instruct
// model whose template has no tools: `node load_tests/compat/tool_loops.mjs`, see docs/compatibility.md.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { ChatOpenAI } from "@langchain/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { createAgent, tool as langchainTool } from "langchain";
import { z } from "zod";

const baseURL = process.env.PACELLM_URL ?? "http://127.0.0.1:8000/v1";
const apiKey = process.env.PACELLM_KEY ?? "compatibility-key";
const MAX_TURNS = 6;
const MAX_TOKENS = 60;

const FUNCTIONS = {
  get_weather: ["The weather in a city.", z.object({ city: z.string() }), ({ city }) => `Sunny, 21 degrees in ${city}.`],
  add: ["Adds two numbers.", z.object({ a: z.number(), b: z.number() }), ({ a, b }) => `${a + b}`],
  get_time: ["The time in a city.", z.object({ city: z.string() }), ({ city }) => `14:35 in ${city}`],
};
// as in loops.py
const QUESTIONS = [
  ["What is the weather in Lisbon?", "get_weather", { city: "Lisbon" }],
  ["Please add 8 and 13.", "add", { a: 8, b: 13 }],
  ["What time is it in Seoul?", "get_time", { city: "Seoul" }],
  ["Tell me the weather in Vienna.", "get_weather", { city: "Vienna" }],
  ["Use a function to add 250 and 125.", "add", { a: 250, b: 125 }],
  ["Is it cold in Moscow today?", "get_weather", { city: "Moscow" }],
  ["Tell me the time in Chicago.", "get_time", { city: "Chicago" }],
  ["How much is 31 plus 11?", "add", { a: 31, b: 11 }],
  ["Who painted the Mona Lisa?"],
  ["Write a haiku about rain."],
  ["Good morning!"],
  ["What is the capital of Italy?"],
];

const answer = await fetch(`${baseURL}/models`, { headers: { Authorization: `Bearer ${apiKey}` } });
const name = (await answer.json()).data[0].id;

function aiLoop(model, streamed) {
  const tools = Object.fromEntries(
    Object.entries(FUNCTIONS).map(([key, [description, inputSchema, execute]]) => [
      key,
      tool({ description, inputSchema, execute: async (input) => execute(input) }),
    ]),
  );
  return async (prompt) => {
    const options = {
      model, tools, prompt, temperature: 0, maxOutputTokens: MAX_TOKENS, maxRetries: 0, stopWhen: stepCountIs(MAX_TURNS),
    };
    const result = streamed ? streamText(options) : await generateText(options);
    if (streamed) for await (const part of result.fullStream) if (part.type === "error") throw part.error;
    const steps = await result.steps;
    const calls = steps.flatMap((step) => step.toolCalls.map((call) => [call.toolName, call.input]));
    if (steps.at(-1).toolCalls.length) throw new Error("no end");
    return [calls, await result.text];
  };
}

function langchainLoop(streaming) {
  const model = new ChatOpenAI({
    model: name, apiKey, configuration: { baseURL }, maxRetries: 0, temperature: 0, maxTokens: MAX_TOKENS, streaming,
  });
  const tools = Object.entries(FUNCTIONS).map(([key, [description, schema, execute]]) =>
    langchainTool(async (input) => execute(input), { name: key, description, schema }),
  );
  const agent = createAgent({ model, tools });
  return async (content) => {
    const { messages } = await agent.invoke(
      { messages: [{ role: "user", content }] },
      { recursionLimit: 2 * MAX_TURNS },
    );
    const calls = messages.flatMap((message) => (message.tool_calls ?? []).map((call) => [call.name, call.args]));
    return [calls, messages.at(-1).text];
  };
}

// the server answered with an error, whatever the SDK has wrapped around that
const isRefusal = (error) => !!error && (error.status ?? error.statusCode ?? (error.cause && isRefusal(error.cause)));

async function tally(title, loop) {
  const num = { complete: 0, refused: 0, called: 0, right: 0, alone: 0 };
  for (const [question, wanted, args] of QUESTIONS) {
    try {
      const [calls, text] = await loop(question);
      console.log(`${title}: ${question} -> ${JSON.stringify(calls)} ${JSON.stringify(text)}`);
      num.complete += text ? 1 : 0;
      num.called += calls.length ? 1 : 0;
      const isRight = ([called, given]) =>
        called === wanted && JSON.stringify(given, Object.keys(args).sort()) === JSON.stringify(args);
      if (wanted) num.right += calls.some(isRight) ? 1 : 0;
      else num.alone += calls.length ? 0 : 1;
    } catch (error) {
      num.refused += isRefusal(error) ? 1 : 0;
      console.log(`${title}: ${question} -> ${error}`);
    }
  }
  const needed = QUESTIONS.filter(([, wanted]) => wanted).length;
  console.log(
    `${title}: ${num.complete} of ${QUESTIONS.length} loops complete, ${num.refused} refused, ${num.called} with a call; right call ` +
      `${num.right} of ${needed}, none where none was needed ${num.alone} of ${QUESTIONS.length - needed}`,
  );
  return num.refused === 0 && num.complete > QUESTIONS.length / 2 && num.called > 0;
}

const compatible = createOpenAICompatible({ name: "pacellm", baseURL, apiKey })(name);
const responses = createOpenAI({ baseURL, apiKey }).responses(name);
const passed = [];
for (const streamed of [false, true]) {
  const way = streamed ? "streamed" : "whole";
  passed.push(await tally(`AI SDK chat, ${way}`, aiLoop(compatible, streamed)));
  passed.push(await tally(`AI SDK responses, ${way}`, aiLoop(responses, streamed)));
  passed.push(await tally(`LangChain.js, ${way}`, langchainLoop(streamed)));
}
process.exit(passed.every(Boolean) ? 0 : 1);
