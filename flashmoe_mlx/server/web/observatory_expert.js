/** One expert: when it was used, and for which tokens. */

import { make, percent } from "./observatory_dom.js";

const MOST = 400;

/** Return the text of a token, with white space made visible; its position if the text is not ours to see. */
function label({ text, position }) {
  if (text === null) return `#${position}`;
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

/** A panel about the selected expert. */
export class ExpertPanel {
  constructor() {
    this.title = make("h3");
    this.summary = make("p", { className: "note" });
    this.list = make("ol", { className: "tokens", tabIndex: 0, "aria-label": "The latest tokens; marked ones used the expert" });
    this.element = make("section", { className: "panel expert", hidden: true }, this.title, this.summary, this.list);
    this.chosen = null;
    this.drawn = "";
  }

  /** Show an expert; null shows none. */
  choose(chosen) {
    this.chosen = chosen;
    this.drawn = "";
    this.element.hidden = chosen === null;
  }

  /** Show what `history` knows about the expert. */
  show(history) {
    if (this.chosen === null) return;
    const { layer, expert } = this.chosen;
    const cell = layer * history.shape.num_experts + expert;
    const version = `${cell} ${history.decoded} ${history.used[cell]}`;
    if (version === this.drawn) return;
    this.drawn = version;
    const uses = history.usesOf(layer, expert);
    const count = uses.filter(({ used }) => used).length;
    this.title.textContent = `Layer ${layer}, expert ${expert}`;
    this.summary.textContent =
      `Used ${history.used[cell]} times in all, read ${history.read[cell]} times. ` +
      `${count} of the latest ${uses.length} tokens used it (${percent(count / uses.length)}).`;
    const items = uses.slice(-MOST).map(({ token, used, missed }) => {
      const name = used ? (missed ? "used read" : "used") : "";
      const title = `Token ${token.position}${used ? (missed ? ": used, read for it" : ": used, was in memory") : ""}`;
      return make("li", { className: name, title }, used ? make("mark", {}, label(token)) : label(token));
    });
    this.list.replaceChildren(...items);
    this.list.scrollTop = this.list.scrollHeight;
  }
}
