/**
 * Conversations in the browser's IndexedDB, which other tabs of this page share.
 *
 * Each conversation has a revision. A save that finds a newer revision than the one it began with keeps both: it stores
 * its own as a copy.
 */

import { newId } from "./conversation.js";

const NAME = "flashmoe_mlx";
const TABLE = "conversations";

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** The stored conversations. */
export class Store {
  #database;
  #queue = Promise.resolve();
  #channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;

  /** Open the store. Rejects if the browser has none for this page, as in some private windows. */
  static async open() {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    const store = new Store();
    store.#database = await finished(request);
    store.#database.onversionchange = () => store.#database.close();
    return store;
  }

  /** Call `listener(id)` after another tab has changed a conversation. */
  onChange(listener) {
    this.#channel?.addEventListener("message", (event) => listener(event.data));
  }

  /** Return all conversations. */
  all() {
    return finished(this.#table("readonly").getAll());
  }

  /** Return one conversation; undefined if there is none. */
  get(id) {
    return finished(this.#table("readonly").get(id));
  }

  /**
   * Store a conversation as it is now; saves of this tab follow one another. If another tab has stored a newer one, the
   * conversation gets a new id and both stay.
   */
  save(conversation) {
    const done = this.#queue.then(() => this.#save(conversation));
    this.#queue = done.catch(() => {});
    return done;
  }

  async #save(conversation) {
    const table = this.#table("readwrite");
    const stored = await finished(table.get(conversation.id));
    if ((stored?.revision ?? 0) > conversation.revision) {
      conversation.id = newId();
      conversation.title += " (copy)";
      conversation.revision = 0;
    }
    conversation.revision += 1;
    try {
      table.put(conversation);
      await new Promise((resolve, reject) => {
        table.transaction.oncomplete = resolve;
        table.transaction.onabort = () => reject(table.transaction.error);
      });
    } catch (error) {
      conversation.revision -= 1;
      throw error;
    }
    this.#channel?.postMessage(conversation.id);
  }

  /** Delete a conversation. */
  async delete(id) {
    await this.#queue;
    await finished(this.#table("readwrite").delete(id));
    this.#channel?.postMessage(id);
  }

  #table(mode) {
    return this.#database.transaction(TABLE, mode).objectStore(TABLE);
  }
}

/** A store without a database, for browsers that allow none: conversations last until the page is closed. */
export class MemoryStore {
  #kept = new Map();

  onChange() {}

  async all() {
    return [...this.#kept.values()];
  }

  async get(id) {
    return this.#kept.get(id);
  }

  async save(conversation) {
    this.#kept.set(conversation.id, conversation);
  }

  async delete(id) {
    this.#kept.delete(id);
  }
}
