// A plot of one meter: stacked columns where subjects add up, lines where they do not.
/* global uPlot */

const COLOURS = 8;
const HEIGHT = 230;
const ADDITIVE = new Set(["SUM", "COUNT"]);
const dark = matchMedia("(prefers-color-scheme: dark)");

// A subject keeps its colour, in all meters and however the totals change.
const colours = new Map();
export function colourOf(subject) {
  if (!colours.has(subject)) colours.set(subject, colours.size % COLOURS);
  return colours.get(subject);
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });

export class Plot {
  constructor(target) {
    this.target = target;
    this.resizing = new ResizeObserver(() => this.plot?.setSize(this.#size()));
    this.resizing.observe(target);
    this.repaint = () => this.#rebuild();
    dark.addEventListener("change", this.repaint);
  }

  update(meter, times, step) {
    const shape = JSON.stringify([meter.aggregation, step, meter.curves.map((curve) => curve.subject)]);
    this.meter = meter;
    this.times = times;
    this.step = step;
    if (shape === this.shape) {
      this.plot.setData(this.#data());
    } else {
      this.shape = shape;
      this.#rebuild();
    }
  }

  destroy() {
    this.resizing.disconnect();
    dark.removeEventListener("change", this.repaint);
    this.plot?.destroy();
  }

  get stacked() {
    return ADDITIVE.has(this.meter.aggregation);
  }

  // Columns are drawn from the highest sum down, so that each covers the lower part
  // of the one before it.
  #data() {
    if (!this.stacked) return [this.times, ...this.meter.curves.map((curve) => curve.values)];
    const sums = [];
    let below = this.times.map(() => 0);
    for (const { values } of this.meter.curves) {
      below = below.map((sum, column) => sum + (values[column] ?? 0));
      sums.unshift(below.map((sum) => sum || null));
    }
    return [this.times, ...sums];
  }

  #size() {
    return { width: Math.max(this.target.clientWidth, 200), height: HEIGHT };
  }

  #rebuild() {
    this.plot?.destroy();
    if (!this.times) return;
    const curves = this.stacked ? [...this.meter.curves].reverse() : this.meter.curves;
    const axis = { stroke: style("--soft"), grid: { stroke: style("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    this.plot = new uPlot({
      ...this.#size(),
      padding: [12, 20, 0, 0],
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { range: () => [this.times[0] - this.step / 2, this.times.at(-1) + this.step] },
        y: { range: (_, low, high) => [Math.min(0, low ?? 0), Math.max(high ?? 0, Number.MIN_VALUE) * 1.05 || 1] },
      },
      series: [{}, ...curves.map((curve) => this.#series(curve))],
      axes: [
        { ...axis, grid: { show: false }, size: 30, space: 70, values: this.step > 1440 ? "{MMM} {D}" : "{HH}:{mm}" },
        { ...axis, size: 56, values: (_, splits) => splits.map((value) => compact.format(value)) },
      ],
    }, this.#data(), this.target);
  }

  #series({ subject }) {
    const colour = style(`--c${colourOf(subject)}`);
    if (!this.stacked) return { stroke: colour, width: 2, spanGaps: true, points: { show: true, size: 5, fill: colour } };
    return { fill: colour, stroke: colour, width: 0, points: { show: false }, paths: uPlot.paths.bars({ size: [0.82, 40], align: 1 }) };
  }
}
