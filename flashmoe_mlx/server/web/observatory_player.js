/** The replay of a recorded trace: its controls, and the simulated cache behind hits and misses. */

import { make } from "./observatory_dom.js";
import { History } from "./observatory_history.js";
import { simulate } from "./observatory_trace.js";

const SPEEDS = [1, 4, 16, 64];
const MOST_AT_ONCE = 64;

/** Plays `trace` in `view`. */
export class Player {
  constructor(trace, view) {
    this.trace = trace;
    this.view = view;
    this.end = this.end.bind(this);
    const { num_experts: experts, experts_k: k } = trace.shape;
    this.decoded = trace.tokens - trace.prompt;
    this.play = make("button", { type: "button", className: "primary", onclick: () => this.toggle() });
    this.speed = make("select", { "aria-label": "Speed" }, ...SPEEDS.map((speed) => make("option", { value: speed }, `${speed} tok/s`)));
    this.speed.value = 16;
    this.place = make("input", { type: "range", min: 0, max: this.decoded, step: 1, "aria-label": "Token" });
    this.place.addEventListener("input", () => this.seek(Number(this.place.value)));
    this.slots = make("input", { type: "range", min: Math.min(k, experts), max: experts, step: 1, "aria-label": "Experts kept in memory in each layer" });
    this.slots.value = Math.max(k, Math.round(experts / 4));
    this.slots.addEventListener("input", () => this.describe());
    this.slots.addEventListener("change", () => this.simulate());
    this.slotText = make("output");
    this.placeText = make("output");
    const line = (...parts) => make("div", { className: "controls" }, ...parts);
    this.element = make(
      "div",
      { className: "player" },
      line(this.play, this.speed, make("label", { className: "stretch" }, make("span", {}, "Token"), this.place, this.placeText)),
      line(make("label", { className: "stretch" }, make("span", {}, "Cache"), this.slots, this.slotText)),
    );
    this.timer = 0;
    this.at = 0;
    this.simulate();
    this.label();
  }

  /** Stop. */
  end() {
    clearInterval(this.timer);
    this.timer = 0;
    this.label();
  }

  toggle() {
    if (this.timer) {
      this.end();
      return;
    }
    if (this.at >= this.decoded) this.seek(0);
    let previous = performance.now();
    this.timer = setInterval(() => {
      const now = performance.now();
      const due = Math.min(MOST_AT_ONCE, Math.floor(((now - previous) / 1000) * Number(this.speed.value)));
      if (!due) return;
      previous = now;
      this.advance(due);
    }, 30);
    this.label();
  }

  label() {
    this.play.textContent = this.timer ? "Pause" : "Play";
  }

  describe() {
    const { num_experts: experts, layers, record_bytes: record } = this.trace.shape;
    const slots = Number(this.slots.value);
    const bytes = record ? `, ${((slots * layers * record) / 2 ** 30).toPrecision(3)} GiB` : "";
    this.slotText.textContent = `${slots} of ${experts} experts a layer${bytes}`;
    this.placeText.textContent = `${this.at} of ${this.decoded}`;
    this.place.value = this.at;
  }

  simulate() {
    this.simulated = simulate(this.trace, Number(this.slots.value));
    this.seek(this.at);
  }

  /** Show the state after `at` decoded tokens. */
  seek(at) {
    this.history = new History(this.trace.shape);
    for (const part of this.simulated.prompts) this.history.addRest(part, -Infinity);
    this.at = 0;
    const chosen = this.view.expert.chosen;
    const selected = this.view.grid.selected;
    this.view.show(this.history);
    this.view.expert.choose(chosen);
    this.view.grid.selected = selected;
    this.advance(at, at - 8);
    this.view.slow();
  }

  /** Add the next `count` tokens; tokens before the place `faded` no longer glow. */
  advance(count, faded = 0) {
    const { trace, history } = this;
    const size = trace.shape.layers * trace.shape.experts_k;
    const now = performance.now();
    for (const end = Math.min(this.decoded, this.at + count); this.at < end; this.at++) {
      const first = (trace.prompt + this.at) * size;
      const missed = this.simulated.missed.subarray(this.at * size, (this.at + 1) * size);
      const token = { experts: trace.experts.subarray(first, first + size), missed, position: trace.prompt + this.at };
      history.addToken(token, this.at < faded ? -Infinity : now);
      const misses = missed.reduce((a, b) => a + b, 0);
      const time = { seconds: 0, io: 0, compute: 0, sample: 0 };
      history.addPass({ ...time, tokens: 1, requests: size, misses, bytes_read: misses * trace.shape.record_bytes });
    }
    if (this.at >= this.decoded && this.timer) this.end();
    this.describe();
    this.view.changed();
  }
}
