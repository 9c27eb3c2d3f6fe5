/** Small parts from which the observatory is built. No text is ever read as HTML. */

/** Make an element with properties, attributes (names with a dash, `for` and `role`) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Make an element of SVG with attributes. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const known = (value, text) => (Number.isFinite(value) ? text(value) : "–");

/** Return a share as a percentage. */
export const percent = (share) => known(share, (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`);

/** Return a number of bytes in a unit that suits it. */
export const size = (value) =>
  known(value, (bytes) => {
    if (bytes === 0) return "0 B";
    const unit = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : ["kB", 1e3];
    return `${(bytes / unit[1]).toPrecision(3)} ${unit[0]}`;
  });

/** Return a number with three digits. */
export const number = (value) => known(value, (given) => (given >= 1000 ? given.toFixed(0) : String(Number(given.toPrecision(3)))));
