// The exported model in ONNX Runtime Web: pictures and a question to an answer, token by token. It runs in a worker.
import { InferenceSession, Tensor, env } from './vendor/ort.wasm.bundle.min.mjs';
import { Tokenizer } from './vendor/tokenizers.min.mjs';
import { promptIds } from './sequence.js';
import { makeTiles } from './tiling.js';

const MOST_THREADS = 4;

/** Fetches `path` of the page's folder, and reports the bytes that have come to `onBytes`. */
async function fetchBytes(path, onBytes) {
  const response = await fetch(new URL(path, import.meta.url));
  if (!response.ok) throw new Error(`${path} cannot be fetched (${response.status}); host the folder whole.`);
  const parts = [];
  const reader = response.body.getReader();
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    parts.push(next.value);
    onBytes(next.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

function ints(values, shape) {
  return new Tensor('int64', BigInt64Array.from(values, BigInt), shape);
}

export class Model {
  /** Loads everything that `page` (page.json) names; nothing is fetched after that. */
  static async load(page, onProgress) {
    const total = Object.values(page.files).reduce((sum, size) => sum + size, 0);
    let loaded = 0;
    const count = (bytes) => onProgress((loaded += bytes), total);
    const paths = Object.keys(page.files);
    const contents = await Promise.all(paths.map((path) => fetchBytes(path, count)));
    const files = Object.fromEntries(paths.map((path, i) => [path, contents[i]]));
    const json = (path) => JSON.parse(new TextDecoder().decode(files[path]));

    env.wasm.wasmBinary = files[page.runtime];
    env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
    const model = new Model();
    const open = ({ graph, weights }) =>
      InferenceSession.create(files[graph], {
        externalData: weights.map((path) => ({ path: path.split('/').pop(), data: files[path] })),
      });
    model.page = page;
    model.tokenizer = new Tokenizer(json('tokenizer.json'), json('tokenizer_config.json'));
    model.embedTokens = await open(page.embed_tokens);
    model.decoder = await open(page.decoder);
    model.encoders = {};
    for (const [factor, { encoder }] of Object.entries(page.scale_factors)) {
      model.encoders[factor] = await open(encoder);
    }
    return model;
  }

  /** The packed tokens (K, D) of a picture, in order. */
  async encode(picture, layout) {
    const [height, width] = this.page.processor.tile_size;
    const tiles = makeTiles(picture, layout.grid, this.page.processor);
    const pixelValues = new Tensor('float32', tiles, [layout.numTiles, 3, height, width]);
    return (await this.encoders[layout.scaleFactor].run({ pixel_values: pixelValues })).image_features.data;
  }

  /** The embeddings (1, S, D) of a prompt, with packed tokens in the places of the image token. */
  async embed(ids, packed = []) {
    const { inputs_embeds: embeds } = await this.embedTokens.run({ input_ids: ints(ids, [1, ids.length]) });
    const dim = embeds.dims[2];
    let next = 0;
    ids.forEach((id, i) => {
      if (packed.length && id === this.page.image_token_id) {
        embeds.data.set(packed.subarray(next, next + dim), i * dim);
        next += dim;
      }
    });
    return embeds;
  }

  /** Yields the ids of the answer to a question about a picture, the most likely one each time. */
  async *answer(picture, question, layout) {
    const ids = promptIds(this.tokenizer, question, layout, this.page);
    const { max_new_tokens: most, max_positions: room, eos_token_ids: ends, decoder } = this.page;
    if (ids.length + most > room) {
      throw new Error(`The prompt has ${ids.length} tokens and the model reads ${room - most}; lower the budget.`);
    }
    let embeds = await this.embed(ids, await this.encode(picture, layout));
    let past = {};
    for (let i = 0; i < decoder.layers; i++) {
      for (const part of ['key', 'value']) {
        const empty = new Tensor('float32', new Float32Array(0), [1, decoder.heads, 0, decoder.head_dim]);
        past[`past_key_values.${i}.${part}`] = empty;
      }
    }
    for (let seen = 0, given = 0; given < most; given++) {
      const length = embeds.dims[1];
      const output = await this.decoder.run({
        inputs_embeds: embeds,
        attention_mask: ints(new Array(seen + length).fill(1), [1, seen + length]),
        position_ids: ints(
          Array.from({ length }, (_, i) => seen + i),
          [1, length],
        ),
        ...past,
      });
      seen += length;
      const scores = output.logits.data;
      const id = scores.reduce((best, score, i) => (score > scores[best] ? i : best), 0);
      if (ends.includes(id)) return;
      yield id;
      past = Object.fromEntries(
        Object.keys(past).map((name) => [name, output[name.replace('past_key_values', 'present')]]),
      );
      embeds = await this.embed([id]);
    }
  }
}
