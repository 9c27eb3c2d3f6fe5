/**
 * Markdown of models as elements. HTML in it is shown as text, images as links, and the result is sanitized besides.
 */

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";
import { button, element } from "./dom.js";
import { copyText } from "./copy.js";

const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong", "table",
  "tbody", "td", "th", "thead", "tr", "ul",
];
const SANITIZING = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"], // all other values must be allowed addresses
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const HEADING_SHIFT = 2;
/** Marks at the end of an unfinished text; the next character decides their meaning: `*` may become `**`. */
const UNDECIDED = /(?<=^|\n)[-=#*_~`+>| ]+$|[*_~`]+$/;
const LANGUAGE = /^language-([\w+#.-]{1,30})$/;

const escaped = (text) =>
  text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: false,
  renderer: {
    html: ({ text }) => (/^<br ?\/?>$/i.test(text.trim()) ? "<br>" : escaped(text)),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    heading({ tokens, depth }) {
      const level = Math.min(depth + HEADING_SHIFT, 6); // the page and its messages have the first two
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

/** Shows a growing text of markdown; only blocks that have changed are rendered again. */
export class MarkdownView {
  #blocks = [];

  /** `target` is the element whose content this view owns. */
  constructor(target) {
    this.target = target;
  }

  /** Show `text`. The last update of a text passes `last`, which resolves links that are defined at its end. */
  update(text, last = false) {
    let tokens;
    try {
      tokens = marked.lexer(last ? text : text.replace(UNDECIDED, ""));
    } catch {
      this.#showPlain(text); // nested too deeply
      return;
    }
    const redefined = last && Object.keys(tokens.links).length > 0;
    let same = 0;
    if (!redefined) while (same < this.#blocks.length && this.#blocks[same].raw === tokens[same]?.raw) same += 1;
    for (const { nodes } of this.#blocks.splice(same)) nodes.forEach((node) => node.remove());
    try {
      for (const token of tokens.slice(same)) {
        const nodes = render(marked.parser([token]));
        this.target.append(...nodes);
        this.#blocks.push({ raw: token.raw, nodes });
      }
    } catch {
      this.#showPlain(text);
    }
  }

  #showPlain(text) {
    const plain = element("pre", { class: "plain" }, text);
    this.target.replaceChildren(plain);
    this.#blocks = [{ raw: null, nodes: [plain] }];
  }
}

function render(html) {
  const fragment = DOMPurify.sanitize(html, SANITIZING);
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) {
      link.replaceWith(...link.childNodes);
      continue;
    }
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.title = link.href;
  }
  for (const code of fragment.querySelectorAll("[class]")) {
    const language = code.matches("pre > code") && LANGUAGE.exec(code.className);
    code.removeAttribute("class");
    if (language) code.dataset.language = language[1];
  }
  for (const block of fragment.querySelectorAll("pre")) frameCode(block);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div", { class: "wide", tabIndex: 0, role: "group", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return [...fragment.childNodes];
}

function frameCode(block) {
  const code = block.querySelector("code");
  const frame = element("div", { class: "code" });
  const bar = element(
    "div",
    { class: "code-bar" },
    element("span", {}, code?.dataset.language ?? "code"),
    button("Copy", (event) => copyText(block.textContent, event.currentTarget)),
  );
  block.tabIndex = 0; // it may scroll
  block.replaceWith(frame);
  frame.append(bar, block);
}
