/** Charts of the observatory: the time of tokens, and the coverage of choices by experts. */

import { draw, make, number, percent } from "./observatory_dom.js";

const BARS = 64;
const PARTS = [
  ["io", "waiting for storage"],
  ["compute", "computing"],
  ["sample", "choosing the token"],
  ["other", "everything else"],
];

function legend(entries) {
  return make("ul", { className: "legend" }, ...entries.map(([name, text]) => make("li", { className: `key-${name}` }, text)));
}

/** Bars of the latest passes, each divided by what the time went into. */
export class TimeChart {
  constructor() {
    this.svg = draw("svg", { viewBox: `0 0 ${BARS * 8} 96`, preserveAspectRatio: "none", class: "chart", role: "img" });
    this.scale = make("p", { className: "note" });
    const title = make("h3", {}, "Where each token's time goes");
    this.element = make("section", { className: "panel" }, title, this.svg, legend(PARTS), this.scale);
  }

  /** Show the passes of `history`. */
  show(history) {
    const passes = history.passes.slice(-BARS);
    this.element.hidden = !passes.some((pass) => pass.seconds > 0);
    const longest = Math.max(1e-9, ...passes.map((pass) => pass.seconds));
    const sums = { io: 0, compute: 0, sample: 0, other: 0 };
    const bars = passes.flatMap((pass, index) => {
      const parts = { ...pass, other: Math.max(0, pass.seconds - pass.io - pass.compute - pass.sample) };
      let top = 96;
      return PARTS.map(([name]) => {
        sums[name] += parts[name];
        const height = (92 * parts[name]) / longest;
        top -= height;
        return draw("rect", { x: index * 8 + 1, y: top, width: 6, height, class: `part-${name}` });
      });
    });
    this.svg.replaceChildren(...bars);
    const total = Object.values(sums).reduce((a, b) => a + b, 0);
    const shares = PARTS.map(([name, text]) => `${text} ${percent(sums[name] / total)}`).join(", ");
    this.svg.setAttribute("aria-label", `The latest ${passes.length} passes: ${shares}`);
    this.scale.textContent = `The latest ${passes.length} passes; the longest took ${number(1000 * longest)} ms. ${shares}.`;
  }
}

/** The share of choices that the most used experts of each layer cover. */
export class CoverageChart {
  constructor() {
    this.curve = draw("path", { class: "curve" });
    this.area = draw("path", { class: "area" });
    const line = (y) => draw("line", { x1: 0, x2: 240, y1: y, y2: y, class: "rule" });
    const parts = [this.area, line(0.5), line(50), line(99.5), this.curve];
    this.svg = draw("svg", { viewBox: "0 0 240 100", preserveAspectRatio: "none", class: "chart", role: "img" }, ...parts);
    this.text = make("p", { className: "note" });
    const axis = make("div", { className: "axis", "aria-hidden": "true" }, make("span", {}, "0 experts"), make("span", {}, "all experts"));
    const title = make("h3", {}, "Coverage of this conversation");
    this.element = make("section", { className: "panel" }, title, this.svg, axis, this.text);
  }

  /** Show the coverage of `history`. */
  show(history) {
    const coverage = history.coverage();
    const experts = coverage.length - 1;
    const used = coverage[experts] > 0;
    this.element.hidden = !used;
    if (!used) return;
    const points = Array.from(coverage, (share, rank) => `${((240 * rank) / experts).toFixed(2)},${(100 - 100 * share).toFixed(2)}`);
    this.curve.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M0,100L${points.join("L")}L240,100Z`);
    const least = (share) => coverage.findIndex((value) => value >= share);
    const text =
      `Half of all choices fall on the ${least(0.5)} most used experts of each layer, 90 % on ${least(0.9)}, of ${experts}.` +
      " A cache of that size could serve them without reading.";
    this.svg.setAttribute("aria-label", text);
    this.text.textContent = text;
  }
}
