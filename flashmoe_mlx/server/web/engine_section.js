/** The section of the settings that changes the number of experts per token, if the server lets its page do so. */

import * as api from "./api.js";
import { element } from "./dom.js";
import { field } from "./settings_dialog.js";

/** Return a promise of the section in a list, which is empty if the server allows no change; `notify` shows a text. */
export async function engineSection(notify) {
  let state;
  try {
    state = await api.json("observatory/state");
  } catch {
    return []; // the model is loading, or the server is gone
  }
  if (!state.backends.length) return [];
  const input = element("input", { type: "number", min: 1, max: state.num_experts, step: 1, required: true, value: state.experts_k });
  const section = field(
    "Experts per token",
    input,
    `For everyone who uses this server: the model is loaded again. Its own number is ${state.own_experts_k}.`,
  );
  section.apply = async () => {
    if (input.valueAsNumber === state.experts_k) return;
    notify("The model is loaded again, after the answers in progress…");
    try {
      await api.json("observatory/engine", { body: { experts_k: input.valueAsNumber } });
      notify("");
    } catch (error) {
      notify(`The number of experts has not changed: ${error.message}`);
    }
  };
  return [section];
}
