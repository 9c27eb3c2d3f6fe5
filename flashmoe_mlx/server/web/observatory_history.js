/** The history of a model's experts: which tokens used which, what had to be read, and where the time went. */

const MOST_TOKENS = 4096;
const MOST_PASSES = 512;
const RECENT = 32;

/** What the observatory knows about one model with one backend and one number of experts per token. */
export class History {
  /** `shape` has `layers`, `num_experts`, `experts_k` and `record_bytes`, as in the state of the feed. */
  constructor(shape) {
    this.shape = shape;
    this.tokens = [];
    this.passes = [];
    this.prompt = 0;
    this.decoded = 0;
    this.requests = 0;
    this.misses = 0;
    const cells = shape.layers * shape.num_experts;
    this.used = new Uint32Array(cells);
    this.read = new Uint32Array(cells);
    /** When each expert was last used, in milliseconds, and whether it was read then. */
    this.lit = new Float64Array(cells).fill(-Infinity);
    this.litByRead = new Uint8Array(cells);
  }

  /** Add a decoded token: `experts` and `missed` are [layers * K]. */
  addToken({ experts, missed, position, answer = 0, text = null }, now) {
    const { num_experts: width, experts_k: k } = this.shape;
    for (let place = 0; place < experts.length; place++) {
      const cell = Math.floor(place / k) * width + experts[place];
      this.used[cell]++;
      this.read[cell] += missed[place];
      this.lit[cell] = now;
      this.litByRead[cell] = missed[place];
    }
    this.decoded++;
    this.tokens.push({ experts, missed, position, answer, text });
    if (this.tokens.length > MOST_TOKENS) this.tokens.shift();
  }

  /** Add a pass that decoded: `tokens`, `seconds`, `io`, `compute`, `sample`, `requests`, `misses`, `bytes_read`. */
  addPass(pass) {
    this.requests += pass.requests;
    this.misses += pass.misses;
    this.passes.push(pass);
    if (this.passes.length > MOST_PASSES) this.passes.shift();
  }

  /** Add passes whose tokens are not listed; `used` and `read` count for each expert. */
  addRest({ used, read, prompt, decoded, requests, misses }, now) {
    for (let cell = 0; cell < used.length; cell++) {
      if (used[cell] === 0) continue;
      this.used[cell] += used[cell];
      this.read[cell] += read[cell];
      this.lit[cell] = now;
      this.litByRead[cell] = read[cell] > 0 ? 1 : 0;
    }
    this.prompt += prompt;
    this.decoded += decoded;
    this.requests += requests;
    this.misses += misses;
  }

  /** Return the latest tokens that used an expert, and all that are kept, oldest first. */
  usesOf(layer, expert) {
    const k = this.shape.experts_k;
    return this.tokens.map((token) => {
      const place = token.experts.subarray(layer * k, (layer + 1) * k).indexOf(expert);
      return { token, used: place >= 0, missed: place >= 0 && token.missed[layer * k + place] > 0 };
    });
  }

  /** Return the number of distinct experts that the latest `count` tokens used, over all layers. */
  workingSet(count = RECENT) {
    const { num_experts: width, experts_k: k } = this.shape;
    const seen = new Uint8Array(this.used.length);
    let distinct = 0;
    for (const { experts } of this.tokens.slice(-count)) {
      for (let place = 0; place < experts.length; place++) {
        const cell = Math.floor(place / k) * width + experts[place];
        distinct += 1 - seen[cell];
        seen[cell] = 1;
      }
    }
    return distinct;
  }

  /** Return the share of all choices that fall on the n most used experts of each layer, for n = 0 to all. */
  coverage() {
    const { layers, num_experts: width } = this.shape;
    const ranked = new Float64Array(width + 1);
    for (let layer = 0; layer < layers; layer++) {
      const counts = this.used.slice(layer * width, (layer + 1) * width).sort().reverse();
      for (let rank = 0; rank < width; rank++) ranked[rank + 1] += counts[rank];
    }
    for (let rank = 1; rank <= width; rank++) ranked[rank] += ranked[rank - 1];
    const total = ranked[width];
    return total ? ranked.map((value) => value / total) : ranked;
  }

  /** Return rates over the latest passes; NaN where nothing was measured. */
  rates(count = RECENT) {
    const sums = { tokens: 0, seconds: 0, io: 0, compute: 0, sample: 0, requests: 0, misses: 0, bytes_read: 0 };
    for (const pass of this.passes.slice(-count)) for (const name in sums) sums[name] += pass[name];
    return {
      ...sums,
      tokensPerSecond: sums.tokens / sums.seconds,
      hitRate: 1 - sums.misses / sums.requests,
      bytesPerSecond: sums.bytes_read / sums.io,
      bytesPerToken: sums.bytes_read / sums.tokens,
      waiting: sums.io / sums.seconds,
    };
  }

  /** Return a row of the table of layers: distinct experts, uses, reads, and the most used experts. */
  layerRow(layer) {
    const width = this.shape.num_experts;
    const used = this.used.subarray(layer * width, (layer + 1) * width);
    const read = this.read.subarray(layer * width, (layer + 1) * width);
    const order = Array.from(used.keys()).sort((a, b) => used[b] - used[a] || a - b);
    return {
      distinct: used.reduce((sum, count) => sum + (count > 0 ? 1 : 0), 0),
      uses: used.reduce((sum, count) => sum + count, 0),
      reads: read.reduce((sum, count) => sum + count, 0),
      top: order.slice(0, 3).filter((expert) => used[expert] > 0),
    };
  }
}
