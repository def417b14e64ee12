"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const style = (label) => `c${label % 10}`;

/** Draws a histogram. The bars of several series are next to each other, or stacked. */
function histogram({ title, across, labels, ticks: marked, series, stacked }) {
  const { width, height, left, right, top, bottom } = FRAME;
  const sums = labels.map((_, bin) => series.reduce((sum, one) => sum + one.values[bin], 0));
  const highest = Math.max(...(stacked ? sums : series.flatMap((one) => one.values)), 1e-6);
  const y = (value) => height - bottom - (value / (1.05 * highest)) * (height - top - bottom);
  const step = (width - left - right) / labels.length;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const at of ticks(0, highest, 4)) {
    drawing.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) }));
    drawing.append(svg("text", { x: left - 5, y: y(at) + 4, "text-anchor": "end" }, `${short(at)}%`));
  }
  for (const bin of marked) {
    drawing.append(svg("text", { x: left + (bin + 0.5) * step, y: height - bottom + 13, "text-anchor": "middle" }, labels[bin]));
  }
  drawing.append(svg("text", { x: (left + width - right) / 2, y: height - 1, "text-anchor": "middle" }, across));
  const bar = (0.84 * step) / (stacked ? 1 : series.length);
  labels.forEach((label, bin) => {
    let base = 0;
    series.forEach((one, place) => {
      const value = one.values[bin];
      const from = left + (bin + 0.08) * step + (stacked ? 0 : place * bar);
      const made = svg("rect", { class: `bar ${one.style}`, x: from, width: bar, y: y(base + value), height: y(base) - y(base + value) });
      made.append(svg("title", {}, `${one.name}, ${label}: ${short(value)}%`));
      drawing.append(made);
      if (stacked) base += value;
    });
  });
  const keys = series.map((one) => element("span", {}, element("i", { class: `key ${one.style}` }), one.name));
  return element("div", { class: "chart" }, element("h3", {}, title), drawing, element("div", { class: "legend" }, ...keys));
}

/** Draws an image with the polygons and boxes of its objects, in the colours of the classes. */
function objects(picture) {
  const boxes = picture.boxes.map(([x, y, w, h, label, flagged]) => {
    // The label of an unusual object could hide it. The sentence below the picture names its class.
    const text = flagged ? "" : DATA.classes[label];
    return [x, y, w, h, text, flagged === undefined ? style(label) : flagged ? "wrong" : "truth"];
  });
  const outlines = picture.outlines.map(([points, label]) => [points, style(label)]);
  return panel({ ...picture, outlines }, picture.caption, boxes);
}

/** Adds cards to a section, a few at a time. */
function fill(id, makers, ...controls) {
  const { cards, parts, show } = board();
  if (controls.length) parts.unshift(element("div", { class: "controls" }, ...controls.map((make) => make(cards))));
  document.getElementById(id).append(...parts);
  show("", makers);
  return cards;
}

document.querySelector("#statistics .charts").append(...DATA.charts.map(histogram));
const hasBoxes = DATA.inputs.some(({ panels }) => panels.some(({ boxes }) => boxes.length));
fill(
  "inputs",
  DATA.inputs.map(({ name, panels }) => () => element("div", { class: "card" }, element("p", {}, name), element("div", { class: "panels" }, ...panels.map(objects)))),
  ...(hasBoxes ? [labelControl] : []),
);
const unusual = fill(
  "unusual",
  DATA.unusual.map(({ name, why, picture }) => () => element("div", { class: "card" }, element("p", {}, name), element("div", { class: "panels single" }, objects(picture)), element("p", { class: "quiet" }, why))),
  ...(hasBoxes ? [labelControl] : []),
);
unusual.style.setProperty("--panels", 1.5);
fill(
  "duplicates",
  DATA.duplicates.map(({ kind, members }) => () => {
    const figures = members.map(({ name, src }) => element("figure", {}, enlargeableImage(element("img", { src, alt: name })), element("figcaption", {}, name)));
    return element("div", { class: "card" }, element("p", {}, kind), element("div", { class: "examples" }, ...figures));
  }),
);
