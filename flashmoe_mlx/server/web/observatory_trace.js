/** Recorded routing traces (`.moetrace`), and a simulated cache that tells hits from misses. */

const CHUNK = 1024;
const AT_ONCE = 16;
const LARGEST_HEADER = 2 ** 16;
const size = (value, most) => Number.isInteger(value) && value >= 1 && value <= most;

/** Parse a trace; throws an Error that says what is wrong. Its checksum is left to the programs that measure with it. */
export function parseTrace(buffer) {
  const view = new DataView(buffer);
  const magic = buffer.byteLength >= 16 ? new TextDecoder("latin1").decode(buffer.slice(0, 8)) : "";
  if (magic !== "MOETRACE") throw new Error("This file is not a routing trace; task=trace records one.");
  if (view.getUint32(8, true) !== 1) throw new Error("This trace has a version that this page cannot read.");
  const length = view.getUint32(12, true);
  if (length > LARGEST_HEADER || 16 + length + 8 > buffer.byteLength) throw new Error("This trace is damaged.");
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(buffer.slice(16, 16 + length)));
  } catch {
    throw new Error("This trace is damaged.");
  }
  const { tokens, layers, experts_per_token: k, num_experts: width, prompt_tokens: prompt } = header ?? {};
  const sizes = size(tokens, 2 ** 30) && size(layers, 2 ** 16) && size(width, 2 ** 16) && size(k, width);
  const whole = 16 + length + 2 * tokens * layers * k + 8 === buffer.byteLength;
  if (!sizes || !whole || !Number.isInteger(prompt) || prompt < 0 || prompt > tokens) {
    throw new Error("This trace is damaged.");
  }
  const experts = new Uint16Array(buffer.slice(16 + length, buffer.byteLength - 8));
  if (experts.some((expert) => expert >= width)) throw new Error("This trace is damaged.");
  const shape = { layers, num_experts: width, experts_k: k, record_bytes: header.record_bytes || 0 };
  return { shape, tokens, prompt, model: String(header.model ?? ""), experts };
}

/** One layer's cache of experts, which evicts the least recently used. */
class Cache {
  constructor(slots) {
    this.slots = slots;
    this.held = new Set(); // in the order of use
  }

  /** Place distinct experts, which fit; return those that were missing. */
  place(experts) {
    const missing = experts.filter((expert) => !this.held.has(expert));
    const request = new Set(experts);
    for (const expert of experts) {
      if (this.held.delete(expert)) this.held.add(expert);
    }
    for (const expert of missing) {
      if (this.held.size >= this.slots) {
        for (const oldest of this.held) {
          if (!request.has(oldest)) {
            this.held.delete(oldest);
            break;
          }
        }
      }
      this.held.add(expert);
    }
    return missing;
  }
}

/**
 * Replay `trace` through one cache of `slots` experts in each layer, in the order of the engine's requests. Returns the
 * parts of the prompt, as sums for `History.addRest`, and `missed` for each choice of the decoded tokens.
 */
export function simulate(trace, slots) {
  const { layers, num_experts: width, experts_k: k } = trace.shape;
  const caches = Array.from({ length: layers }, () => new Cache(slots));
  const atOnce = Math.min(slots, AT_ONCE);
  const prompts = [];
  const fetch = (layer, experts) => {
    const missing = [];
    for (let start = 0; start < experts.length; start += atOnce) {
      missing.push(...caches[layer].place(experts.slice(start, start + atOnce)));
    }
    return missing;
  };
  for (let start = 0; start < trace.prompt; start += CHUNK) {
    const end = Math.min(start + CHUNK, trace.prompt);
    const part = { used: new Uint32Array(layers * width), read: new Uint32Array(layers * width), prompt: end - start };
    Object.assign(part, { decoded: 0, requests: 0, misses: 0 });
    for (let layer = 0; layer < layers; layer++) {
      for (let token = start; token < end; token++) {
        const first = (token * layers + layer) * k;
        for (let rank = 0; rank < k; rank++) part.used[layer * width + trace.experts[first + rank]]++;
      }
      const distinct = [];
      for (let expert = 0; expert < width; expert++) if (part.used[layer * width + expert]) distinct.push(expert);
      const missing = fetch(layer, distinct);
      for (const expert of missing) part.read[layer * width + expert]++;
      part.requests += distinct.length;
      part.misses += missing.length;
    }
    prompts.push(part);
  }
  const missed = new Uint8Array((trace.tokens - trace.prompt) * layers * k);
  for (let token = trace.prompt; token < trace.tokens; token++) {
    for (let layer = 0; layer < layers; layer++) {
      const first = (token * layers + layer) * k;
      const chosen = Array.from(trace.experts.subarray(first, first + k));
      const missing = new Set(fetch(layer, [...chosen].sort((a, b) => a - b)));
      const place = ((token - trace.prompt) * layers + layer) * k;
      chosen.forEach((expert, rank) => {
        missed[place + rank] = missing.has(expert) ? 1 : 0;
      });
    }
  }
  return { prompts, missed };
}
