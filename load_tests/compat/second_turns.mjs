// Two turns of every kind by each JavaScript client, against first_turns.py: with a copy of it where they are installed.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool as langchainTool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const KINDS = ["text", "reasoning", "call", "parallel", "cut", "no-arguments", "refusal", "structured"];
const baseURL = process.env.PACELLM_URL;
const apiKey = "compatibility-key";
const user = { role: "user", content: "?" };
const trip = z.object({ city: z.string(), days: z.number() });
const city = z.object({ city: z.string() });
const parameters = {
  type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false,
};
const flat = { type: "function", name: "get_weather", parameters, strict: true };

async function attempt(run) {
  try {
    await run();
  } catch (error) {
    console.log(`  ${error.name}: ${String(error.message).slice(0, 150)}`);
  }
}

async function openaiNode(model) {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const options = { model, tools: [{ type: "function", function: { name: "get_weather", parameters, strict: true } }] };
  const form = model === "structured" ? { response_format: zodResponseFormat(trip, "trip") } : {};
  const results = (calls) => (calls ?? []).map((call) => ({ role: "tool", tool_call_id: call.id, content: "Sunny." }));
  for (const create of [
    () => client.chat.completions.create({ messages: [user], ...options }),
    () => client.chat.completions.parse({ messages: [user], ...options, ...form }),
    () => client.chat.completions.stream({ messages: [user], ...options, ...form }).finalChatCompletion(),
  ]) {
    await attempt(async () => {
      const { message } = (await create()).choices[0];
      await client.chat.completions.create({ messages: [user, message, ...results(message.tool_calls), user], ...options });
    });
  }
  const text = model === "structured" ? { text: { format: zodTextFormat(trip, "trip") } } : {};
  for (const create of [
    () => client.responses.create({ input: [user], model, tools: [flat] }),
    () => client.responses.parse({ input: [user], model, tools: [flat], ...text }),
    () => client.responses.stream({ input: [user], model, tools: [flat], ...text }).finalResponse(),
  ]) {
    await attempt(async () => {
      const { output } = await create();
      const outputs = output
        .filter((item) => item.type === "function_call")
        .map((item) => ({ type: "function_call_output", call_id: item.call_id, output: "Sunny." }));
      await client.responses.create({ input: [user, ...output, ...outputs, user], model, tools: [flat] });
    });
  }
}

async function aiSdk(kind) {
  const openai = createOpenAI({ baseURL, apiKey });
  const models = [
    [openai.chat(kind), {}],
    [openai.responses(kind), {}],
    [openai.responses(kind), { providerOptions: { openai: { store: false } } }],
    [createOpenAICompatible({ name: "pacellm", baseURL, apiKey })(kind), {}],
  ];
  const tools = { get_weather: tool({ description: "", inputSchema: city, execute: async () => "Sunny." }) };
  const output = kind === "structured" ? { output: Output.object({ schema: trip }) } : { tools };
  for (const [model, more] of models) {
    const options = { model, maxRetries: 0, stopWhen: stepCountIs(2), ...output, ...more };
    for (const isStreamed of [false, true]) {
      await attempt(async () => {
        const said = isStreamed ? streamText({ prompt: "?", ...options }) : await generateText({ prompt: "?", ...options });
        if (isStreamed) for await (const part of said.fullStream) if (part.type === "error") throw part.error;
        const { messages } = await said.response;
        await generateText({ ...options, messages: [user, ...messages, user] });
      });
    }
  }
}

async function langchain(model) {
  const weather = langchainTool(async () => "Sunny.", { name: "get_weather", description: "", schema: city });
  for (const useResponsesApi of [false, true]) {
    const plain = new ChatOpenAI({ model, apiKey, configuration: { baseURL }, maxRetries: 0, useResponsesApi });
    const bound =
      model === "structured" ? plain.withStructuredOutput(trip, { includeRaw: true }) : plain.bindTools([weather]);
    for (const isStreamed of [false, true]) {
      await attempt(async () => {
        const asked = [new HumanMessage("?")];
        let said;
        if (isStreamed && model !== "structured")
          for await (const chunk of await bound.stream(asked)) said = said ? said.concat(chunk) : chunk;
        else said = await bound.invoke(asked);
        said = said.raw ?? said;
        const calls = [...(said.tool_calls ?? []), ...(said.invalid_tool_calls ?? [])];
        const results = calls.map((call) => new ToolMessage({ content: "Sunny.", tool_call_id: call.id }));
        await plain.invoke([...asked, said, ...results, ...asked]);
      });
    }
  }
}

const clients = { openai_node: openaiNode, ai_sdk: aiSdk, langchain_js: langchain };
for (const kind of KINDS) {
  console.log(process.argv[2], kind);
  await attempt(() => clients[process.argv[2]](kind));
}
