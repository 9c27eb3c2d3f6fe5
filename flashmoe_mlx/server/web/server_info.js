/** What the server tells about its model. */

import * as api from "./api.js";

const LOADING_POLL = 1000;

/**
 * Return the description of the served model; while it loads, call `onWait` and ask again.
 *
 * The result is `{ id, context, canThink, defaults }`: its name, the tokens of its context, whether thinking can be
 * switched, and the sampling options that it publishes.
 */
export async function serverInfo(onWait) {
  for (;;) {
    try {
      const [model] = (await api.json("v1/models")).data;
      const { meta = {} } = model;
      return {
        id: model.id,
        context: model.max_model_len,
        canThink: meta.template_options?.includes("enable_thinking") ?? true,
        defaults: meta.sampling ?? {},
      };
    } catch (error) {
      if (error.code !== "loading" && error.status !== 0) throw error;
      onWait(error.code === "loading" ? "The model is loading…" : "The server cannot be reached; trying again…");
      await new Promise((resolve) => setTimeout(resolve, LOADING_POLL));
    }
  }
}
