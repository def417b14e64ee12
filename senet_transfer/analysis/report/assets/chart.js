"use strict";

const COLOURS = ["#1c7ed6", "#e8590c", "#2f9e44", "#ae3ec9", "#e03131", "#0c8599", "#f08c00", "#5f3dc4", "#868e96", "#d6336c"];
const colour = (run) => COLOURS[run % COLOURS.length];
const dashes = (run) => ["", "6 3", "2 3", "8 3 2 3"][Math.floor(run / COLOURS.length) % 4];

/** Creates an HTML element. Text is always set as text, never as HTML. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Creates an SVG element. */
function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e5) return value.toExponential(1);
  if (size >= 1000) return String(Math.round(value));
  return size !== 0 && size < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};

/** Returns round numbers that divide a range into about the given number of parts. */
function ticks(low, high, parts) {
  const raw = (high - low) / parts || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** The size of a chart and the margins of its plot area in pixels. */
const FRAME = { width: 480, height: 260, left: 46, right: 10, top: 10, bottom: 30 };

/** Returns the range of points along an axis (0: horizontal, 1: vertical), with some padding. */
function extent(points, axis) {
  let [low, high] = [Infinity, -Infinity];
  for (const point of points) {
    low = Math.min(low, point[axis]);
    high = Math.max(high, point[axis]);
  }
  const room = high > low ? (axis ? (high - low) * 0.05 : 0) : Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

/** Returns functions from values to pixels, and from a fraction of the chart's width to a value. */
function scales([[x0, x1], [y0, y1]]) {
  const { width, height, left, right, top, bottom } = FRAME;
  const [across, up] = [width - left - right, height - top - bottom];
  return {
    x: (value) => left + ((value - x0) / (x1 - x0)) * across,
    y: (value) => height - bottom - ((value - y0) / (y1 - y0)) * up,
    valueAt: (share) => x0 + ((share * width - left) / across) * (x1 - x0),
  };
}

/** Draws the grid, the tick labels of both axes, and the label of the horizontal axis. */
function axes([[x0, x1], [y0, y1]], { x, y }, across) {
  const { width, height, left, right, bottom } = FRAME;
  const made = ticks(y0, y1, 5).flatMap((at) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) }),
    svg("text", { x: left - 5, y: y(at) + 4, "text-anchor": "end" }, short(at)),
  ]);
  for (const at of ticks(x0, x1, 6)) {
    // Align the last label to the right, so that it isn't cut off at the edge.
    const anchor = x(at) > width - right - 14 ? "end" : "middle";
    const place = anchor === "end" ? width : x(at);
    made.push(svg("text", { x: place, y: height - bottom + 15, "text-anchor": anchor }, short(at)));
  }
  made.push(svg("text", { x: (left + width - right) / 2, y: height - 2, "text-anchor": "middle" }, across));
  return made;
}

/** Draws the line of a run, with a dot at each point if there are only a few. */
function trace({ run, points }, { x, y }) {
  const way = points.map((point, place) => `${place ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`);
  const path = svg("path", {
    d: way.join(""), fill: "none", stroke: colour(run), "stroke-width": 1.8, "stroke-dasharray": dashes(run), "data-run": run,
  });
  const dots = points.length <= 30 ? points : [];
  return [path, ...dots.map((point) => svg("circle", { cx: x(point[0]), cy: y(point[1]), r: 2.5, fill: colour(run), "data-run": run }))];
}

/** Creates the text that shows the points nearest to the pointer while it is over the chart. */
function readout(drawing, lines, { x, valueAt }) {
  const cursor = svg("line", { class: "grid", y1: FRAME.top, y2: FRAME.height - FRAME.bottom, visibility: "hidden" });
  const text = element("div", { class: "readout" });
  drawing.append(cursor);
  drawing.addEventListener("pointermove", (event) => {
    const bounds = drawing.getBoundingClientRect();
    const at = valueAt((event.clientX - bounds.left) / bounds.width);
    const said = lines.filter((line) => line.points.length && shown(line.run)).map((line) => {
      const near = line.points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
      cursor.setAttribute("x1", x(near[0]));
      cursor.setAttribute("x2", x(near[0]));
      return `${line.name}: ${short(near[1])} at ${short(near[0])}`;
    });
    cursor.setAttribute("visibility", said.length ? "visible" : "hidden");
    text.textContent = said.join(" · ");
  });
  return text;
}

/**
 * Draws a chart with several lines.
 * @param {{title: string, across: string, lines: {name: string, run: number, points: number[][]}[],
 *   range?: number[][], diagonal?: boolean}} options
 *   range: [[left, right], [bottom, top]]; default: the range of the points.
 */
function chart({ title, across, lines, range, diagonal = false }) {
  const clean = lines.map((line) => ({ ...line, points: line.points.filter((point) => point[1] !== null) }));
  const all = clean.flatMap((line) => line.points);
  const box = element("div", { class: "chart" }, element("h3", {}, title));
  if (!all.length) {
    box.append(element("p", { class: "quiet" }, "no data yet"));
    return box;
  }
  const drawn = range ?? [extent(all, 0), extent(all, 1)];
  const scale = scales(drawn);
  const { x, y } = scale;
  const drawing = svg("svg", { viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: "img", "aria-label": title });
  drawing.append(...axes(drawn, scale, across));
  if (diagonal) {
    drawing.append(svg("line", { class: "diagonal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }));
  }
  drawing.append(...clean.flatMap((line) => trace(line, scale)));
  const text = readout(drawing, clean, scale);
  box.append(drawing, text);
  return box;
}

const hidden = new Set();
const shown = (run) => !hidden.has(run);

/** Hides the lines of the hidden runs in an element that was drawn later. */
function hideLines(place) {
  for (const run of hidden) for (const line of place.querySelectorAll(`[data-run="${run}"]`)) line.style.display = "none";
}

/** Creates check boxes that show and hide the lines of each run in all charts. */
function legend(names) {
  return names.map((name, run) =>
    element(
      "label",
      {},
      element("input", {
        type: "checkbox",
        checked: true,
        onchange: (event) => {
          if (event.target.checked) hidden.delete(run);
          else hidden.add(run);
          for (const line of document.querySelectorAll(`.chart [data-run="${run}"]`)) {
            line.style.display = event.target.checked ? "" : "none";
          }
        },
      }),
      " ",
      key(run),
      name,
    ),
  );
}

/** Creates a colour swatch for a run. */
function key(run) {
  const made = element("i", { class: "key" });
  made.style.background = colour(run);
  return made;
}
