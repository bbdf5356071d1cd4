// The trace of one event: the times of its arrivals, and the value that each meter
// counts.
import { $, get, heads, node, redraw, show, write } from "./dom.js";

const dialog = $("trace");
const precise = new Intl.DateTimeFormat("en-GB", {
  day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3,
});
const OUTCOMES = {
  stored: "Stored", duplicate: "Duplicate, not counted again", refused: "Refused", dropped: "Dropped after a 204", failed: "Answered with an error",
};
let current = null;
let opener = null;

export async function openTrace(seq) {
  current = seq;
  opener = document.activeElement;
  await refreshTrace();
  if (dialog.open) return;
  // The browser's Back button closes the dialog.
  history.pushState({ trace: seq }, "");
  dialog.showModal();
}

export async function refreshTrace() {
  if (current === null) return;
  const seq = current;
  const trace = await get(`/sandbox/api/arrivals/${seq}`).catch((error) => ({ error: error.message }));
  if (seq !== current) return;
  write($("trace-error"), trace.error ?? "");
  if (trace.error) return;
  write($("trace-title"), `Trace of ${trace.event.id ?? "an invalid event"}`);
  redraw($("trace-attributes"), [trace.event, trace.customer], () => attributes(trace));
  redraw($("trace-arrivals"), [trace.arrivals, seq], () => trace.arrivals.map((arrival) => step(arrival, trace)));
  redraw($("trace-meters"), trace, () => meters(trace));
  write($("trace-data"), pretty(trace.event.data));
}

function attributes({ event, customer }) {
  const subject = customer ? `${event.subject} (customer ${customer})` : event.subject;
  const rows = { Id: event.id, Source: event.source, Type: event.type, Subject: subject, "Time of the event": event.time };
  return Object.entries(rows).map(([name, value]) =>
    node("div", {}, node("dt", {}, name), node("dd", {}, value ?? "missing")));
}

function step(arrival, { event, arrivals, dedupe }) {
  const first = arrivals.find(({ outcome }) => outcome === "stored");
  const isRepeated = arrival.outcome === "stored" && first && arrival.seq !== first.seq;
  const said = isRepeated && !dedupe ? "Stored and counted again: deduplication is off" : OUTCOMES[arrival.outcome];
  const place = arrival.batch > 1 ? `Event ${arrival.position} of the ${arrival.batch} in its request. ` : "";
  const of = arrival.outcome === "duplicate" && first
    ? `Duplicate of the event that arrived at ${precise.format(new Date(first.ingestedAt))}: ` : "";
  return node("li", arrival.seq === event.seq ? { "aria-current": "true", class: arrival.outcome } : { class: arrival.outcome },
    node("strong", {}, said), " ",
    node("time", { datetime: arrival.ingestedAt, class: "soft" }, precise.format(new Date(arrival.ingestedAt))),
    ...(arrival.reason ? [node("p", {}, `${place}${of}${arrival.reason}`)] : []));
}

function meters(trace) {
  if (trace.event.outcome !== "stored") {
    return [node("p", {}, "No meter counts the event, because it was not stored.")];
  }
  const others = trace.meters.filter(({ why }) => why?.startsWith("counts events of type"));
  const near = trace.meters.filter((meter) => !others.includes(meter));
  const made = [];
  if (!near.length) made.push(node("p", { class: "flaw" }, `No meter counts events of type ${trace.event.type}.`));
  if (near.length) made.push(verdicts(near));
  if (!trace.visible) made.push(node("p", {}, "Not yet visible: usage is shown with the delay that is set under Faults."));
  if (others.length) {
    made.push(node("p", { class: "soft" }, `Meters for other types: ${others.map(({ name, why }) => `${name} ${why}`).join("; ")}.`));
  }
  return made;
}

function verdicts(near) {
  return node("table", {}, node("caption", { class: "quiet" }, "Meters for events of this type"),
    heads("Meter", "Counted", "#Value", "Dimensions"),
    node("tbody", {}, ...near.map((meter) => node("tr", {},
      node("th", { scope: "row" }, `${meter.name} `, node("small", {}, [meter.aggregation, meter.valueProperty].filter(Boolean).join(" of "))),
      node("td", { class: meter.counted ? "fine" : "flaw" }, meter.counted ? "✓ yes" : `! no: ${meter.why}`),
      node("td", { class: "number" }, meter.counted ? show(meter.value) : "–"),
      node("td", {}, Object.entries(meter.groupBy ?? {}).map(([name, value]) => `${name} = ${value || "(none)"}`).join(", ") || "–")))));
}

function pretty(data) {
  if (data === null) return "none";
  try {
    return JSON.stringify(JSON.parse(data), null, 2);
  } catch {
    return data;
  }
}

let isBack = false;
addEventListener("popstate", () => {
  isBack = dialog.open;
  dialog.close();
});
dialog.addEventListener("close", () => {
  current = null;
  if (!isBack && history.state?.trace) history.back();
  isBack = false;
  // The row of the event may have been removed.
  (opener?.isConnected ? opener : $("events-title")).focus();
});
dialog.addEventListener("click", ({ target }) => {
  if (target === dialog) dialog.close();
});
$("trace-close").addEventListener("click", () => dialog.close());
