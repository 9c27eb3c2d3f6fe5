/** The page: connects its parts. */

import * as api from "./api.js";
import { Composer } from "./composer.js";
import { addMessage, alternatives, bringIntoView, messagesTo } from "./conversation.js";
import { showConversations } from "./conversation_list.js";
import { Conversations } from "./conversations.js";
import { announce, part } from "./dom.js";
import { engineSection } from "./engine_section.js";
import { askForKey } from "./key_dialog.js";
import { connectObservatory } from "./observatory_pane.js";
import { serverInfo } from "./server_info.js";
import { askSettings } from "./settings_dialog.js";
import { applyTheme, themeSection } from "./theme.js";
import { Transcript } from "./transcript.js";

const CURRENT = "flashmoe_mlx.current";
const LONGEST_ANNOUNCEMENT = 1000;
const wide = matchMedia("(min-width: 60rem)");

const conversations = new Conversations({ changed: showIfCurrent, grown, failed: notify });
let current = null;
let server = null;

const transcript = new Transcript(part("transcript"), {
  answer: (node) => answerAfter(current, node.id),
  retry: (node) => answerAfter(current, node.parent),
  edit: (node, text) => ask(current, node.parent, text),
  turn(node, index) {
    bringIntoView(current, alternatives(current, node)[index]);
    conversations.changed(current);
  },
  giveResults(calls, texts) {
    let parent = current.head;
    calls.forEach((call, index) => {
      parent = addMessage(current, parent, { role: "tool", call: call.id, content: texts[index] }).id;
    });
    answerAfter(current, parent);
  },
});

const composer = new Composer(part("composer"), {
  onSend: (text) => ask(current, current.head, text),
  onStop: () => conversations.stop(current),
  onDraft(text) {
    current.draft = text;
  },
});

/** Add a question after `parent` and ask for its answer. */
function ask(conversation, parent, text) {
  const question = addMessage(conversation, parent, { role: "user", content: text });
  return answerAfter(conversation, question.id);
}

async function answerAfter(conversation, parent) {
  if (!server || conversations.isBusy(conversation)) return;
  transcript.scrollToEnd();
  announce("Answering.");
  const before = conversation.nodes[parent];
  const node = await conversations.answer(conversation, parent, server.id);
  if (conversation !== current) return;
  if (conversation.head === parent && before.role === "user" && !composer.text) withdraw(conversation, before);
  else announce(node.state === "failed" ? `The answer failed: ${node.error}` : node.content.slice(0, LONGEST_ANNOUNCEMENT));
}

/** Return a question without an answer to the composer, if it was stopped before anything came. */
function withdraw(conversation, question) {
  const asked = Object.values(conversation.nodes).some((node) => node.parent === question.id);
  if (asked) bringIntoView(conversation, question);
  else {
    delete conversation.nodes[question.id];
    conversation.head = question.parent;
    conversation.draft = question.content;
    composer.text = question.content;
  }
  announce("Stopped.");
  conversations.changed(conversation);
}

function open(conversation) {
  if (current) conversations.save(current); // its draft
  current = conversation;
  composer.text = conversation.draft;
  show();
  transcript.scrollToEnd();
  if (!wide.matches) toggleList(false);
  composer.focus();
}

function show() {
  const busy = conversations.isBusy(current);
  sessionStorage.setItem(CURRENT, current.id);
  part("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} – flashmoe_mlx` : "flashmoe_mlx";
  composer.busy = busy;
  transcript.show(current, busy);
  showContext();
  showList();
}

function showContext() {
  const usage = messagesTo(current).findLast((node) => node.usage)?.usage;
  const used = usage ? usage.prompt + usage.completion : 0;
  part("context").textContent =
    used && server ? `${used.toLocaleString("en")} of ${server.context.toLocaleString("en")} tokens` : "";
}

function showList() {
  showConversations(part("conversations"), conversations.list, current, (one) => conversations.isBusy(one), {
    create: () => open(conversations.create()),
    open,
    rename(conversation) {
      const title = prompt("Title of the conversation", conversation.title)?.trim();
      if (!title) return;
      conversation.title = title;
      conversations.changed(conversation);
    },
    async delete(conversation) {
      if (!confirm(`Delete “${conversation.title || "New conversation"}” from this browser?`)) return;
      await conversations.delete(conversation);
      if (conversation === current) open(newest());
      else showList();
    },
  });
}

function newest() {
  return conversations.list.reduce((one, other) => (one && one.updated > other.updated ? one : other), null)
    ?? conversations.create();
}

function showIfCurrent() {
  if (!current) return;
  if (conversations.list.includes(current)) show();
  else open(newest()); // another tab has deleted it
}

const grownNodes = new Map();
/** Show the growth of an answer, at most once a frame. */
function grown(conversation, node) {
  if (conversation !== current) return;
  if (grownNodes.size === 0) {
    requestAnimationFrame(() => {
      for (const each of grownNodes.values()) transcript.update(each);
      grownNodes.clear();
    });
  }
  grownNodes.set(node.id, node);
}

function notify(text) {
  part("notice").textContent = text;
  part("notice").hidden = !text;
}

function toggleList(shown) {
  part("conversations").hidden = !shown;
  part("toggle-conversations").setAttribute("aria-expanded", String(shown));
}

/** On narrow windows the list lies over the chat: Esc and a press beside it close it. */
function connectList() {
  const list = part("conversations");
  const toggle = part("toggle-conversations");
  const over = () => !list.hidden && !wide.matches;
  toggle.addEventListener("click", () => {
    toggleList(list.hidden);
    if (over()) list.querySelector("button").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || !over()) return;
    event.preventDefault(); // it does not stop an answer
    toggleList(false);
    toggle.focus();
  });
  part("chat").addEventListener("pointerdown", () => {
    if (over()) toggleList(false);
  });
  wide.addEventListener("change", () => toggleList(wide.matches));
}

function connectControls() {
  connectList();
  part("open-settings").addEventListener("click", async () => {
    const conversation = current;
    const sections = [...(await engineSection(notify)), themeSection()];
    const settings = await askSettings(conversation.settings, server ?? { defaults: {}, canThink: true }, sections);
    if (settings) conversations.setSettings(conversation, settings);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog")) conversations.stop(current);
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) conversations.save(current);
  });
}

async function start() {
  applyTheme();
  api.onKeyNeeded(askForKey);
  await conversations.open();
  const last = sessionStorage.getItem(CURRENT);
  toggleList(wide.matches);
  connectControls();
  open(conversations.list.find((conversation) => conversation.id === last) ?? newest());
  try {
    server = await serverInfo(notify);
    notify("");
    part("model").textContent = server.id;
    show();
    await connectObservatory(part("observatory"), part("toggle-observatory"));
  } catch (error) {
    notify(`The server refuses this page: ${error.message}. Reload the page to try again.`);
  }
}

start();
