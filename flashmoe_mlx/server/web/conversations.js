/** The conversations of this browser, and the answers in progress. */

import { Answer, emptyAnswer, requestBody } from "./answer.js";
import { addMessage, newConversation, removeLast } from "./conversation.js";
import { MemoryStore, Store } from "./store.js";

const SAVE_EVERY = 2000;
const SETTINGS = "flashmoe_mlx.settings";

/** The conversations, each with at most one answer in progress. */
export class Conversations {
  #store = new MemoryStore();
  #answers = new Map();
  #listeners;
  list = [];

  /**
   * `listeners` has `changed(conversation)`, after more than the text of an answer has changed; `grown(conversation,
   * node)`, while an answer grows; and `failed(text)`, for errors of the browser's storage.
   */
  constructor(listeners) {
    this.#listeners = listeners;
  }

  /** Read the stored conversations. */
  async open() {
    try {
      this.#store = await Store.open();
      this.list = await this.#store.all();
    } catch {
      this.#listeners.failed("This browser stores nothing for this page: conversations end with this tab.");
    }
    this.list.forEach(markInterrupted);
    this.#store.onChange((id) => this.#reload(id));
  }

  /** Return an empty conversation: the latest one if it is empty, or a new one. */
  create() {
    const empty = this.list.find((conversation) => conversation.head === null && !conversation.draft);
    if (empty) return empty;
    const conversation = newConversation(JSON.parse(localStorage.getItem(SETTINGS)) ?? undefined);
    this.list.push(conversation);
    return conversation;
  }

  /** Tell whether a conversation is being answered. */
  isBusy(conversation) {
    return this.#answers.has(conversation);
  }

  /** Ask for the message after `parent`, with the settings of the conversation. Returns after the answer has ended. */
  async answer(conversation, parent, model) {
    const body = requestBody(model, conversation, parent);
    const node = addMessage(conversation, parent, emptyAnswer());
    const answer = new Answer(node, () => this.#listeners.grown(conversation, node));
    this.#answers.set(conversation, answer);
    this.changed(conversation);
    const saving = setInterval(() => this.save(conversation), SAVE_EVERY);
    await answer.run(body);
    clearInterval(saving);
    this.#answers.delete(conversation);
    if (node.state === "stopped" && node.first === undefined) removeLast(conversation, node);
    conversation.updated = Date.now();
    this.changed(conversation);
    return node;
  }

  /** Stop the answer in progress. */
  stop(conversation) {
    this.#answers.get(conversation)?.stop();
  }

  /** Note and store a change. */
  changed(conversation) {
    this.save(conversation);
    this.#listeners.changed(conversation);
  }

  /** Store a conversation, unless it is empty or was deleted. */
  async save(conversation) {
    if (!this.list.includes(conversation) || (conversation.head === null && !conversation.draft)) return;
    const { id } = conversation;
    try {
      await this.#store.save(conversation);
    } catch (error) {
      this.#listeners.failed(`The browser cannot store this conversation: ${error.message}`);
    }
    if (conversation.id !== id) await this.#reload(id); // the other tab's version appears, too
  }

  /** Change the settings of a conversation and of later ones. */
  setSettings(conversation, settings) {
    conversation.settings = settings;
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
    this.changed(conversation);
  }

  /** Delete a conversation; an answer in progress is stopped. */
  async delete(conversation) {
    this.stop(conversation);
    this.list = this.list.filter((other) => other !== conversation);
    await this.#store.delete(conversation.id);
  }

  /** Take over a conversation that another tab has changed, unless this tab is changing it. */
  async #reload(id) {
    const stored = await this.#store.get(id);
    const index = this.list.findIndex((conversation) => conversation.id === id);
    const known = this.list[index];
    if (known && (this.isBusy(known) || stored?.revision === known.revision)) return;
    if (stored && known) Object.assign(known, stored);
    else if (stored) this.list.push(stored);
    else if (known) this.list.splice(index, 1);
    this.#listeners.changed(known ?? stored);
  }
}

function markInterrupted(conversation) {
  for (const node of Object.values(conversation.nodes)) if (node.state === "writing") node.state = "interrupted";
}
