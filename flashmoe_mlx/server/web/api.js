/** Requests to the server of this page. */

import { eventData } from "./sse.js";

const KEY = "flashmoe_mlx.key";
/** What the watcher of this page shares with its own requests, so that it alone sees the texts of their tokens. */
const WATCHER = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
let askForKey = async () => null;
let asking = null;

/** A request that the server refused, or that did not reach it. */
export class RequestFailed extends Error {
  /** `status` is 0 if no response came; `code` is the server's code of the error. */
  constructor(message, status = 0, code = null) {
    super(message);
    this.name = "RequestFailed";
    this.status = status;
    this.code = code;
  }
}

/**
 * Let `ask(again)` ask the user for the API key. It returns a promise of the key, or of null if the user declines;
 * `again` tells whether the server refused a key. The key stays in this tab until it is closed.
 */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

function headers(body) {
  const key = sessionStorage.getItem(KEY);
  return {
    "x-flashmoe-watcher": WATCHER,
    ...(body === undefined ? {} : { "content-type": "application/json" }),
    ...(key ? { authorization: `Bearer ${key}` } : {}),
  };
}

async function failure(response) {
  const text = await response.text().catch(() => "");
  try {
    const { message, code } = JSON.parse(text).error;
    return new RequestFailed(message, response.status, code);
  } catch {
    return new RequestFailed(`the server answered with status ${response.status}`, response.status);
  }
}

/**
 * Send a request; return the response, whose status is 2xx. A body makes it a POST. If the server needs a key, the user
 * is asked and the request is sent again.
 */
async function send(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const options = { method: body === undefined ? "GET" : "POST", headers: headers(body), signal };
    if (body !== undefined) options.body = JSON.stringify(body);
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new RequestFailed("the server cannot be reached; is it still running?");
    }
    if (response.ok) return response;
    const failed = await failure(response);
    if (response.status !== 401) throw failed;
    if (sessionStorage.getItem(KEY) !== key) continue; // another request has asked already
    asking ??= askForKey(key !== null).finally(() => {
      asking = null;
    });
    const given = await asking;
    if (!given) throw failed;
    sessionStorage.setItem(KEY, given);
  }
}

/** Send a request and return the JSON of the answer. */
export async function json(path, options) {
  return (await send(path, options)).json();
}

/** Send a request and yield the JSON of each server-sent event; the end of the API's streams, `[DONE]`, is yielded as null. */
export async function* events(path, options) {
  const response = await send(path, options);
  try {
    for await (const data of eventData(response.body)) yield data === "[DONE]" ? null : JSON.parse(data);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof SyntaxError) throw error;
    throw new RequestFailed("the connection to the server broke");
  }
}
