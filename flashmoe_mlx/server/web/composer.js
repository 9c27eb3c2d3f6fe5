/** The field for the next question, with the buttons that send it and stop the answer. */

import { element } from "./dom.js";

const touch = matchMedia("(pointer: coarse) and (hover: none)");

/** The composer in `form`; calls `onSend(text)`, `onStop()` and `onDraft(text)`. */
export class Composer {
  #area;
  #send = element("button", { class: "primary" }, "Send");
  #stop;
  #busy = false;

  constructor(form, { onSend, onStop, onDraft }) {
    this.#area = element("textarea", {
      id: "question",
      rows: 1,
      placeholder: "Ask something",
      "aria-label": "Question",
      "aria-describedby": "keys",
      oninput: () => {
        this.#fit();
        onDraft(this.#area.value);
      },
      onkeydown: (event) => this.#press(event),
    });
    this.#stop = element("button", { type: "button", class: "primary", hidden: true, onclick: onStop }, "Stop");
    const keys = touch.matches ? "" : "Enter sends, Shift+Enter begins a new line, Esc stops the answer.";
    form.append(
      element("div", { class: "field" }, this.#area, this.#send, this.#stop),
      element("p", { id: "keys" }, element("span", {}, keys), element("span", { id: "context" })),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.#area.value;
      if (this.#busy || !text.trim()) return;
      this.text = "";
      onDraft("");
      onSend(text);
    });
  }

  get text() {
    return this.#area.value;
  }

  set text(value) {
    this.#area.value = value;
    this.#fit();
  }

  /** Show that an answer is in progress, or that the next question can be sent. */
  set busy(value) {
    const hadFocus = document.activeElement === this.#send || document.activeElement === this.#stop;
    this.#busy = value;
    this.#send.hidden = value;
    this.#stop.hidden = !value;
    if (hadFocus) this.focus();
  }

  focus() {
    this.#area.focus();
  }

  #press(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
    event.preventDefault();
    event.target.form.requestSubmit();
  }

  #fit() {
    this.#area.style.height = "auto";
    this.#area.style.height = `${this.#area.scrollHeight + 2}px`; // with its border; CSS limits it
  }
}
