/** Short ways to build elements. Text is always text: nothing here parses HTML. */

/**
 * Return a new element. `properties` are set as properties, except `class`, names with a dash, and `role`, which are
 * attributes, and functions `on...`, which listen to events. Children are nodes or texts; null is skipped.
 */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "class" || key === "role" || key === "for" || key.includes("-")) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Return a button with a text, or with a symbol whose meaning is `label`. */
export function button(label, onclick, { symbol, ...properties } = {}) {
  if (symbol === undefined) return element("button", { type: "button", onclick, ...properties }, label);
  const shown = element("span", { "aria-hidden": "true" }, symbol);
  return element("button", { type: "button", onclick, "aria-label": label, title: label, ...properties }, shown);
}

/** Return the element of the page with an id. */
export function part(id) {
  return document.getElementById(id);
}

/** Tell users of screen readers something. */
export function announce(text) {
  part("announcements").textContent = text;
}
