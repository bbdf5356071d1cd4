// Simulated faults: applied as soon as they are changed, and listed in the header.
import { $, number, send, write } from "./dom.js";

const WHO = { ingest: "ingest", entitlements: "entitlement checks" };
const RIGHT = { failRate: 0, latency: 0, hang: 0, byteDelay: 0, outage: false, retryAfter: null, denied: null };
const RIGHT_INGEST = { ...RIGHT, refusedType: null, refusedSubject: null, forget: false, claim: false };
const groups = [...$("faults").querySelectorAll("[data-group]")];

let changed = () => {};
export function onFaultChange(callback) {
  changed = callback;
}

// A field that is being edited is left alone.
function fill(input, value) {
  if (input === document.activeElement) return;
  if (input.type === "checkbox") input.checked = value;
  else if (typeof value === "string") input.value = value;
  else input.value = value === null ? "" : Number((value * scale(input)).toFixed(4));
}

const scale = (input) => (input.name === "failRate" ? 100 : 1);

export function showFaults({ faults, visibleAfter }) {
  for (const group of groups) {
    for (const input of group.querySelectorAll("input, select")) {
      // A switch always shows the current setting, because each change applies at once.
      if (input.type === "checkbox") input.checked = faults[group.dataset.group][input.name];
      else fill(input, faults[group.dataset.group][input.name]);
    }
  }
  fill($("faults").visibleAfter, visibleAfter);
  const wrong = Object.entries(faults).flatMap(([group, fault]) => names(WHO[group], fault));
  if (visibleAfter) wrong.push(`usage lags by ${number.format(visibleAfter)} s`);
  write($("wrong"), wrong.length ? `Simulated: ${wrong.join(", ")}` : "");
}

function names(who, { outage, latency, failRate, hang, retryAfter, byteDelay, denied, ...more }) {
  const found = [];
  if (outage) found.push(`outage of ${who}`);
  else if (retryAfter !== null) found.push(`${who} answered 429`);
  else if (denied) found.push(`${who} answered ${denied}`);
  else if (failRate) found.push(`${number.format(failRate * 100)} % of ${who} fail`);
  if (latency) found.push(`${who} ${number.format(latency)} s late`);
  if (hang) found.push(`${who} hang for ${number.format(hang)} s`);
  if (byteDelay) found.push(`${who} answered byte by byte`);
  if (more.refusedType) found.push(`400 for type ${more.refusedType}`);
  if (more.refusedSubject) found.push(`400 for subject ${more.refusedSubject}`);
  if (more.forget) found.push("events forgotten");
  if (more.claim) found.push("ids claimed, events not stored");
  return found;
}

function read(input) {
  if (input.type === "checkbox") return input.checked;
  if (input.value === "") return null;
  return input.type === "text" ? input.value : Number(input.value) / scale(input);
}

async function set(path, body) {
  const refused = await send("PUT", path, body);
  const output = $("faults").querySelector("output");
  output.className = refused ? "bad" : "";
  write(output, refused ?? "Applied.");
  await changed();
}

$("faults").addEventListener("submit", (submitted) => submitted.preventDefault());
$("faults").addEventListener("change", async ({ target }) => {
  if (!target.reportValidity()) return;
  const group = target.closest("[data-group]")?.dataset.group;
  if (group) await set("/sandbox/api/faults", { [group]: { [target.name]: read(target) } });
  else await set("/sandbox/api/visibility", { visibleAfter: target.valueAsNumber });
});
$("all-right").addEventListener("click", async () => {
  await send("PUT", "/sandbox/api/visibility", { visibleAfter: 0 });
  await set("/sandbox/api/faults", { ingest: RIGHT_INGEST, entitlements: RIGHT });
});
