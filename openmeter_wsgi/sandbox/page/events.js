// The live list of events, with search. The sandbox searches, so the page holds only
// the rows that it shows.
import { $, clock, get, many, node, number, options, write } from "./dom.js";
import { openTrace } from "./trace.js";
import { onEnter, shown } from "./views.js";

const PAGE = 100;
const MOST = 1000;
const MOST_COUNTED = 10_000;
const TYPING = 250;
const OUTCOMES = {
  stored: ["✓", "counted", "fine"], duplicate: ["=", "duplicate", "soft"], refused: ["✕", "refused", "denied"],
  dropped: ["✕", "dropped", "denied"], failed: ["!", "failed", "flaw"],
};
const form = $("search");
const body = $("arrivals").tBodies[0];
const rows = new Map();
const list = { limit: PAGE, newest: 0, matches: 0, waiting: 0, meters: "", isPaused: false, asked: 0 };

const wanted = () => Object.fromEntries([...new FormData(form)].filter(([, value]) => value));

export function outcomeOf({ outcome, flaws = [] }) {
  if (outcome === "stored" && flaws.length) return ["!", flaws.join("; "), "flaw"];
  return OUTCOMES[outcome];
}

function row(arrival) {
  const [sign, text, mark] = outcomeOf(arrival);
  const batch = arrival.batch > 1 ? ` · event ${arrival.position} of ${arrival.batch}` : "";
  const id = arrival.id ?? "not an event";
  return node("tr", { onclick: () => openTrace(arrival.seq) },
    node("td", { class: "soft", "data-label": "Arrived" }, node("time", { datetime: arrival.ingestedAt }, clock.format(new Date(arrival.ingestedAt)))),
    node("td", { class: mark, "data-label": "Outcome" }, `${sign} ${text}${batch}`,
      ...(arrival.reason && arrival.outcome !== "duplicate" ? [node("small", {}, arrival.reason)] : [])),
    node("td", { "data-label": "Type" }, arrival.type ?? "–"),
    node("td", { "data-label": "Subject" }, arrival.subject ?? "–"),
    node("th", { scope: "row", "data-label": "Id" }, node("button", { type: "button", class: "link", "aria-haspopup": "dialog" }, id)),
    node("td", { class: "data", "data-label": "Data" }, arrival.data ?? "–"));
}

// In small portions: a thousand rows at once would delay typing.
async function draw(arrivals, token) {
  const kept = new Set(arrivals.map(({ seq }) => seq));
  for (const [seq, old] of rows) if (!kept.has(seq)) { old.remove(); rows.delete(seq); }
  for (let start = 0; start < arrivals.length; start += PAGE) {
    if (start) await new Promise((resolve) => setTimeout(resolve));
    if (token !== list.asked) return;
    for (const arrival of arrivals.slice(start, start + PAGE)) {
      if (!rows.has(arrival.seq)) rows.set(arrival.seq, row(arrival));
    }
    body.append(...arrivals.slice(start, start + PAGE).map(({ seq }) => rows.get(seq)));
  }
}

function summary() {
  const matches = list.matches > MOST_COUNTED ? `more than ${number.format(MOST_COUNTED)}` : number.format(list.matches);
  write($("matches"), list.matches ? `The newest ${number.format(rows.size)} of ${matches}` : "No event matches");
  $("arrivals").parentElement.hidden = !list.matches;
  $("older").hidden = rows.size >= Math.min(list.matches, MOST);
  write($("pause"), list.isPaused && list.waiting ? `Resume: ${many(list.waiting, "new event")}` : list.isPaused ? "Resume" : "Pause");
}

async function reload({ announce = false } = {}) {
  const token = ++list.asked;
  const answer = await get("/sandbox/api/arrivals", { ...wanted(), limit: list.limit });
  if (token !== list.asked) return;
  const meters = answer.meters.join();
  // With other meters, other events count, so all rows are drawn anew.
  if (meters !== list.meters) { body.replaceChildren(); rows.clear(); }
  Object.assign(list, { meters, matches: answer.matches, waiting: 0, newest: answer.arrivals[0]?.seq ?? list.newest });
  options($("types"), answer.types);
  options($("event-subjects"), answer.subjects);
  await draw(answer.arrivals, token);
  summary();
  if (announce) write($("found"), `${many(list.matches, "event")} found`);
}

// Fetch only new events; while the list is paused, only show their number.
export async function pollEvents() {
  if (shown() !== "events") return;
  if (!list.newest || !rows.size) { await reload(); return; }
  const token = list.asked;
  const { arrivals, meters } = await get("/sandbox/api/arrivals", { ...wanted(), limit: list.limit, after: list.newest });
  if (token !== list.asked) return;
  if (list.isPaused) {
    list.waiting = arrivals.length;
  } else if (arrivals.length === list.limit || meters.join() !== list.meters) {
    await reload();
  } else if (arrivals.length) {
    list.newest = arrivals[0].seq;
    list.matches += arrivals.length;
    for (const arrival of arrivals) rows.set(arrival.seq, row(arrival));
    body.prepend(...arrivals.map(({ seq }) => rows.get(seq)));
    trim();
  }
  summary();
}

// A row with the focus stays until the focus leaves it.
function trim() {
  for (const old of [...body.rows].slice(list.limit)) {
    if (!old.contains(document.activeElement)) old.remove();
  }
  for (const [seq, old] of rows) if (!old.isConnected) rows.delete(seq);
}

let typing;
function search() {
  clearTimeout(typing);
  list.limit = PAGE;
  typing = setTimeout(() => reload({ announce: true }), TYPING);
}

form.addEventListener("submit", (submitted) => submitted.preventDefault());
form.addEventListener("input", search);
form.addEventListener("reset", () => setTimeout(search));
$("pause").addEventListener("click", async () => {
  list.isPaused = !list.isPaused;
  $("pause").setAttribute("aria-pressed", list.isPaused);
  if (list.isPaused) summary();
  else await reload();
});
$("older").addEventListener("click", async () => {
  list.limit = Math.min(list.limit + PAGE, MOST);
  await reload();
});
onEnter("events", (asked) => {
  if ([...asked].length) form.reset();
  for (const [name, value] of asked) if (form.elements[name]) form.elements[name].value = value;
  reload().catch(() => {});  // polling reports that the sandbox does not answer
});
