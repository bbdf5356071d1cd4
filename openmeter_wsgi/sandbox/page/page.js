// The live page of the sandbox.
import { onAccessChange, showAccess } from "./access.js";
import { onMeterCreated, showCounts, showEmpty, showRefusals, showUncounted } from "./counts.js";
import { $, get, write } from "./dom.js";
import { pollEvents } from "./events.js";
import { onFaultChange, showFaults } from "./faults.js";
import { refreshTrace } from "./trace.js";
import { asked, fit, onViewChange, showMeters } from "./meters.js";
import { onEnter, start } from "./views.js";

const PARTS = [showCounts, showRefusals, showUncounted, showEmpty, showMeters, showAccess, showFaults];
const INTERVAL = 1000;  // milliseconds

function status(text, mark) {
  write($("status"), text);
  $("status").className = mark;
}

// Only the answer to the latest request is shown.
let turns = 0;
async function refresh() {
  const turn = ++turns;
  try {
    const overview = await get("/sandbox/api/overview", asked());
    if (turn !== turns) return;
    if (fit(overview)) { await refresh(); return; }
    for (const part of PARTS) await part(overview);
    await pollEvents();
    await refreshTrace();
    status("Live", "live");
  } catch (error) {
    if (!(error instanceof TypeError)) console.error(error);
    status(error instanceof TypeError ? "The sandbox does not answer; trying again" : error.message, "lost");
  }
}

$("span").addEventListener("change", refresh);
onAccessChange(refresh);
onFaultChange(refresh);
onMeterCreated(refresh);
onViewChange(refresh);
onEnter("usage", refresh);
start();
(async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, INTERVAL);
})();
