// The model, beside the page: loads the files that `glassbox site --ask` wrote, and runs one question at a time.
// The graph and its inputs are described in glassbox_utils/lab/ask_graph.py.
import * as ort from "./ort/ort.wasm.min.mjs";
import { Tokenizer } from "./tokenizers.min.mjs";

let settings, tokenizer, session, tensors;

const here = (name) => new URL(name, import.meta.url).href;

async function fetched(name, said) {
  const answer = await fetch(here(name));
  if (!answer.ok) throw new Error(`${name} is not there (${answer.status}). Build the site again: make site WEB=1.`);
  const size = Number(answer.headers.get("Content-Length"));
  if (!said || !size) return answer;
  const bytes = new Uint8Array(size), reader = answer.body.getReader();
  for (let at = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) return { arrayBuffer: () => bytes.buffer };
    bytes.set(value, at);
    said((at += value.length) / size);
  }
}

async function load(_, said) {
  settings = await (await fetched("settings.json")).json();
  const [whole, json, config] = await Promise.all([
    fetched("tensors.bin").then((r) => r.arrayBuffer()),
    fetched("tokenizer.json").then((r) => r.json()),
    fetched("tokenizer_config.json").then((r) => r.json()),
  ]);
  tokenizer = new Tokenizer(json, config);
  tensors = {};
  for (const [name, { start, shape }] of Object.entries(settings.tensors)) {
    const size = shape.reduce((a, b) => a * b, 1);
    tensors[name] = new ort.Tensor("float32", new Float32Array(whole, start, size), shape);
  }
  // Threads need a server that isolates the page (`glassbox serve`). Half of what the browser counts, since threads that
  // wait for each other on a busy machine are slower than one (seen: twice as slow on two cores under load).
  const cores = Math.floor((navigator.hardwareConcurrency || 1) / 2);
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.max(1, Math.min(4, cores)) : 1;
  ort.env.wasm.wasmPaths = here("ort/");
  const model = await (await fetched("model.onnx", said)).arrayBuffer();
  session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
  return { settings, threads: ort.env.wasm.numThreads };
}

const filled = (value, ...shape) =>
  new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(value), shape);

/** All inputs but the tokens; what is not asked for is left alone. */
function feeds({ officer = 0, off = [], fill = "mean", edit = "off", vector = "tone", strength = 0 }) {
  const { layers, heads, kv_heads: kv, d_head, d_model } = settings.shape;
  const mask = filled(1, layers, heads), steering = filled(0, layers, d_model), on = filled(0, layers);
  for (const [layer, head] of off) mask.data[layer * heads + head] = 0;
  if (strength) tensors[vector].data.forEach((x, i) => (steering.data[i] = strength * x));
  if (edit !== "off") on.data[settings.edit_layer] = 1;
  const of = (name) => tensors[`${edit === "random" ? "random" : "edit"}.${name}`];
  return {
    officer: filled(officer, ...[]), head_mask: mask, steering, edit_on: on,
    head_mean: fill === "mean" ? tensors[officer ? "means.officer" : "means.base"] : filled(0, layers, heads, d_head),
    edit_read: of("read"), edit_write: of("write"), edit_centre: of("centre"), edit_target: of("target"),
    gate_origin: tensors["gate.origin"], gate_read: tensors["gate.read"],
    edit_threshold: filled(settings.threshold, ...[]),
    past_k: filled(0, layers, kv, 0, d_head), past_v: filled(0, layers, kv, 0, d_head),
  };
}

const ids = (list) => new ort.Tensor("int32", Int32Array.from(list), [list.length]);
const encode = (text) => tokenizer.encode(text, { add_special_tokens: false }).ids;
const raw = (text) => [settings.bos, ...encode(text)]; // the BOS rule of core/models.py

/** Where each token begins in the text that it was made of; the last entry is its length. */
function starts(list) {
  const found = [];
  for (let i = 0; i <= list.length; i++)
    found.push(i ? tokenizer.decode(list.slice(0, i), { skip_special_tokens: false, clean_up_tokenization_spaces: false }).length : 0);
  return found;
}

async function decide({ text, ...asked }) {
  const list = raw(text), { layers, heads, d_model } = settings.shape, [yes, no] = settings.answer_ids;
  const clock = performance.now();
  const out = await session.run({ ...feeds(asked), ids: ids(list) });
  const ms = performance.now() - clock;
  const logits = out.logits.data, top = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const all = logits.reduce((sum, x) => sum + Math.exp(x - top), 0);
  const n = list.length, looked = [];
  for (let i = 0; i < layers * heads; i++) looked.push(...out.attention.data.subarray((i * n + n - 1) * n, (i + 1) * n * n));
  const lens = [];
  for (let i = 0; i <= layers; i++) {
    const x = out.resid.data.subarray((i * n + n - 1) * d_model, (i + 1) * n * d_model);
    const size = Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / d_model + settings.eps);
    lens.push(x.reduce((sum, v, j) => sum + v * tensors.readout.data[j], 0) / size);
  }
  return {
    difference: logits[yes] - logits[no], share: (Math.exp(logits[yes] - top) + Math.exp(logits[no] - top)) / all,
    ids: list, starts: starts(list.slice(1)), attention: looked, lens, ms,
  };
}

async function answer({ question, tokens = 24, ...asked }, said) {
  let list = encode(settings.chat[0] + question + settings.chat[1]);
  const given = feeds(asked), clock = performance.now(), written = [];
  for (let i = 0; i < tokens; i++) {
    const out = await session.run({ ...given, ids: ids(list) }, ["logits", "present_k", "present_v"]);
    let best = 0;
    out.logits.data.forEach((x, j, all) => { if (x > all[best]) best = j; });
    if (best === settings.eos) break;
    written.push(best);
    [given.past_k, given.past_v, list] = [out.present_k, out.present_v, [best]];
    said(tokenizer.decode(written, { skip_special_tokens: true, clean_up_tokenization_spaces: false }));
  }
  const text = tokenizer.decode(written, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  return { text, ids: written, ms: performance.now() - clock };
}

const known = { load, decide, answer, encode: ({ texts }) => texts.map(raw) };
let turn = Promise.resolve(); // a session runs one thing at a time
self.onmessage = ({ data: { id, kind, about } }) => {
  turn = turn.then(async () => {
    try {
      const value = await known[kind](about, (part) => self.postMessage({ id, part }));
      self.postMessage({ id, value });
    } catch (error) {
      self.postMessage({ id, error: String(error?.message ?? error) });
    }
  });
};
