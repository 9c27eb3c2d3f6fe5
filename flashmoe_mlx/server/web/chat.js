/** The page: connects its parts. */

import * as api from "./api.js";
import { connectObservatory } from "./observatory_pane.js";

const part = (id) => document.getElementById(id);

async function start() {
  const models = await api.json("v1/models");
  part("model").textContent = models.data[0].id;
  await connectObservatory(part("observatory"), part("toggle-observatory"));
}

start();
