// The values of a column of a plot: under the pointer, or by arrow keys, as a slider
// whose value a screen reader reads.
import { node, show } from "./dom.js";
import { isStacked, swatch } from "./patterns.js";

const fine = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const coarse = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });

export function period(time, step) {
  const format = step >= 600 ? coarse : fine;
  return `${format.format(time * 1000)} to ${format.format((time + step) * 1000)}`;
}

export class Readout {
  constructor(target, point) {
    this.target = target;
    this.point = point;
    this.column = null;
    this.box = node("div", { class: "readout", "aria-hidden": "true", hidden: "" });
    target.append(this.box);
    target.addEventListener("keydown", (pressed) => this.#key(pressed));
    target.addEventListener("blur", () => this.point(null));
  }

  update(meter, times, step) {
    Object.assign(this, { meter, times, step });
    this.target.setAttribute("aria-label", `${meter.name} over time: columns of the plot`);
    this.target.setAttribute("aria-valuemax", times.length - 1);
    if (this.column === null) this.#say(times.length - 1);
    else this.#fill();
  }

  show(column, left) {
    const isShown = Number.isInteger(column) && left >= 0;
    this.column = isShown ? column : null;
    this.box.hidden = !isShown;
    if (!isShown) return;
    this.#fill();
    const isRight = left > this.target.clientWidth / 2;
    this.box.style.left = isRight ? "auto" : `${left + 70}px`;
    this.box.style.right = isRight ? `${this.target.clientWidth - left - 40}px` : "auto";
  }

  #fill() {
    const values = this.#values(this.column);
    const lines = values.map(([group, value]) => node("li", {},
      swatch(group, !isStacked(this.meter)), node("span", {}, group || "(none)"), node("b", {}, show(value))));
    this.box.replaceChildren(node("p", {}, period(this.times[this.column], this.step)),
      node("ul", {}, ...(lines.length ? lines : [node("li", {}, "nothing")])));
    this.#say(this.column);
  }

  #values(column) {
    return this.meter.curves.map(({ group, values }) => [group, values[column]])
      .filter(([, value]) => value !== null);
  }

  #say(column) {
    const said = this.#values(column).map(([group, value]) => `${group || "none"} ${show(value)}`);
    this.target.setAttribute("aria-valuenow", column);
    this.target.setAttribute("aria-valuetext", `${period(this.times[column], this.step)}: ${said.join(", ") || "nothing"}`);
  }

  #key(pressed) {
    const last = this.times.length - 1;
    const now = this.column ?? Number(this.target.getAttribute("aria-valuenow"));
    const next = {
      ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1,
      PageDown: now - 10, PageUp: now + 10, Home: 0, End: last, Escape: null,
    }[pressed.key];
    if (next === undefined) return;
    pressed.preventDefault();
    this.point(next === null ? null : Math.min(Math.max(next, 0), last));
  }
}
