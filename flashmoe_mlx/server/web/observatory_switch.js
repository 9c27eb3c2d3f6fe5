/** Controls that change the backend and the number of experts, and a comparison of what each choice gave. */

import { make, number, percent, size } from "./observatory_dom.js";

const MOST_RUNS = 6;

/** The controls; `change(body)` asks the server, and returns a promise. */
export class Switch {
  constructor(change) {
    this.backend = make("select", { id: "observatory-backend" });
    this.experts = make("input", { id: "observatory-experts", type: "number", min: 1, step: 1 });
    this.button = make("button", { type: "submit", className: "primary" }, "Switch");
    this.message = make("p", { className: "note", role: "status" });
    const field = (element, text) => make("label", { for: element.id }, make("span", {}, text), element);
    const controls = make("div", { className: "controls" }, field(this.backend, "Backend"), field(this.experts, "Experts per token"), this.button);
    this.form = make("form", {}, controls, this.message);
    this.rows = make("tbody");
    const heads = ["backend", "K", "tok/s", "hits", "a token", "waiting"].map((text) => make("th", { scope: "col" }, text));
    this.runs = make("table", { className: "runs", hidden: true }, make("thead", {}, make("tr", {}, ...heads)), this.rows);
    this.element = make("section", { className: "panel", hidden: true }, make("h3", {}, "Switch, and watch what changes"), this.form, this.runs);
    this.kept = [];
    this.form.addEventListener("submit", async (event) => {
      event.preventDefault();
      this.button.disabled = true;
      this.message.textContent = "The model is loaded again after the answers in progress …";
      try {
        await change({ backend: this.backend.value, experts_k: Number(this.experts.value) });
        this.message.textContent = "";
      } catch (error) {
        this.message.textContent = error.message;
      } finally {
        this.button.disabled = false;
      }
    });
  }

  /** Show the choices that the server offers. */
  offer(state) {
    if (!state.backends?.length) return;
    this.element.hidden = false;
    this.backend.replaceChildren(...state.backends.map((name) => make("option", { value: name }, name)));
    this.select(state);
  }

  /** Show the present choice. */
  select(state) {
    this.backend.value = state.backend;
    this.experts.value = state.experts_k;
    this.experts.max = Math.min(state.num_experts, 2 * state.own_experts_k);
  }

  /** Keep the numbers of a history that ends, and list them. */
  keep(state, history) {
    if (!history?.passes.length) return;
    const rates = history.rates(Infinity);
    this.kept.push([state.backend, state.experts_k, number(rates.tokensPerSecond), percent(rates.hitRate), size(rates.bytesPerToken), percent(rates.waiting)]);
    this.kept = this.kept.slice(-MOST_RUNS);
    this.rows.replaceChildren(...this.kept.map((row) => make("tr", {}, ...row.map((text) => make("td", {}, String(text))))));
    this.runs.hidden = false;
  }
}
