/** Copies text to the clipboard. */

import { announce } from "./dom.js";

/** Copy `text`, and tell so on `control`, the button that was pressed. */
export async function copyText(text, control) {
  const done = await copied(text);
  announce(done ? "Copied." : "The browser does not allow to copy.");
  control.dataset.label ??= control.textContent;
  control.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => {
    control.textContent = control.dataset.label;
  }, 1500);
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without https, browsers offer the clipboard on localhost alone.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
