// Shows the view that the hash of the address names, such as "#events?outcome=refused".
import { $ } from "./dom.js";

const views = [...document.querySelectorAll("[data-view]")];
const links = [...document.querySelectorAll("nav a")];
const entered = new Map();

export const shown = () => views.find((view) => !view.hidden).dataset.view;

// Register a callback for when a view is shown; it gets the parameters of the address.
export function onEnter(name, callback) {
  entered.set(name, callback);
}

function follow(moveFocus) {
  const [name, asked] = location.hash.slice(1).split("?");
  const view = views.find((candidate) => candidate.dataset.view === name) ?? views[0];
  for (const other of views) other.hidden = other !== view;
  for (const link of links) {
    if (link.hash === `#${view.dataset.view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const heading = view.querySelector("h2");
  document.title = `${heading.textContent} · OpenMeter sandbox`;
  entered.get(view.dataset.view)?.(new URLSearchParams(asked));
  if (!moveFocus) return;
  scrollTo(0, 0);
  heading.focus({ preventScroll: true });
}

export function start() {
  addEventListener("hashchange", () => follow(true));
  document.querySelector(".skip").addEventListener("click", (clicked) => {
    clicked.preventDefault();
    $("content").focus();
  });
  follow(false);
}
