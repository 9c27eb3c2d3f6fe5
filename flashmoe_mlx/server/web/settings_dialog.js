/** The dialog of the settings of a conversation. Empty fields leave the choice to the server. */

import { element } from "./dom.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: "any", hint: "0 always takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: "any" },
  { name: "top_k", label: "Top k", min: 0, step: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: "any" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10, step: "any" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: "any" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: "any" },
  { name: "max_tokens", label: "Most tokens of an answer", min: 1, step: 1, unset: "until the model ends" },
  { name: "seed", label: "Seed", unset: "random", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
];
const TOOLS_EXAMPLE = JSON.stringify(
  [
    {
      type: "function",
      function: {
        name: "weather",
        description: "Tell the weather",
        parameters: { type: "object", properties: { place: { type: "string" } }, required: ["place"] },
      },
    },
  ],
  null,
  1,
);

/**
 * Ask for settings; return a promise of the new ones, or of null if the user cancels.
 *
 * @param settings the present ones.
 * @param server `{ defaults, canThink }`: the server's values of empty fields, and whether thinking can be switched.
 * @param extra elements of further sections, each with a method `apply` that runs when the settings are saved.
 */
export function askSettings(settings, server, extra = []) {
  const system = element("textarea", { rows: 3, value: settings.system });
  const thinking = element(
    "select",
    {},
    ...[["", "As the model decides"], ["on", "On"], ["off", "Off"]].map(([value, text]) =>
      element("option", { value, selected: value === settings.thinking }, text),
    ),
  );
  const numbers = NUMBERS.map(({ name, label, hint, unset = "", ...limits }) => {
    const value = settings.sampling[name] ?? "";
    const input = element("input", { type: "number", inputMode: "decimal", ...limits, value, name });
    input.placeholder = server.defaults[name] ?? unset;
    return field(label, input, hint);
  });
  const tools = element("textarea", { class: "json", rows: 6, value: settings.tools, placeholder: TOOLS_EXAMPLE, spellcheck: false });
  tools.addEventListener("input", () => tools.setCustomValidity(toolsError(tools.value)));

  return new Promise((resolve) => {
    let saved = null;
    const form = element(
      "form",
      { method: "dialog" },
      element("h2", { id: "settings-title" }, "Settings of this conversation"),
      field("System message", system),
      ...(server.canThink ? [field("Thinking", thinking)] : []),
      element("fieldset", {}, element("legend", {}, "Sampling"), ...numbers),
      field("Tools", tools, "A JSON list of functions, in the form of the OpenAI API. You enter the results of calls."),
      ...extra,
      element(
        "div",
        { class: "buttons" },
        element("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
        element("button", { class: "primary" }, "Save"),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      saved = {
        system: system.value,
        tools: tools.value,
        thinking: thinking.value,
        sampling: Object.fromEntries(
          [...form.querySelectorAll("fieldset input[name]")]
            .filter((input) => input.value !== "")
            .map((input) => [input.name, input.valueAsNumber]),
        ),
      };
      for (const section of extra) section.apply();
      dialog.close();
    });
    const dialog = element("dialog", { id: "settings", "aria-labelledby": "settings-title" }, form);
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(saved);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Return a labeled field with an optional hint. */
export function field(label, input, hint) {
  input.id ||= `field-${label.toLowerCase().replaceAll(/\W+/g, "-")}`;
  const parts = [element("label", { for: input.id }, label), input];
  if (hint) {
    const id = `${input.id}-hint`;
    input.setAttribute("aria-describedby", id);
    parts.push(element("p", { id, class: "hint" }, hint));
  }
  return element("div", { class: "setting" }, ...parts);
}

function toolsError(text) {
  if (!text.trim()) return "";
  try {
    const tools = JSON.parse(text);
    const named = (tool) => typeof tool?.function?.name === "string";
    return Array.isArray(tools) && tools.every(named) ? "" : "This must be a list of functions with names.";
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
}
