// A plot of one meter: stacked columns where groups add up, lines where they do not.
/* global uPlot */
import { colour, dashOf, fillOf, isStacked, lookOf } from "./patterns.js";
import { Readout } from "./readout.js";

const HEIGHT = 240;
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });

export class Plot {
  constructor(target) {
    this.target = target;
    this.readout = new Readout(target, (column) => this.#point(column));
    this.resizing = new ResizeObserver(() => this.#resize());
    this.resizing.observe(target);
    this.repaint = () => this.#rebuild();
    document.addEventListener("themechange", this.repaint);
  }

  update(meter, times, step) {
    const shape = JSON.stringify([meter.aggregation, step, meter.curves.map((curve) => curve.group)]);
    this.meter = meter;
    this.times = times;
    this.step = step;
    if (shape !== this.shape) {
      this.shape = shape;
      this.#rebuild();
    } else {
      this.plot?.setData(this.#data());
    }
    this.readout.update(meter, times, step);
  }

  destroy() {
    this.resizing.disconnect();
    document.removeEventListener("themechange", this.repaint);
    this.plot?.destroy();
  }

  // A hidden view has no width; its plots are drawn when it is shown.
  #resize() {
    if (!this.target.clientWidth) return;
    if (this.plot) this.plot.setSize(this.#size());
    else this.#rebuild();
  }

  // The x of a column is its middle, so that the pointer finds it.
  #data() {
    const middles = this.times.map((time) => time + this.step / 2);
    if (!isStacked(this.meter)) return [middles, ...this.meter.curves.map((curve) => curve.values)];
    // Columns are drawn from the highest sum down, so that each covers the lower part
    // of the one before it.
    const sums = [];
    let below = this.times.map(() => 0);
    for (const { values } of this.meter.curves) {
      below = below.map((sum, column) => sum + (values[column] ?? 0));
      sums.unshift(below.map((sum) => sum || null));
    }
    return [middles, ...sums];
  }

  #size() {
    return { width: Math.max(this.target.clientWidth, 200), height: HEIGHT };
  }

  #rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.times || !this.target.clientWidth) return;
    const curves = isStacked(this.meter) ? [...this.meter.curves].reverse() : this.meter.curves;
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const axes = [
      { ...axis, grid: { show: false }, size: 30, space: 70, values: this.#clock() },
      { ...axis, size: 56, values: (_, splits) => splits.map((value) => compact.format(value)) },
    ];
    this.plot = new uPlot({
      ...this.#size(),
      padding: [12, 20, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { setScale: false, x: false, y: false } },
      hooks: { setCursor: [({ cursor }) => this.readout.show(cursor.idx, cursor.left)] },
      scales: {
        x: { range: () => [this.times[0], this.times.at(-1) + this.step] },
        y: { range: (_, low, high) => [Math.min(0, low ?? 0), Math.max(high ?? 0, Number.MIN_VALUE) * 1.05 || 1] },
      },
      series: [{}, ...curves.map((curve) => this.#series(curve))],
      axes,
    }, this.#data(), this.target);
  }

  #clock() {
    if (this.step * this.times.length > 86400) return "{MMM} {D}";
    return this.step * this.times.length < 600 ? "{HH}:{mm}:{ss}" : "{HH}:{mm}";
  }

  #series({ group }) {
    const look = lookOf(group);
    const stroke = colour(`--c${look}`);
    if (!isStacked(this.meter)) {
      return { stroke, width: 2, dash: dashOf(look), spanGaps: true, points: { show: true, size: 6, fill: stroke } };
    }
    return { fill: fillOf(look), stroke, width: 1, points: { show: false }, paths: uPlot.paths.bars({ size: [0.86, 40] }) };
  }

  #point(column) {
    if (!this.plot) return;
    const left = column === null ? -10 : this.plot.valToPos(this.plot.data[0][column], "x");
    this.plot.setCursor({ left, top: column === null ? -10 : 10 });
  }
}
