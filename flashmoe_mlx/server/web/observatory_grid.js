/** The grid of layers and experts, drawn on a canvas: experts light up as tokens use them, and fade. */

import { make } from "./observatory_dom.js";

const FADE = 1600;
const GAP_FROM = 5;
const NARROWEST = 1.5;
const FRAME = 45;
const COLORS = ["hit", "miss", "idle", "core", "soft", "ink"];

/** The grid of one history. `onSelect(layer, expert)` is called when an expert is chosen by pointer or keyboard. */
export class Grid {
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.history = null;
    this.cursor = null;
    this.selected = null;
    this.pending = 0;
    this.drawn = -Infinity;
    this.canvas = make("canvas", {
      className: "grid",
      tabIndex: 0,
      role: "application",
      "aria-label": "Grid of layers and experts; arrow keys move, Enter shows an expert. A table of layers follows.",
      "aria-describedby": "observatory-cell",
    });
    this.cell = make("p", { id: "observatory-cell", className: "cell", "aria-live": "polite" });
    // A canvas takes no variables of CSS; the computed colors of these elements are plain.
    this.probes = new Map(COLORS.map((name) => [name, make("span", { hidden: true })]));
    for (const [name, probe] of this.probes) probe.style.color = `var(--${name})`;
    this.element = make("div", { className: "grid-box" }, this.canvas, ...this.probes.values());
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener("click", (event) => {
      this.point(event);
      this.choose();
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.observer = new ResizeObserver(() => this.layOut());
    this.observer.observe(this.element);
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.recolor = () => this.redraw();
    this.scheme.addEventListener("change", this.recolor);
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
  }

  /** Stop drawing. */
  end() {
    this.observer.disconnect();
    this.scheme.removeEventListener("change", this.recolor);
    cancelAnimationFrame(this.pending);
    this.pending = 0;
  }

  /** Show `history` from now on. */
  show(history) {
    this.history = history;
    this.cursor = this.selected = null;
    this.layOut();
  }

  /** Choose the size of cells: layers are rows, or columns where the experts of a layer do not fit side by side. */
  layOut() {
    const width = this.element.clientWidth;
    if (!this.history || !width) return;
    const { layers, num_experts: experts } = this.history.shape;
    const side = (columns, rows) => Math.min(width / columns, Math.max(2, Math.min(18, 640 / rows)));
    this.turned = side(experts, layers) < NARROWEST && side(layers, experts) > side(experts, layers);
    const [columns, rows] = this.turned ? [layers, experts] : [experts, layers];
    this.cellWidth = Math.min(24, width / columns);
    const suits = rows < 24 ? Math.max(this.cellWidth, 14) : Math.max(this.cellWidth, 6);
    this.cellHeight = Math.max(2, Math.min(18, suits, 640 / rows));
    const ratio = devicePixelRatio || 1;
    const [across, down] = [columns * this.cellWidth, rows * this.cellHeight];
    this.canvas.style.width = `${across}px`;
    this.canvas.style.height = `${down}px`;
    this.canvas.width = Math.round(across * ratio);
    this.canvas.height = Math.round(down * ratio);
    this.explain();
    this.redraw();
  }

  /** Draw soon, and go on until everything has faded. */
  redraw() {
    if (!this.pending) this.pending = requestAnimationFrame((now) => this.draw(now));
  }

  draw(now) {
    this.pending = 0;
    const { history, canvas } = this;
    if (!history || !canvas.width) return;
    if (now - this.drawn < FRAME) {
      this.redraw();
      return;
    }
    this.drawn = now;
    const [hit, miss, idle, core, soft, ink] = COLORS.map((name) => getComputedStyle(this.probes.get(name)).color);
    const context = canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const gap = Math.min(this.cellWidth, this.cellHeight) >= GAP_FROM ? 1 : 0;
    const most = history.used.reduce((a, b) => Math.max(a, b), 1);
    let glowing = false;
    for (let cell = 0; cell < history.used.length; cell++) {
      const [x, y] = this.place(cell);
      const [w, h] = [this.cellWidth - gap, this.cellHeight - gap];
      context.globalAlpha = 1;
      context.fillStyle = idle;
      context.fillRect(x, y, w, h);
      const used = history.used[cell];
      if (!used) continue;
      // How often an expert was used stays visible as a faint tint.
      const age = now - history.lit[cell];
      const glow = this.still.matches ? (age < FADE ? 1 : 0) : Math.max(0, 1 - age / FADE);
      if (glow > 0) glowing = true;
      context.fillStyle = soft;
      context.globalAlpha = 0.06 + (0.3 * Math.log1p(used)) / Math.log1p(most);
      context.fillRect(x, y, w, h);
      if (glow <= 0) continue;
      context.fillStyle = history.litByRead[cell] ? miss : hit;
      context.globalAlpha = glow;
      context.fillRect(x, y, w, h);
      if (history.litByRead[cell] && glow > 0.35 && gap && w >= 5) {
        context.globalAlpha = glow;
        context.fillStyle = core;
        context.fillRect(x + w / 2 - 1.25, y + h / 2 - 1.25, 2.5, 2.5);
      }
    }
    context.globalAlpha = 1;
    for (const [place, color] of [[this.cursor, soft], [this.selected, ink]]) {
      if (place === null) continue;
      const [x, y] = this.place(place);
      context.strokeStyle = color;
      context.lineWidth = 2;
      context.strokeRect(x - 1, y - 1, Math.max(4, this.cellWidth), Math.max(4, this.cellHeight));
    }
    if (glowing) this.redraw();
  }

  /** Return the corner of a cell, given its index: layer * experts + expert. */
  place(cell) {
    const width = this.history.shape.num_experts;
    const [layer, expert] = [Math.floor(cell / width), cell % width];
    const [column, row] = this.turned ? [layer, expert] : [expert, layer];
    return [column * this.cellWidth, row * this.cellHeight];
  }

  point(event) {
    if (!this.history) return;
    const { layers, num_experts: width } = this.history.shape;
    const column = Math.floor(event.offsetX / this.cellWidth);
    const row = Math.floor(event.offsetY / this.cellHeight);
    const [layer, expert] = this.turned ? [column, row] : [row, column];
    const inside = layer >= 0 && layer < layers && expert >= 0 && expert < width;
    this.move(inside ? layer * width + expert : null);
  }

  /** Move the cursor to a cell, and describe it. */
  move(cell) {
    if (cell === this.cursor) return;
    this.cursor = cell;
    this.explain();
    this.redraw();
  }

  /** Describe the cell under the cursor, or the grid. */
  explain() {
    const lines = this.turned ? "Each column is a layer, the first one on the left" : "Each row is a layer, the first one at the top";
    const text = this.cursor === null ? `${lines}, and each cell an expert. Click one to see its tokens.` : this.describe(this.cursor);
    this.cell.textContent = text;
  }

  describe(cell) {
    const { num_experts: width } = this.history.shape;
    const [used, read] = [this.history.used[cell], this.history.read[cell]];
    return `Layer ${Math.floor(cell / width)}, expert ${cell % width}: used ${used} times, read ${read} times`;
  }

  choose() {
    if (this.cursor === null) return;
    this.selected = this.cursor;
    const width = this.history.shape.num_experts;
    this.onSelect(Math.floor(this.selected / width), this.selected % width);
    this.redraw();
  }

  key(event) {
    if (!this.history) return;
    const { layers, num_experts: width } = this.history.shape;
    const [across, down] = this.turned ? [width, 1] : [1, width];
    const steps = { ArrowLeft: -across, ArrowRight: across, ArrowUp: -down, ArrowDown: down };
    if (event.key in steps) {
      const next = this.cursor === null ? 0 : this.cursor + steps[event.key];
      if (next >= 0 && next < layers * width) this.move(next);
    } else if (event.key === "Enter" || event.key === " ") {
      if (this.cursor === null) this.move(0);
      this.choose();
    } else {
      return;
    }
    event.preventDefault();
  }
}
