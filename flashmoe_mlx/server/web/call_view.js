/** Calls of tools: their arguments, and the form in which the user gives their results. */

import { element } from "./dom.js";

/** Return the element of a call; its arguments may still be incomplete. */
export function callView(call, writing) {
  const summary = element("summary", {}, writing ? "Calls " : "Called ", element("code", {}, call.name));
  return element("details", { class: "call", open: true }, summary, element("pre", { tabIndex: 0 }, readable(call.arguments)));
}

function readable(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Return the form for the results of `calls`; `onResults` receives the texts in the order of the calls. */
export function resultsForm(calls, onResults) {
  const areas = calls.map(() => element("textarea", { rows: 3, required: true }));
  return element(
    "form",
    {
      class: "results",
      onsubmit: (event) => {
        event.preventDefault();
        onResults(areas.map((area) => area.value));
      },
    },
    element("p", {}, "The model waits for results. This page runs no tools: enter what each call returns."),
    ...calls.map((call, index) =>
      element("label", {}, element("span", {}, "Result of ", element("code", {}, call.name)), areas[index]),
    ),
    element("div", { class: "buttons" }, element("button", { class: "primary" }, "Send results")),
  );
}
