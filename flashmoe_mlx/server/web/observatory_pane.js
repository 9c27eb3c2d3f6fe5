/** The pane of the observatory: opens and closes it. Nothing is watched while it is closed. */

import * as api from "./api.js";
import { mount } from "./observatory.js";

const FEED = {
  events: (signal) => api.events("observatory/events", { signal }),
  state: () => api.json("observatory/state"),
  change: (body) => api.json("observatory/engine", { body }),
};

/** Connect the pane and its button, if the server has an observatory. */
export async function connectObservatory(pane, button) {
  let end = null;
  try {
    await FEED.state();
  } catch {
    return; // a server without an observatory
  }
  const set = (open) => {
    pane.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    if (open && end === null) end = mount(pane, FEED);
    if (!open && end !== null) {
      end();
      end = null;
    }
  };
  button.hidden = false;
  button.addEventListener("click", () => set(pane.hidden));
}
