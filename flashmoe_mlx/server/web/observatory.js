/** The observatory: what the experts of the model do, live or replayed from a recorded trace. */

import { make } from "./observatory_dom.js";
import { addFrame } from "./observatory_frames.js";
import { History } from "./observatory_history.js";
import { Player } from "./observatory_player.js";
import { Switch } from "./observatory_switch.js";
import { parseTrace } from "./observatory_trace.js";
import { View } from "./observatory_view.js";

const PAUSE = 2000;
const LARGEST_TRACE = 2 ** 30;

/**
 * Draw the observatory in `element`, and return a function that ends it.
 *
 * `feed.events(signal)` yields the events of `/observatory/events` until `signal` aborts; `feed.change(body)` asks for
 * another backend or number of experts. Both send the API key.
 */
export function mount(element, feed) {
  const stop = new AbortController();
  const heading = make("h2", {}, "Observatory");
  const status = make("p", { className: "note", role: "status" });
  const file = make("input", { type: "file", accept: ".moetrace", hidden: true });
  const open = make("button", { type: "button", onclick: () => file.click() }, "Open a trace …");
  const back = make("button", { type: "button", hidden: true }, "Back to the live view");
  const controls = make("div", { className: "player-place" });
  element.classList.add("observatory");
  element.replaceChildren(make("header", {}, heading, open, back, file), status, controls);
  const change = new Switch((body) => feed.change(body));
  const view = new View(element);
  element.append(change.element);
  let state = null;
  let live = null;
  let player = null;

  function take(event) {
    if (event.type === "state") {
      if (live && state) change.keep(state, live);
      const offered = event.backends ? event : { ...state, ...event };
      if (event.backends) change.offer(event);
      else change.select(offered);
      state = offered;
      live = new History(state);
      if (!player) view.show(live);
    } else if (event.type === "frame" && live) {
      addFrame(live, event, performance.now());
      if (!player) view.changed();
    }
    if (!player) describe();
  }

  function describe() {
    if (!state) return;
    const { layers, num_experts: experts, experts_k: k, backend } = state;
    const idle = live.decoded + live.prompt === 0 ? " Send a message to see them at work." : "";
    status.textContent = `${layers} layers of ${experts} experts, ${k} for each token, served by ${backend}.${idle}`;
  }

  async function follow() {
    while (!stop.signal.aborted) {
      try {
        for await (const event of feed.events(stop.signal)) take(event);
      } catch (error) {
        if (stop.signal.aborted) return;
        if (!player) status.textContent = error.message;
      }
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  }

  function leaveReplay() {
    player?.end();
    player = null;
    controls.replaceChildren();
    back.hidden = true;
    heading.textContent = "Observatory";
    if (live) view.show(live);
    describe();
  }

  file.addEventListener("change", async () => {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    try {
      if (chosen.size > LARGEST_TRACE) throw new Error("This file is too large for a trace.");
      const trace = parseTrace(await chosen.arrayBuffer());
      player?.end();
      player = replay(trace, view, controls, status);
      heading.textContent = "Replay";
      back.hidden = false;
    } catch (error) {
      status.textContent = error.message;
    }
  });
  back.addEventListener("click", leaveReplay);
  follow();
  return () => {
    stop.abort();
    player?.end();
    view.end();
    element.replaceChildren();
  };
}

function replay(trace, view, controls, status) {
  const player = new Player(trace, view);
  controls.replaceChildren(player.element);
  const { layers, num_experts: experts, experts_k: k } = trace.shape;
  const sizes = `${layers} layers of ${experts} experts, ${k} for each token`;
  const tokens = `a prompt of ${trace.prompt} tokens and ${trace.tokens - trace.prompt} decoded ones`;
  status.textContent = `${trace.model ? `${trace.model}: ` : ""}${sizes}; ${tokens}. Hits are those of a simulated cache (LRU).`;
  return player;
}

/** Draw the replay of the trace in `buffer` in `element`: a page without a server. */
export function mountReplay(element, buffer) {
  const status = make("p", { className: "note" });
  const controls = make("div", { className: "player-place" });
  element.classList.add("observatory");
  element.replaceChildren(make("header", {}, make("h1", {}, "A mixture of experts at work")), status, controls);
  let trace;
  try {
    trace = parseTrace(buffer);
  } catch (error) {
    status.textContent = error.message;
    return;
  }
  const player = replay(trace, new View(element), controls, status);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) player.toggle();
}
