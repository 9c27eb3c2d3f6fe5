/** The colors of the page: those of the system, unless the user chooses. */

import { element } from "./dom.js";
import { field } from "./settings_dialog.js";

const NAME = "flashmoe_mlx.theme";
const CHOICES = [["", "As the system"], ["light", "Light"], ["dark", "Dark"]];

/** Use the chosen colors. */
export function applyTheme() {
  document.documentElement.style.colorScheme = localStorage.getItem(NAME) || "light dark";
}

/** Return the section of the settings that chooses the colors. */
export function themeSection() {
  const select = element(
    "select",
    {},
    ...CHOICES.map(([value, text]) =>
      element("option", { value, selected: value === (localStorage.getItem(NAME) ?? "") }, text),
    ),
  );
  const section = field("Colors of the page", select);
  section.apply = () => {
    localStorage.setItem(NAME, select.value);
    applyTheme();
  };
  return section;
}
