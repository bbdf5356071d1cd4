// Helpers that build the page. The content of events is always set as text, through
// textContent.
export const $ = (id) => document.getElementById(id);
export const number = new Intl.NumberFormat("en", { maximumFractionDigits: 4 });
export const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
export const show = (value) => (value === null ? "–" : number.format(value));
export const many = (count, word) => `${number.format(count)} ${word}${count === 1 ? "" : "s"}`;

export function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export const heads = (...names) => node("thead", {}, node("tr", {}, ...names.map((name) =>
  name.startsWith("#") ? node("th", { scope: "col", class: "number" }, name.slice(1))
    : node("th", { scope: "col" }, name))));

// Change a text only if it differs: otherwise the reader's selection would be lost,
// and a screen reader would read the text again.
export function write(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// Replace the children of a node only if what they show has changed.
const drawn = new WeakMap();
export function redraw(target, state, make) {
  const key = JSON.stringify(state);
  if (drawn.get(target) === key) return;
  drawn.set(target, key);
  target.replaceChildren(...make());
}

export const options = (target, values) =>
  redraw(target, values, () => values.map((value) => node("option", { value }, value)));

export async function get(path, parameters = {}) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw new Error(await wrong(answer));
  return answer.json();
}

// Send a request to the sandbox; return null, or the text of the error.
export async function send(method, path, body) {
  const answer = await fetch(path, {
    method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  return answer.ok ? null : wrong(answer);
}

async function wrong(answer) {
  const said = await answer.json().catch(() => ({}));
  return said.detail ?? `the sandbox answered ${answer.status}`;
}
