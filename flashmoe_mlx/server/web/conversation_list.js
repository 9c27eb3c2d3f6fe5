/** The list of conversations. */

import { button, element } from "./dom.js";

/** Show `conversations` in `nav`, the latest first. `busy` tells which are being answered. */
export function showConversations(nav, conversations, current, busy, actions) {
  const sorted = [...conversations].sort((one, other) => other.updated - one.updated);
  const items = sorted.map((conversation) => {
    const title = conversation.title || "New conversation";
    return element(
      "li",
      conversation === current ? { class: "current" } : {},
      button(title, () => actions.open(conversation), {
        class: "open",
        title,
        "aria-current": conversation === current ? "true" : undefined,
      }),
      busy(conversation) ? element("span", { class: "busy", role: "img", "aria-label": "being answered" }, "●") : null,
      button(`Rename “${title}”`, () => actions.rename(conversation), { symbol: "✎" }),
      button(`Delete “${title}”`, () => actions.delete(conversation), { symbol: "✕" }),
    );
  });
  const focused = nav.contains(document.activeElement) && document.activeElement.className;
  nav.replaceChildren(
    button("New conversation", actions.create, { class: "primary new" }),
    element("ul", {}, ...items),
  );
  if (focused) (nav.querySelector("[aria-current]") ?? nav.querySelector("button")).focus();
}
