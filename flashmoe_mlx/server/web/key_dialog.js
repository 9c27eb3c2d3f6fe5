/** The dialog that asks for the API key of the server. */

import { element } from "./dom.js";

/** Ask for the key; return a promise of it, or of null. `again` tells that the server refused a key. */
export function askForKey(again) {
  const input = element("input", { type: "password", id: "key", autocomplete: "off", required: true });
  return new Promise((resolve) => {
    let given = null;
    const form = element(
      "form",
      { method: "dialog" },
      element("h2", { id: "key-title" }, "API key"),
      element("p", {}, again ? "The server refused this key." : "This server asks for its API key."),
      element("div", { class: "setting" }, element("label", { for: "key" }, "Key"), input),
      element("p", { class: "hint" }, "It is kept until this tab is closed."),
      element(
        "div",
        { class: "buttons" },
        element("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
        element("button", { class: "primary" }, "Use this key"),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      given = input.value.trim();
      dialog.close();
    });
    const dialog = element("dialog", { "aria-labelledby": "key-title" }, form);
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(given);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
