/** The view of a history: grid, numbers, charts, an expert, and a table for those who do not see the grid. */

import { CoverageChart, TimeChart } from "./observatory_charts.js";
import { make, number, percent, size } from "./observatory_dom.js";
import { ExpertPanel } from "./observatory_expert.js";
import { Grid } from "./observatory_grid.js";

const SLOWLY = 500;

/** All that is drawn of one history. */
export class View {
  constructor(element) {
    this.history = null;
    this.expert = new ExpertPanel();
    this.grid = new Grid((layer, expert) => {
      this.expert.choose({ layer, expert });
      this.slow();
    });
    this.charts = [new TimeChart(), new CoverageChart()];
    this.numbers = make("dl", { className: "numbers" });
    this.summary = make("p", { className: "for-screen-readers", role: "status" });
    this.rows = make("tbody");
    const heads = ["layer", "experts used", "uses", "reads", "most used"].map((text) => make("th", { scope: "col" }, text));
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), this.rows);
    this.table = make("details", { className: "panel" }, make("summary", {}, "The grid as a table"), make("div", { className: "scrolls", tabIndex: 0, role: "region", "aria-label": "Table of layers" }, table));
    this.table.addEventListener("toggle", () => this.slow());
    const keys = [["hit", "in memory"], ["miss", "read from storage"], ["idle", "not used"]];
    this.legend = make("ul", { className: "legend" }, ...keys.map(([name, text]) => make("li", { className: `key-${name}` }, text)));
    element.append(this.numbers, this.grid.element, make("div", { className: "under-grid" }, this.legend, this.grid.cell));
    element.append(this.expert.element, ...this.charts.map((chart) => chart.element), this.table, this.summary);
    this.timer = 0;
  }

  /** End timers and drawing. */
  end() {
    this.grid.end();
    clearTimeout(this.timer);
  }

  /** Show another history. */
  show(history) {
    this.history = history;
    this.expert.choose(null);
    this.grid.show(history);
    this.slow();
  }

  /** Draw what has changed: the grid at once, and the rest soon. */
  changed() {
    this.grid.redraw();
    if (!this.timer) this.timer = setTimeout(() => this.slow(), SLOWLY);
  }

  slow() {
    clearTimeout(this.timer);
    this.timer = 0;
    if (!this.history) return;
    this.showNumbers();
    for (const chart of this.charts) chart.show(this.history);
    this.expert.show(this.history);
    if (this.table.open) this.showTable();
  }

  showNumbers() {
    const { history } = this;
    const { layers, num_experts: experts, record_bytes: record } = history.shape;
    const rates = history.rates();
    const timed = history.passes.length > 0 && history.passes[0].seconds > 0;
    const [distinct, all] = [history.workingSet(), layers * experts];
    const entries = [
      ["Hit rate", percent(rates.hitRate), history.requests ? `${percent(1 - history.misses / history.requests)} since the start` : "of requested experts"],
      timed && ["Speed", `${number(rates.tokensPerSecond)} tok/s`, `${history.decoded} tokens decoded`],
      timed && ["Read", `${size(rates.bytesPerSecond)}/s`, `${size(rates.bytesPerToken)} a token`],
      timed && ["Waiting", percent(rates.waiting), "of the time, for storage"],
      !timed && (record ? ["Read", size(rates.bytesPerToken), "a token"] : ["Read", number(rates.misses / rates.tokens), "experts a token"]),
      ["Working set", record ? size(distinct * record) : `${distinct}`, `${percent(distinct / all)} of the experts, in 32 tokens`],
    ];
    const tiles = entries.filter(Boolean).map(([name, value, note]) => {
      const parts = [make("dt", {}, name), make("dd", { className: "value" }, value), make("dd", { className: "note" }, note)];
      return make("div", {}, ...parts);
    });
    this.numbers.replaceChildren(...tiles);
    this.numbers.dataset.requests = history.requests;
    this.numbers.dataset.misses = history.misses;
    this.numbers.dataset.decoded = history.decoded;
  }

  showTable() {
    const rows = Array.from({ length: this.history.shape.layers }, (_, layer) => {
      const { distinct, uses, reads, top } = this.history.layerRow(layer);
      const cells = [distinct, uses, reads, top.join(", ")].map((text) => make("td", {}, String(text)));
      return make("tr", {}, make("th", { scope: "row" }, String(layer)), ...cells);
    });
    this.rows.replaceChildren(...rows);
  }
}
