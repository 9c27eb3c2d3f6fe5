/** The element of one message. `update` brings it up to date while an answer grows. */

import { callView } from "./call_view.js";
import { copyText } from "./copy.js";
import { button, element } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NAMES = { user: "Question", assistant: "Answer", tool: "Result of a tool" };
const ENDS = {
  length: "The answer reached the largest number of tokens.",
  stopped: "Stopped.",
  interrupted: "The page was closed before the answer was complete.",
};

/** Return the view of a message. */
export function messageView(node, actions) {
  const View = { user: QuestionView, assistant: AnswerView, tool: ResultView }[node.role];
  return new View(node, actions);
}

/** The base of the views: an article with a heading, a body and a footer. */
class MessageView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.body = element("div", { class: "body" });
    this.footer = element("footer");
    const heading = element("h2", { class: "for-screen-readers" }, NAMES[node.role]);
    this.element = element("article", { class: node.role }, heading, this.body, this.footer);
    this.element.dataset.node = node.id;
  }

  /** Show the buttons of the message; `place` is its position among its alternatives. */
  showFooter({ index, count }, busy) {
    const controls = this.controls(busy);
    if (count > 1) {
      controls.unshift(
        button("Earlier version", () => this.actions.turn(this.node, index - 1), {
          symbol: "‹", disabled: busy || index === 0,
        }),
        element("span", { class: "place" }, `${index + 1} of ${count}`),
        button("Later version", () => this.actions.turn(this.node, index + 1), {
          symbol: "›", disabled: busy || index === count - 1,
        }),
      );
    }
    this.footer.replaceChildren(...controls);
  }

  controls() {
    return [];
  }

  update() {}
}

class QuestionView extends MessageView {
  constructor(node, actions) {
    super(node, actions);
    this.#show();
  }

  controls(busy) {
    return [
      button("Copy", (event) => copyText(this.node.content, event.currentTarget)),
      button("Edit", () => this.#edit(), { disabled: busy }),
    ];
  }

  #show() {
    this.element.classList.remove("editing");
    this.body.replaceChildren(element("p", { class: "plain" }, this.node.content));
    this.footer.hidden = false;
  }

  #edit() {
    const area = element("textarea", { value: this.node.content, "aria-label": "Question", rows: 4 });
    const close = () => {
      this.#show();
      [...this.footer.querySelectorAll("button")].at(-1).focus();
    };
    const form = element(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          if (area.value.trim()) this.actions.edit(this.node, area.value);
          this.#show();
        },
        onkeydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            close();
          } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
        },
      },
      area,
      element("div", { class: "buttons" }, button("Cancel", close), element("button", { class: "primary" }, "Ask again")),
    );
    this.element.classList.add("editing");
    this.body.replaceChildren(form);
    this.footer.hidden = true;
    area.focus();
  }
}

class ResultView extends MessageView {
  constructor(node, actions) {
    super(node, actions);
    this.body.append(
      element("details", { class: "call" }, element("summary", {}, "Result"), element("pre", { tabIndex: 0 }, node.content)),
    );
  }
}

class AnswerView extends MessageView {
  constructor(node, actions) {
    super(node, actions);
    this.summary = element("summary");
    this.thoughts = element("p", { class: "plain" });
    this.thinking = element(
      "details",
      { class: "thinking", hidden: true, ontoggle: () => this.#showThinking() },
      this.summary,
      this.thoughts,
    );
    this.text = element("div", { class: "markdown" });
    this.markdown = new MarkdownView(this.text);
    this.waiting = element("p", { class: "waiting" }, "Reading the prompt…");
    this.calls = element("div", { class: "calls" });
    this.note = element("p", { class: "note", hidden: true });
    this.body.append(this.thinking, this.text, this.calls, this.waiting, this.note);
    this.update();
  }

  controls(busy) {
    const { node } = this;
    if (node.state === "writing") return [];
    return [
      node.content ? button("Copy", (event) => copyText(node.content, event.currentTarget)) : null,
      button("Retry", () => this.actions.retry(node), { disabled: busy }),
      element("span", { class: "figures" }, figures(node)),
    ].filter(Boolean);
  }

  update() {
    const { node } = this;
    const writing = node.state === "writing";
    this.element.setAttribute("aria-busy", String(writing));
    this.waiting.hidden = !writing || node.first !== undefined;
    this.#showThinking();
    const shown = JSON.stringify([writing, node.content, node.calls]);
    if (shown !== this.shown) {
      this.shown = shown;
      this.markdown.update(node.content, !writing);
      this.calls.replaceChildren(...(node.calls ?? []).map((call) => callView(call, writing)));
    }
    const note = node.state === "failed" ? `The answer failed: ${node.error}` : ENDS[node.state] ?? ENDS[node.finish];
    this.note.hidden = !note;
    this.note.textContent = note ?? "";
    this.note.classList.toggle("error", node.state === "failed");
  }

  #showThinking() {
    const { node } = this;
    this.thinking.hidden = !node.reasoning;
    if (!node.reasoning) return;
    const over = node.thought !== undefined || node.state !== "writing";
    const seconds = (node.thought ?? node.seconds ?? 0) - (node.first ?? 0);
    this.summary.textContent = over ? `Thought for ${duration(seconds)}` : "Thinking…";
    if (this.thinking.open) this.thoughts.textContent = node.reasoning.trim();
  }
}

function duration(seconds) {
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** Return the measurements of an answer as a short text. */
function figures({ usage, first, seconds }) {
  if (!usage) return "";
  const parts = [`${usage.completion} tokens`];
  const writing = seconds - first;
  if (usage.completion > 1 && writing > 0) parts.push(`${((usage.completion - 1) / writing).toFixed(1)} tok/s`);
  if (first !== undefined) parts.push(`first after ${duration(first)}`);
  parts.push(`prompt ${usage.prompt}, ${usage.cached} reused`);
  return parts.join(" · ");
}
