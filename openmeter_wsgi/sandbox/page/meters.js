// A card for each meter: its plot, and a table with the legend and the totals.
import { $, heads, many, node, options, redraw, show, write } from "./dom.js";
import { isStacked, lookOf, swatch } from "./patterns.js";
import { Plot } from "./plot.js";
import { period } from "./readout.js";
import { shown } from "./views.js";

const SPANS = { 60: "minute", 300: "5 minutes", 900: "15 minutes", 3600: "hour", 86400: "day", 604800: "week" };
const WORDS = { SUM: "sum", COUNT: "number of events", AVG: "average", MIN: "smallest", MAX: "largest", UNIQUE_COUNT: "distinct values", LATEST: "latest" };
const UNITS = [[86400, "day"], [3600, "h"], [60, "min"], [1, "s"]];

// The shortest span that holds all events, unless the user has chosen one.
let fitting = 900;
const span = () => Number($("span").value) || fitting;

// Choose the span that fits the events now; return true if the plots must change.
export function fit({ oldest, times, step }) {
  const age = oldest === null ? 0 : times.at(-1) + step - oldest;
  const spans = Object.keys(SPANS).map(Number);
  const found = oldest === null ? 900 : spans.find((seconds) => seconds >= age) ?? spans.at(-1);
  const isOther = found !== fitting;
  fitting = found;
  return isOther && !$("span").value;
}

let changed = () => {};
export function onViewChange(callback) {
  changed = callback;
}

// The chosen grouping and subject of each meter, as sent to the sandbox.
const views = new Map();
export const asked = () => ({ span: span(), views: JSON.stringify(Object.fromEntries(views)) });

function length(seconds) {
  const [size, unit] = UNITS.find(([least]) => seconds >= least);
  return `${Math.round(seconds / size * 10) / 10} ${unit}`;
}

class MeterCard {
  constructor(slug) {
    this.slug = slug;
    this.name = node("h3", { id: `meter-${slug}` });
    this.definition = node("p", { class: "definition" });
    this.total = node("p", { class: "total" });
    this.unusable = node("p", { class: "unusable" });
    this.by = node("select", { onchange: () => this.#changeView() });
    this.subject = node("input", { type: "search", list: `subjects-${slug}`, placeholder: "all", autocomplete: "off", onchange: () => this.#changeView() });
    this.subjects = node("datalist", { id: `subjects-${slug}` });
    this.canvas = node("div", { class: "plot", role: "slider", tabindex: "0", "aria-valuemin": "0", "aria-valuenow": "0" });
    this.unit = node("figcaption");
    this.table = node("table");
    this.times = node("table");
    this.details = node("details", { ontoggle: () => this.#values() },
      node("summary", {}, "The plot as a table"),
      node("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Table of the plot of ${slug}` }, this.times));
    this.root = node("article", { class: "meter", "aria-labelledby": `meter-${slug}` },
      node("header", {}, node("div", {}, this.name, this.definition), this.total),
      this.unusable,
      node("div", { class: "controls" },
        node("label", {}, "Group by ", this.by), node("label", {}, "Subject ", this.subject), this.subjects),
      node("div", { class: "body" },
        node("figure", {}, this.unit, this.canvas),
        node("div", { class: "groups", tabindex: "0", role: "region", "aria-label": `Legend and totals of ${slug}` }, this.table)),
      this.details);
  }

  #changeView() {
    views.set(this.slug, { by: this.by.value, subject: this.subject.value || null });
    changed();
  }

  update(meter, times, step, runs) {
    Object.assign(this, { meter, columns: times, step });
    const value = meter.valueProperty ? ` of ${meter.valueProperty}` : "";
    write(this.name, meter.name);
    write(this.definition, `${meter.aggregation}${value} over events of type ${meter.eventType}`);
    redraw(this.total, [meter.value, meter.events, runs], () => [
      show(meter.value), " ", node("small", {}, `from ${many(meter.events, "event")}${runs}`)]);
    this.unusable.hidden = !meter.unusable;
    write(this.unusable, meter.unusable
      ? `${many(meter.unusable, "event")} without a usable number at ${meter.valueProperty}: not counted.` : "");
    const shown = meter.moreGroups || meter.groups.length > meter.curves.length ? `; the ${meter.curves.length} largest` : "";
    write(this.unit, `${WORDS[meter.aggregation]}${value} per ${length(step)}, by ${meter.by}${shown}`);
    options(this.by, ["subject", ...meter.dimensions]);
    if (this.by !== document.activeElement) this.by.value = meter.by;
    if (meter.by === "subject" && !meter.subject) options(this.subjects, meter.groups.map(({ group }) => group));
    this.#legend();
    this.#values();
    this.plot ??= new Plot(this.canvas);
    this.plot.update(meter, times, step);
  }

  #legend() {
    const { meter } = this;
    const curves = new Set(meter.curves.map((curve) => curve.group));
    const theme = document.documentElement.dataset.theme;
    redraw(this.table, [meter.groups, meter.moreGroups, meter.by, span(), theme, repainted], () => {
      const rows = meter.groups.map(({ group, events, recent, value }) => node("tr", {},
        node("th", { scope: "row" }, ...(curves.has(group) ? [swatch(group, !isStacked(meter))] : []), group || "(none)"),
        node("td", { class: "number soft" }, show(events)),
        node("td", { class: "number" }, show(recent)),
        node("td", { class: "number" }, show(value))));
      if (meter.moreGroups) rows.push(node("tr", {}, node("td", { colspan: "4", class: "soft" }, `and ${many(meter.moreGroups, "more")}`)));
      if (!rows.length) rows.push(node("tr", {}, node("td", { colspan: "4", class: "soft" }, "No events of this type yet")));
      return [node("caption", { class: "quiet" }, `${meter.name} by ${meter.by}`),
        heads(meter.by === "subject" ? "Subject" : meter.by, "#Events", `#Last ${SPANS[span()]}`, "#All time"), node("tbody", {}, ...rows)];
    });
  }

  // The sixty rows are made only when the table is opened.
  #values() {
    if (!this.details.open || !this.meter) return;
    const { meter, columns, step } = this;
    redraw(this.times, [meter.curves, columns], () => [
      node("caption", { class: "quiet" }, `${meter.name} over time by ${meter.by}`),
      heads("Time", ...meter.curves.map(({ group }) => `#${group || "(none)"}`)),
      node("tbody", {}, ...columns.map((time, column) => node("tr", {},
        node("th", { scope: "row" }, period(time, step)),
        ...meter.curves.map(({ values }) => node("td", { class: "number" }, show(values[column]))))).reverse())]);
  }
}

let repainted = 0;
document.addEventListener("themechange", () => { repainted += 1; });

// One card at a time: drawing all plots at once would delay a click or a key.
const nextTask = () => new Promise((resolve) => setTimeout(resolve));

const cards = new Map();
export async function showMeters({ meters, times, step, stored, counts }) {
  const runs = stored > counts.stored ? " of all runs" : "";
  const wanted = new Set(meters.map((meter) => meter.slug));
  for (const [slug, card] of cards) {
    if (wanted.has(slug)) continue;
    card.plot?.destroy();
    card.root.remove();
    cards.delete(slug);
  }
  for (const meter of meters) {
    if (!cards.has(meter.slug)) {
      cards.set(meter.slug, new MeterCard(meter.slug));
      $("meters").append(cards.get(meter.slug).root);
    }
    // Colours and patterns are assigned in the order of the totals, the largest first.
    for (const { group } of meter.curves) lookOf(group);
    if (shown() === "usage") cards.get(meter.slug).update(meter, times, step, runs);
    await nextTask();
  }
}
