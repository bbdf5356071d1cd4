// The view of access: a row for each entitlement, and actions that grant and revoke.
import { $, node, number, redraw, send, show, write } from "./dom.js";

const day = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
const KINDS = { boolean: "boolean", static: "static", metered: "metered" };

let changed = () => {};
export function onAccessChange(callback) {
  changed = callback;
}

// The result of a button is shown in the same place as the result of the form.
async function act(action, { customer, feature }, said) {
  const refused = await send("POST", `/sandbox/api/${action}`, { customer, feature });
  say(refused ?? `${said} ${feature} of ${customer}.`, refused);
  await changed();
}

function say(text, refused) {
  const output = $("grant").querySelector("output");
  output.className = refused ? "bad" : "";
  write(output, text);
}

// Rows are changed in place: a button keeps the focus while the numbers move.
class Row {
  constructor(entry) {
    const of = `${entry.feature} of ${entry.customer}`;
    this.entry = entry;
    this.customer = node("th", { scope: "row" });
    this.access = node("td");
    this.bar = node("span", { class: "bar", "aria-hidden": "true" }, node("span"));
    this.words = node("span");
    this.balance = node("td", { class: "balance" }, this.bar, this.words);
    this.end = node("td", { class: "soft" });
    this.asked = node("td", { class: "number soft" });
    this.reset = node("button", {
      type: "button", "aria-label": `Reset ${of}`, title: "Begin a new usage period",
      onclick: () => act("reset", this.entry, "Reset"),
    }, "Reset");
    const revoke = node("button", {
      type: "button", "aria-label": `Revoke ${of}`, onclick: () => this.#revoke(),
    }, "Revoke");
    this.root = node("tr", {}, this.customer, node("td", {}, entry.feature),
      node("td", { class: "soft" }, KINDS[entry.kind]), this.access, this.balance,
      this.end, this.asked, node("td", { class: "actions" }, this.reset, revoke));
  }

  // The button disappears with its row; move the focus first.
  async #revoke() {
    await act("revoke", this.entry, "Revoked");
    if (!this.root.isConnected) $("access-title").focus();
  }

  update(entry) {
    this.entry = entry;
    write(this.customer, entry.name);
    this.customer.title = entry.customer;
    write(this.access, entry.hasAccess ? "✓ yes" : "✕ no");
    this.access.className = entry.hasAccess ? "fine" : "denied";
    write(this.asked, show(entry.asked));
    redraw(this.end, entry.periodEnd, () => entry.periodEnd
      ? [node("time", { datetime: entry.periodEnd }, day.format(new Date(entry.periodEnd)))] : ["–"]);
    const metered = entry.kind === "metered" && !entry.error;
    this.reset.hidden = !metered;
    this.bar.hidden = !metered;
    write(this.words, metered ? words(entry) : entry.error ?? entry.config ?? "–");
    if (metered) this.#fill(entry);
  }

  #fill({ balance, totalAvailableGrantAmount: granted, overage }) {
    const share = granted ? balance / granted : 0;
    this.bar.firstChild.style.width = `${100 * share}%`;
    this.bar.className = `bar ${overage ? "over" : share <= 0.2 ? "low" : ""}`;
  }
}

function words({ balance, overage, totalAvailableGrantAmount: granted, soft }) {
  const limit = soft ? ", soft limit" : "";
  const over = overage ? `, ${number.format(overage)} over` : "";
  return `${number.format(balance)} of ${number.format(granted)} left${over}${limit}`;
}

const rows = new Map();
export function showAccess({ access }) {
  const body = $("access").querySelector("tbody");
  $("access").querySelector(".scroll").hidden = !access.rows.length;
  $("no-access").hidden = access.rows.length > 0;
  $("more-access").hidden = !access.moreRows;
  write($("more-access"), `and ${number.format(access.moreRows)} older entitlements`);
  const wanted = new Set(access.rows.map((entry) => entry.id));
  for (const [id, row] of rows) if (!wanted.has(id)) { row.root.remove(); rows.delete(id); }
  for (const entry of access.rows) {
    if (!rows.has(entry.id)) {
      rows.set(entry.id, new Row(entry));
      body.prepend(rows.get(entry.id).root);
    }
    rows.get(entry.id).update(entry);
  }
  for (const name of ["customers", "features"]) {
    redraw($(name), access[name], () => access[name].map((value) => node("option", { value })));
  }
}

$("grant").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  const form = submitted.target;
  const amount = form.amount.value === "" ? null : form.amount.valueAsNumber;
  const asked = {
    customer: form.customer.value, feature: form.feature.value, amount,
    soft: form.soft.checked, period: form.period.value,
  };
  const refused = await send("POST", "/sandbox/api/grant", asked);
  say(refused ?? `Granted ${asked.feature} to ${asked.customer}.`, refused);
  if (!refused) form.amount.value = "";
  await changed();
});
