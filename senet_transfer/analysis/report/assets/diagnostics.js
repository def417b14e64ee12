"use strict";

const digits = (value, places) => (value === null || value === undefined ? "–" : value.toFixed(places));

/** Creates a table from column titles and rows of cells. The first cell of a row is its title. */
function table(titles, rows) {
  const head = titles.map((title, place) => element("th", place ? { class: "number" } : {}, title));
  const body = rows.map(([title, ...cells]) => {
    const made = cells.map((cell) => (cell instanceof Node ? cell : element("td", { class: "number" }, cell)));
    return element("tr", {}, title instanceof Node ? title : element("th", {}, title), ...made);
  });
  return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body)));
}

/** Creates a table cell with a bar and a number. */
function bar(value, most, tone = "--hit") {
  if (value === null) return element("td", { class: "number" }, "–");
  const share = Math.min(Math.max((100 * value) / (most || 1), 0), 100);
  const filled = element("i", { style: `width: ${share}%; background: var(${tone})` });
  return element("td", { class: "number" }, element("span", { class: "track" }, filled), element("span", { class: "figure" }, value.toFixed(1)));
}

/** Creates the table of error types, with their cost and number for each run. */
function errorTable({ errors, runs }, names) {
  const all = Object.values(runs);
  const most = Math.max(...all.flatMap((found) => errors.map(({ name }) => found.errors[name].AP50 ?? 0)));
  const titles = Object.keys(runs).flatMap((run) => (all.length > 1 ? [`${names[run]}: AP50`, "errors"] : ["costs AP50", "errors"]));
  const rows = errors.map(({ name, text }) => [
    element("th", {}, name, element("br"), element("span", { class: "quiet" }, text)),
    ...all.flatMap((found) => [bar(found.errors[name].AP50, most, "--wrong"), found.errors[name].count.toLocaleString("en")]),
  ]);
  return table(["type of error", ...titles], rows);
}

const isConstant = (values) => values.every((value) => value === values[0]);
const recalls = (values) => values.map((value, place) => [place / 100, value]);

/** Returns the curves of all classes (-1), at several IoUs for a single run, or of one class. */
function precisionCurves({ runs }, names, label) {
  const entries = Object.entries(runs);
  if (label < 0 && entries.length === 1) {
    return Object.entries(entries[0][1].curves).map(([iou, values], place) => ({ name: `IoU ${iou}`, run: place, values }));
  }
  return entries.map(([run, found]) => {
    const values = label < 0 ? found.curves["0.5"] : found.classes[label].curve;
    return { name: names[run], run: Number(run), values };
  });
}

/** Draws the precision-recall curves, except constant ones, which it lists. */
function precisionChart(gallery, names, label) {
  const curves = precisionCurves(gallery, names, label).filter(({ values }) => values.length);
  const drawn = curves.filter(({ values }) => !isConstant(values));
  const parts = [];
  if (drawn.length) {
    const lines = drawn.map(({ name, run, values }) => ({ name, run, points: recalls(values) }));
    parts.push(chart({ title: "Precision by recall", across: "recall", lines, range: [[0, 1], [0, 1]] }));
    parts.push(element("p", { class: "legend" }, ...drawn.map(({ name, run }) => element("span", {}, key(run), name))));
  }
  for (const { name, values } of curves.filter(({ values }) => isConstant(values))) {
    parts.push(element("p", { class: "quiet" }, `${name}: the precision is ${values[0]} at all recalls.`));
  }
  return parts;
}

/** Creates a chart of precision and recall with a list of the classes that have a curve. */
function precisionPart(gallery, names) {
  const place = element("div");
  const draw = (label) => {
    place.replaceChildren(...precisionChart(gallery, names, label));
    hideLines(place);
  };
  const found = Object.values(gallery.runs);
  const classes = found[0].classes.map(({ name }, label) => [label, name]);
  const curved = classes.filter(([label]) => found.some((one) => one.classes[label]?.curve.length && !isConstant(one.classes[label].curve)));
  draw(-1);
  const parts = [["-1", "all classes"], ...curved];
  const list = parts.length > 2 ? [choice("class of the curve", parts, (event) => draw(Number(event.target.value)))] : [];
  const other = found.length > 1 ? "IoU of 0.5" : "IoU of 0.5 for single classes";
  return element("div", {}, ...list, place, element("p", { class: "quiet" }, `${other}. The precision is the highest at this or a higher recall.`));
}

/** Creates the tables of the AP by object size and by number of objects in an image. */
function groupTables(found) {
  const size = found.by_size.filter((row) => row.objects).map((row) => [
    element("th", {}, row.size, element("br"), element("span", { class: "quiet" }, areaText(row.area))),
    bar(row.AP, 100), digits(row.AP50, 1), row.objects.toLocaleString("en"),
  ]);
  const count = found.by_count.map((row) => {
    const range = row.to === null ? `${row.from} or more` : row.from === row.to ? String(row.from) : `${row.from}–${row.to}`;
    return [range, bar(row.AP, 100), digits(row.AP50, 1), row.images.toLocaleString("en")];
  });
  return [table(["object size", "AP", "AP50", "objects"], size), table(["objects in the image", "AP", "AP50", "images"], count)];
}

/** Returns a range of areas in words. */
function areaText([least, most]) {
  return most === null ? `over ${Math.sqrt(least)}² pixels` : `up to ${Math.sqrt(most)}² pixels`;
}

/** Creates the table of the classes, with the lowest AP first. */
function classTable(found) {
  const row = (name, one) => [
    name, bar(one.AP, 100), digits(one.AP50, 1), digits(one.threshold, 2), digits(one.precision, 2), digits(one.recall, 2),
    digits(one.F1, 2), one.objects.toLocaleString("en"), one.detections.toLocaleString("en"),
  ];
  const known = found.classes.filter((one) => one.objects || one.detections);
  known.sort((a, b) => (a.AP ?? 101) - (b.AP ?? 101) || (a.name < b.name ? -1 : 1));
  const all = row("all classes", { ...found, ...found.best });
  const made = table(["class", "AP", "AP50", "threshold", "precision", "recall", "F1", "objects", "detections"], [all, ...known.map((one) => row(one.name, one))]);
  made.classList.add("tall");
  return made;
}

/** Creates the confusion matrix. The colour of a cell is its share of the objects of a class. */
function confusionTable({ confusion, classes }) {
  const names = confusion.labels.map((label) => classes[label].name);
  const last = names.length;
  const title = (name) => element("th", { title: name }, name);
  const head = element("tr", {}, element("th", {}, "object"), ...names.map(title), title("not detected"));
  const rows = confusion.matrix.map((counts, row) => {
    const total = counts.reduce((sum, value) => sum + value, 0);
    const cells = counts.map((value, column) => {
      if (row === last && column === last) return element("td", {});
      const share = total && row !== last ? Math.round((70 * value) / total) : 0;
      const tone = row === column ? "--hit" : "--wrong";
      const about = `${value} of ${total} ${row === last ? "detections without an object" : `objects of the class ${names[row]}`}: ${column === last ? "not detected" : `detected as ${names[column]}`}`;
      return element("td", { class: value ? "number" : "number quiet", title: about, style: `background: color-mix(in srgb, var(${tone}) ${share}%, transparent)` }, value.toLocaleString("en"));
    });
    return element("tr", {}, title(row === last ? "no object" : names[row]), ...cells);
  });
  const part = last < confusion.classes ? ` Only the ${last} most confused of ${confusion.classes} classes are shown.` : "";
  const score = confusion.score === null ? "" : ` with a score of at least ${confusion.score.toFixed(2)}, the threshold with the highest F1`;
  return [
    element("div", { class: "scroll" }, element("table", { class: "confusion" }, element("thead", {}, head), element("tbody", {}, ...rows))),
    element("p", { class: "quiet" }, `Rows are the objects' classes, columns the classes they are detected as, at an IoU of 0.5 or more, for detections${score}.${part}`),
  ];
}

/** Creates the tables and charts of the diagnostics of one dataset. */
function diagnosticsParts(gallery, names) {
  const runs = Object.keys(gallery.runs);
  const detail = element("div");
  const draw = (run) => {
    const found = gallery.runs[run];
    detail.replaceChildren(
      element("div", { class: "columns" }, ...groupTables(found)),
      element("h4", {}, "Classes"), classTable(found),
      element("p", { class: "quiet" }, "Precision, recall and F1 are for the detections with a score of at least the threshold, which maximises F1."),
      element("h4", {}, "Confusion matrix"), ...confusionTable(found),
    );
  };
  draw(runs[0]);
  const list = runs.length > 1 ? [element("div", { class: "controls" }, choice("run of the tables", runs.map((run) => [run, names[run]]), (event) => draw(event.target.value)))] : [];
  return [
    element("div", { class: "columns" },
      element("div", {}, errorTable(gallery, names), element("p", { class: "quiet" }, "The costs are the AP50 that correcting only one type of error would add at an IoU of 0.5 (TIDE, Bolya et al. 2020). What is lost at higher IoU is due to localisation, too. Errors are counted at all scores.")),
      precisionPart(gallery, names)),
    ...list, detail,
  ];
}
