/** The messages in view, and the place to which they are scrolled. */

import { resultsForm } from "./call_view.js";
import { alternatives, messagesTo, openCalls } from "./conversation.js";
import { button, element } from "./dom.js";
import { messageView } from "./message_view.js";

const NEAR_END = 60;

/** Shows a conversation in `frame`; `actions` are called by the buttons of its messages. */
export class Transcript {
  #views = new Map();
  #frame;
  #list = element("div", { class: "messages" });
  #actions;
  #following = true;
  #latest;

  constructor(frame, actions) {
    this.#frame = frame;
    this.#actions = actions;
    this.#latest = button("Jump to the latest message", () => this.scrollToEnd(), { symbol: "↓", class: "latest", hidden: true });
    frame.append(this.#list, this.#latest);
    frame.addEventListener("scroll", () => {
      this.#following = frame.scrollHeight - frame.scrollTop - frame.clientHeight < NEAR_END;
      this.#latest.hidden = this.#following;
    });
    new ResizeObserver(() => this.#follow()).observe(this.#list);
  }

  /** Show the messages in view; messages that were shown before keep their elements. */
  show(conversation, busy) {
    const path = messagesTo(conversation);
    const views = path.map((node) => {
      const known = this.#views.get(node.id);
      const view = known?.node === node ? known : messageView(node, this.#actions);
      const siblings = alternatives(conversation, node);
      view.update();
      view.showFooter({ index: siblings.indexOf(node), count: siblings.length }, busy);
      return view;
    });
    const elements = views.map((view) => view.element);
    const calls = busy ? [] : openCalls(path);
    if (calls.length) elements.push(resultsForm(calls, (texts) => this.#actions.giveResults(calls, texts)));
    const last = path.at(-1);
    if (!busy && last && last.role !== "assistant" && !calls.length) {
      elements.push(button("Ask for the answer", () => this.#actions.answer(last), { class: "unanswered" }));
    }
    if (!last) elements.push(greeting());
    this.#views = new Map(views.map((view) => [view.node.id, view]));
    place(this.#list, elements);
    this.#follow();
  }

  /** Bring the element of a growing message up to date. */
  update(node) {
    this.#views.get(node.id)?.update();
    this.#follow();
  }

  /** Scroll to the latest message, and follow it while it grows. */
  scrollToEnd() {
    this.#following = true;
    this.#follow();
  }

  #follow() {
    if (this.#following) this.#frame.scrollTop = this.#frame.scrollHeight;
  }
}

function greeting() {
  return element(
    "div",
    { class: "greeting" },
    element("p", {}, "Ask the model something."),
    element("p", {}, "Conversations stay in this browser. Nothing leaves the machine of the server."),
  );
}

/** Give `list` the children `wanted`; children that stay are not moved. */
function place(list, wanted) {
  const keep = new Set(wanted);
  for (const child of [...list.children]) if (!keep.has(child)) child.remove();
  wanted.forEach((child, index) => {
    if (list.children[index] !== child) list.insertBefore(child, list.children[index] ?? null);
  });
}
