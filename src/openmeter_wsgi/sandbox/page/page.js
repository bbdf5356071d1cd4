// The live page of the sandbox.
import { onAccessChange, showAccess } from "./access.js";
import { $, clock, many, node, number, redraw, send, show, write } from "./dom.js";
import { onFaultChange, showFaults } from "./faults.js";
import { colourOf, Plot } from "./plot.js";

function showCounts({ counts, dedupe, stored, persistent, access }) {
  const kept = dedupe ? "dropped, as with deduplication" : "counted again: no deduplication";
  const items = [
    ["Received", counts.received, `in ${many(counts.requests, "request")}`],
    ["Stored", stored, persistent ? "in the database, all runs" : "until the sandbox ends"],
    ["Duplicates", counts.duplicates, kept],
    ["Refused", counts.refused, "requests, none of their events taken", "bad"],
    ["Failed on purpose", counts.failed, "ingest requests: 500, 503, 429"],
    ["Questions", access.questions, "about entitlements"],
  ];
  if (counts.dropped) items.push(["Too old", counts.dropped, "from 1970: dropped silently", "bad"]);
  redraw($("counts"), items, () => items.map(([name, count, note, mark]) =>
    node("div", count && mark ? { class: mark } : {},
      node("dt", {}, name), node("dd", {}, show(count)), node("dd", { class: "note" }, note))));
}

function showRefusals({ refusals }) {
  $("refusals").hidden = !refusals.length;
  redraw($("refusals").querySelector("ul"), refusals, () => refusals.slice(0, 8).map(({ reason, count }) =>
    node("li", {}, `${number.format(count)} × `, node("code", {}, reason))));
}

function showUncounted({ uncounted }) {
  $("uncounted").hidden = !uncounted.length;
  redraw($("uncounted").querySelector("ul"), uncounted, () => uncounted.map((entry) =>
    node("li", {},
      node("span", {}, node("strong", {}, entry.type),
        ` · ${many(entry.events, "event")} of ${many(entry.subjects, "subject")}`),
      ...entry.suggestions.map((meter) =>
        node("button", { type: "button", onclick: () => createMeter(meter) },
          meter.valueProperty ? `Create meter: sum ${meter.valueProperty}` : "Create meter: count")))));
}

async function createMeter(meter) {
  write($("uncounted-error"), await send("POST", "/api/v1/meters", meter) ?? "");
  await refresh();
}

function showEmpty({ stored, meters, counts }) {
  $("empty").hidden = stored > 0 || meters.length > 0 || counts.requests > 0;
  const event = { id: "1", source: "shell", specversion: "1.0", type: "request", subject: "customer-1", data: { total: 1 } };
  write($("address"), location.origin);
  write($("example"), `curl ${location.origin}/api/v1/events \\\n  -H 'Content-Type: application/cloudevents+json' \\\n  -d '${JSON.stringify(event)}'`);
}

class MeterCard {
  constructor(slug) {
    this.name = node("h3", { id: `meter-${slug}` });
    this.definition = node("p", { class: "definition" });
    this.total = node("p", { class: "total" });
    this.unusable = node("p", { class: "unusable" });
    this.figure = node("figure", { role: "img" });
    this.rows = node("tbody");
    this.root = node("article", { class: "meter", "aria-labelledby": `meter-${slug}` },
      node("header", {}, node("div", {}, this.name, this.definition), this.total),
      this.unusable,
      node("div", { class: "body" }, this.figure,
        node("div", { class: "subjects", tabindex: "0", role: "region", "aria-label": "Usage by subject" },
          node("table", {}, node("thead", {}, node("tr", {},
            node("th", { scope: "col" }, "Subject"),
            node("th", { scope: "col", class: "number" }, "Events"),
            node("th", { scope: "col", class: "number" }, "Value"))), this.rows))));
  }

  update(meter, { times, step }) {
    const value = meter.valueProperty ? ` of ${meter.valueProperty}` : "";
    write(this.name, meter.name);
    write(this.definition, `${meter.aggregation}${value} over events of type ${meter.eventType}`);
    redraw(this.total, [meter.value, meter.events], () => [
      show(meter.value), " ", node("small", {}, `from ${many(meter.events, "event")}`)]);
    this.unusable.hidden = !meter.unusable;
    write(this.unusable, meter.unusable
      ? `${many(meter.unusable, "event")} without a usable number at ${meter.valueProperty}: not counted.` : "");
    this.figure.setAttribute("aria-label", `${meter.name} over time; the table has the totals`);
    this.#subjects(meter);
    this.plot ??= new Plot(this.figure);
    this.plot.update(meter, times, step);
  }

  #subjects(meter) {
    const curves = new Set(meter.curves.map((curve) => curve.subject));
    redraw(this.rows, [meter.subjects, meter.moreSubjects], () => {
      const rows = meter.subjects.map(({ subject, events, value }) => node("tr", {},
        node("th", { scope: "row", class: "subject" },
          node("span", { class: curves.has(subject) ? `swatch k${colourOf(subject)}` : "swatch" }), subject),
        node("td", { class: "number soft" }, show(events)),
        node("td", { class: "number" }, show(value))));
      if (meter.moreSubjects) rows.push(node("tr", {}, node("td", { colspan: "3", class: "soft" }, `and ${many(meter.moreSubjects, "more subject")}`)));
      if (!rows.length) rows.push(node("tr", {}, node("td", { colspan: "3", class: "soft" }, "No events of this type yet")));
      return rows;
    });
  }
}

const cards = new Map();
function showMeters(overview) {
  const wanted = new Set(overview.meters.map((meter) => meter.slug));
  for (const [slug, card] of cards) {
    if (wanted.has(slug)) continue;
    card.plot.destroy();
    card.root.remove();
    cards.delete(slug);
  }
  for (const meter of overview.meters) {
    if (!cards.has(meter.slug)) {
      cards.set(meter.slug, new MeterCard(meter.slug));
      $("meters").append(cards.get(meter.slug).root);
    }
    cards.get(meter.slug).update(meter, overview);
  }
}

const rows = new Map();
function showEvents({ events }) {
  const body = $("events").tBodies[0];
  $("events").parentElement.hidden = !events.length;
  $("no-events").hidden = events.length > 0;
  const wanted = new Set(events.map((event) => event.seq));
  for (const [seq, row] of rows) if (!wanted.has(seq)) { row.remove(); rows.delete(seq); }
  for (const event of [...events].reverse()) {
    if (!rows.has(event.seq)) {
      rows.set(event.seq, eventRow(event));
      body.prepend(rows.get(event.seq));
    }
    const cell = rows.get(event.seq).lastElementChild;
    cell.className = event.flaws.length ? "flaw" : "fine";
    write(cell, event.flaws.join("; ") || "counted");
  }
}

function eventRow(event) {
  const arrived = new Date(event.ingestedAt);
  return node("tr", { title: `id ${event.id}\nsource ${event.source}\ntime ${event.time}` },
    node("td", {}, node("time", { datetime: event.ingestedAt }, clock.format(arrived))),
    node("td", {}, event.type), node("td", {}, event.subject),
    node("td", { class: "data" }, event.data ?? "–"), node("td"));
}

function status(text, mark) {
  write($("status"), text);
  $("status").className = mark;
}

async function refresh() {
  try {
    const answer = await fetch(`/sandbox/api/overview?span=${$("span").value}`);
    if (!answer.ok) throw new Error(`the sandbox answered ${answer.status}`);
    const overview = await answer.json();
    for (const part of [showCounts, showRefusals, showUncounted, showEmpty, showMeters, showAccess, showEvents, showFaults]) part(overview);
    status("Live", "live");
  } catch (error) {
    status(error instanceof TypeError ? "The sandbox does not answer; trying again" : error.message, "lost");
  }
}

$("span").addEventListener("change", refresh);
onAccessChange(refresh);
onFaultChange(refresh);
(async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, 1000);
})();
