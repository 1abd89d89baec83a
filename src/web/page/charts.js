// Drawings: a line over time, and memory cell by cell. No data of their own.

const SVG = "http://www.w3.org/2000/svg";
const shape = (name, attributes, text) => {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
};

// A round number of which some four make up `most`.
const step = most => {
  const rough = Math.max(most, 1) / 4;
  const ten = 10 ** Math.floor(Math.log10(rough));
  return Math.max(1, [1, 2, 5, 10].map(n => n * ten).find(n => n >= rough));
};

// Draws `points` ([milliseconds, number or null]) between `from` and `to`. `bands` are [from, to, class], `marks` are
// [at, text], `steps` are points of a second line with a scale of its own.
export function line(host, { from, to, points, label, unit, bands = [], marks = [], steps = [], floor = 0 }) {
  const width = Math.max(host.clientWidth, 280), height = Math.max(host.clientHeight, 240);
  const font = parseFloat(getComputedStyle(host).fontSize) * .8;
  const left = font * 3.6, right = steps.length ? font * 4 : font, top = font * 2.2, bottom = font * 2;
  const seen = points.filter(([at, value]) => value !== null && at >= from);
  const values = seen.map(([, value]) => value);
  const low = floor === null && values.length ? Math.min(...values) : 0;
  const unitOf = step(Math.max(4, (values.length ? Math.max(...values) : 4) - low));
  const base = Math.floor(low / unitOf) * unitOf;
  const lines = Math.max(4, Math.ceil(((values.length ? Math.max(...values) : 4) - base) / unitOf));
  const x = at => left + (at - from) / (to - from) * (width - left - right);
  const y = value => height - bottom - (value - base) / (lines * unitOf) * (height - top - bottom);

  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const [begin, end, kind] of bands) {
    const [a, b] = [Math.max(begin, from), Math.min(end, to)];
    if (b <= a) continue;
    svg.append(shape("rect", { class: kind, x: x(a), y: top, width: Math.max(x(b) - x(a), 2), height: height - top - bottom }));
  }
  for (let n = 0; n <= lines; n++) {
    const value = base + n * unitOf;
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - font * .5, y: y(value) + font * .35, "text-anchor": "end" }, value.toLocaleString("en")));
  }
  for (let seconds = 0; seconds <= (to - from) / 1000; seconds += width < 500 ? 30 : 15) {
    svg.append(shape("text", { x: x(to - seconds * 1000), y: height - font * .4, "text-anchor": seconds ? "middle" : "end" }, seconds ? `−${seconds} s` : "now"));
  }
  svg.append(shape("text", { class: "strong", x: 0, y: font }, unit));

  const path = (list, place) => {
    let draw = "", pen = false;
    for (const [at, value] of list) {
      if (at < from || value === null) { pen = pen && value !== null; continue; }
      draw += `${pen ? "L" : "M"}${x(at).toFixed(1)} ${place(value).toFixed(1)}`;
      pen = true;
    }
    return draw;
  };
  if (steps.length) {
    const most = Math.max(2, ...steps.map(([, value]) => value ?? 0));
    const place = value => height - bottom - value / most * (height - top - bottom) * .92;
    const stairs = steps.flatMap((point, n) => n && point[1] !== null ? [[point[0], steps[n - 1][1]], point] : [point]);
    svg.append(shape("path", { class: "steps", d: path(stairs, place) }));
    const last = steps.findLast(([, value]) => value !== null);
    if (last) svg.append(shape("text", { class: "strong", x: width - right + font * .3, y: place(last[1]) + font * .35 }, `${last[1]} vCPU${last[1] === 1 ? "" : "s"}`));
  }
  svg.append(shape("path", { class: "line", d: path(points, y) }));
  let row = 0, end = -Infinity;
  for (const [at, text] of marks) {
    if (at < from || at > to) continue;
    svg.append(shape("line", { class: "pause", x1: x(at), x2: x(at), y1: top, y2: height - bottom }));
    // Words that would lie over each other go one line lower.
    row = x(at) < end ? (row + 1) % 4 : 0;
    const behind = x(at) > width * .7;
    svg.append(shape("text", { class: "strong", x: x(at) + (behind ? -6 : 6), y: top + font * (1.1 + row * 1.25), "text-anchor": behind ? "end" : "start" }, text));
    end = x(at) + text.length * font * .55;
  }
  host.replaceChildren(svg);
}

export const KINDS = [
  ["changed", "changed", "since the last snapshot: the next one writes it"],
  ["same", "clean", "as in the last snapshot"],
  ["shared", "shared", "in the host’s memory once, for all who have it"],
  ["asleep", "asleep", "not touched since the machine woke"],
  ["zero", "zeros", "for which the host gives nothing"],
];
// The monitor counts in this order.
const ORDER = ["zero", "asleep", "shared", "same", "changed"];

// Draws the cells of a memory map, each filled with what its pages are; gives the totals in pages.
export function map(canvas, memory, before) {
  const style = getComputedStyle(document.documentElement);
  const colour = Object.fromEntries(ORDER.map(kind => [kind, style.getPropertyValue(`--${kind}`).trim()]));
  const width = canvas.clientWidth, columns = width > 700 ? 64 : 32;
  const rows = Math.ceil(memory.cells.length / columns), side = width / columns;
  const sharp = Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = width * sharp;
  canvas.height = Math.ceil(rows * side) * sharp;
  const draw = canvas.getContext("2d");
  draw.scale(sharp, sharp);
  const totals = Object.fromEntries(ORDER.map(kind => [kind, 0]));
  memory.cells.forEach((cell, n) => {
    const left = n % columns * side, top = Math.floor(n / columns) * side;
    const size = side - Math.max(1, side * .08), whole = cell.reduce((sum, pages) => sum + pages, 0);
    let filled = 0;
    // What matters most is at the bottom, like water in a glass.
    for (let k = ORDER.length - 1; k >= 0; k--) {
      totals[ORDER[k]] += cell[k];
      const part = cell[k] / whole * size;
      draw.fillStyle = colour[ORDER[k]];
      draw.fillRect(left, top + size - filled - part, size, part);
      filled += part;
    }
    if (before && before[n] && before[n][4] < cell[4]) {
      draw.strokeStyle = style.getPropertyValue("--ink");
      draw.lineWidth = 1.5;
      draw.strokeRect(left + .75, top + .75, size - 1.5, size - 1.5);
    }
  });
  return totals;
}
