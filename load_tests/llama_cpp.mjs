// llama.cpp on a GGUF file, by node-llama-cpp: seconds until the first token behind a prompt, and of a step of decoding.
// `npm install node-llama-cpp && node llama_cpp.mjs FILE [PROMPT_TOKENS] [NEW_TOKENS] [THREADS]` in a folder with a copy of
// this file. The prompt is other tokens in every round; the last line is JSON.
import { getLlama } from "node-llama-cpp";

const [file, promptTokens = 512, newTokens = 64, threads = 2] = process.argv.slice(2);
const ROUNDS = 4;
const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

const llama = await getLlama({ build: "never", gpu: false, maxThreads: +threads, logLevel: "error" });
const model = await llama.loadModel({ modelPath: file });
const context = await model.createContext({ contextSize: 2 * (+promptTokens + +newTokens), threads: +threads });
const rounds = [];
for (let round = 0; round < ROUNDS; round++) {
  const sequence = context.getSequence();
  const prompt = Array.from({ length: +promptTokens }, (_, number) => 6 + ((number * 7919 + round * 31) % 1900));
  const times = [performance.now()];
  for await (const _ of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    times.push(performance.now());
    if (times.length > +newTokens + 1) break;
  }
  const steps = times.slice(2).map((time, number) => time - times[number + 1]);
  rounds.push({ first_ms: +(times[1] - times[0]).toFixed(1), step_ms: +median(steps).toFixed(2) });
  sequence.dispose();
}
console.log(JSON.stringify({ bench: "llama.cpp", file, threads: +threads, promptTokens: +promptTokens, rounds }));
process.exit(0);
