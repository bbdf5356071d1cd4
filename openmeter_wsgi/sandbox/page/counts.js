// Counts since the start, reasons of refusals, and events that no meter counts.
import { $, many, node, number, redraw, send, show, write } from "./dom.js";

let changed = () => {};
export function onMeterCreated(callback) {
  changed = callback;
}

function tiles({ counts, dedupe, stored, waiting, access }) {
  const earlier = stored - counts.stored;
  const kinds = [
    earlier > 0 ? `${number.format(earlier)} of them in earlier runs` : "in this run",
    ...(waiting ? [`${number.format(waiting)} not visible yet (lag)`] : []),
  ];
  const kept = dedupe ? "not stored: deduplication is on" : "stored again: deduplication is off";
  const items = [
    { name: "Received", count: counts.received, note: `since the start, in ${many(counts.requests, "request")}` },
    { name: "Stored", count: stored, note: kinds.join(", ") },
    { name: "Duplicates", count: counts.duplicates, note: kept, outcome: dedupe ? "duplicate" : "stored" },
    { name: "Refused", count: counts.refused, note: "requests, with all their events", outcome: "refused", bad: true },
    { name: "Failed", count: counts.failed, note: "requests answered 5xx or 429", outcome: "failed" },
    { name: "Checks", count: access.questions, note: "of entitlements" },
  ];
  if (counts.dropped) items.push({ name: "Dropped", count: counts.dropped, note: "answered 204, but not stored", outcome: "dropped", bad: true });
  return items;
}

export function showCounts(overview) {
  const items = tiles(overview);
  redraw($("counts"), items, () => items.map(({ name, count, note, outcome, bad }) => {
    const label = outcome && count ? node("a", { href: `#events?outcome=${outcome}` }, name) : name;
    return node("div", bad && count ? { class: "bad" } : {},
      node("dt", {}, label), node("dd", {}, show(count)), node("dd", { class: "note" }, note));
  }));
}

export function showRefusals({ refusals }) {
  $("refusals").hidden = !refusals.length;
  redraw($("refusals").querySelector("ul"), refusals, () => refusals.slice(0, 8).map(({ reason, count }) =>
    node("li", {}, `${number.format(count)} × `, node("code", {}, reason))));
}

export function showUncounted({ uncounted }) {
  $("uncounted").hidden = !uncounted.length;
  redraw($("uncounted").querySelector("ul"), uncounted, () => uncounted.map((entry) =>
    node("li", {},
      node("span", {}, node("strong", {}, entry.type),
        ` · ${many(entry.events, "event")} of ${many(entry.subjects, "subject")}`),
      ...suggestions(entry).map((meter) =>
        node("button", { type: "button", onclick: () => create(meter) },
          meter.valueProperty ? `Create meter: sum ${meter.valueProperty}` : "Create meter: count")))));
}

// Meters that would count events like the newest of this type.
function suggestions({ type, data }) {
  const slug = (...parts) => (parts.join(" ").toLowerCase().match(/[a-z0-9]+/g) ?? ["x"]).join("_").slice(0, 64).replace(/_$/, "");
  const sums = Object.entries(data)
    .filter(([name, value]) => typeof value === "number" && /^[\w-]+$/.test(name))
    .map(([name]) => ({ slug: slug(type, name), eventType: type, aggregation: "SUM", valueProperty: `$.${name}` }));
  return [{ slug: slug(type, "count"), eventType: type, aggregation: "COUNT" }, ...sums].slice(0, 4);
}

// The button disappears with its row; move the focus afterwards.
async function create(meter) {
  const refused = await send("POST", "/api/v1/meters", meter);
  write($("uncounted-error"), refused ?? "");
  await changed();
  if (!refused) $("usage-title").focus();
}

export function showEmpty({ stored, meters, counts }) {
  $("empty").hidden = stored > 0 || meters.length > 0 || counts.requests > 0;
  const event = { id: "1", source: "shell", specversion: "1.0", type: "request", subject: "customer-1", data: { total: 1 } };
  write($("address"), location.origin);
  write($("example"), `curl ${location.origin}/api/v1/events \\\n  -H 'Content-Type: application/cloudevents+json' \\\n  -d '${JSON.stringify(event)}'`);
}
