// A colour and a pattern for each curve, so that it is recognised without colours.
const COUNT = 8;
const TILE = 8;
const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3], [14, 4], [4, 4], [14, 3, 2, 3], [1, 5]];
const STROKES = [
  [],
  [[0, 8, 8, 0], [-2, 2, 2, -2], [6, 10, 10, 6]],
  [[0, 4, 8, 4]],
  [[4, 0, 4, 8]],
  [[0, 0, 8, 8], [-2, 6, 2, 10], [6, -2, 10, 2]],
  [[0, 4, 8, 4], [4, 0, 4, 8]],
  [[2, 2, 4, 4], [6, 6, 8, 8]],
  [[0, 0, 8, 8], [0, 8, 8, 0]],
];

const ADDITIVE = new Set(["SUM", "COUNT"]);
export const isStacked = (meter) => ADDITIVE.has(meter.aggregation);

// A group keeps its colour and pattern in all meters, even if the totals change.
const looks = new Map();
export function lookOf(group) {
  if (!looks.has(group)) looks.set(group, looks.size % COUNT);
  return looks.get(group);
}

export const dashOf = (look) => DASHES[look];

// The colours of a theme are read once, since each read costs a layout.
const known = new Map();
document.addEventListener("themechange", () => known.clear());
function once(key, make) {
  if (!known.has(key)) known.set(key, make());
  return known.get(key);
}

// A custom property holds only text. A real property resolves it for the theme.
const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);
export const colour = (name) => once(name, () => {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
});

export const fillOf = (look) => once(look, () => paint(look));

function paint(look) {
  const scale = devicePixelRatio;
  const tile = document.createElement("canvas");
  tile.width = tile.height = TILE * scale;
  const pen = tile.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = colour(`--c${look}`);
  pen.fillRect(0, 0, TILE, TILE);
  pen.strokeStyle = colour("--card");
  pen.lineWidth = 1.4;
  for (const [fromX, fromY, toX, toY] of STROKES[look]) {
    pen.beginPath();
    pen.moveTo(fromX, fromY);
    pen.lineTo(toX, toY);
    pen.stroke();
  }
  return pen.createPattern(tile, "repeat");
}

// The sample of a curve in a legend, before the name.
export function swatch(group, isLine) {
  const look = lookOf(group);
  const made = document.createElement("canvas");
  made.className = "swatch";
  made.setAttribute("aria-hidden", "true");
  const [width, height, scale] = [isLine ? 28 : 16, 14, devicePixelRatio];
  made.width = width * scale;
  made.height = height * scale;
  made.style.width = `${width}px`;
  const pen = made.getContext("2d");
  if (!isLine) {
    pen.fillStyle = fillOf(look);
    pen.fillRect(0, 0, made.width, made.height);
    return made;
  }
  pen.scale(scale, scale);
  pen.strokeStyle = colour(`--c${look}`);
  pen.lineWidth = 2.5;
  pen.setLineDash(dashOf(look));
  pen.beginPath();
  pen.moveTo(0, height / 2);
  pen.lineTo(width, height / 2);
  pen.stroke();
  return made;
}
