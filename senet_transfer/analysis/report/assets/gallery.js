"use strict";

const PAGE = 24;

/** Creates a drop-down list from pairs of [value, text]. */
function choice(label, entries, onchange) {
  const list = element("select", { "aria-label": label, onchange });
  for (const [value, text] of entries) list.append(element("option", { value }, text));
  return list;
}

/** Returns a function that shows cards page by page, with a button that adds the next page. */
function portions(cards, more) {
  let rest = [];
  const next = () => {
    for (const make of rest.splice(0, PAGE)) cards.append(make());
    more.replaceChildren();
    if (rest.length) more.append(element("button", { onclick: next }, `Show more (${rest.length} left)`));
  };
  return (makers) => {
    rest = [...makers];
    cards.replaceChildren();
    next();
  };
}

/** Counts the hits, detections and objects in an image for a class (-1: all) and a minimum score. */
function count(image, run, wanted, least) {
  const objects = image.truth.filter((box) => wanted < 0 || box[4] === wanted);
  const found = (image.found[run] ?? []).filter((box) => box[5] >= least && (wanted < 0 || box[4] === wanted));
  const hits = found.filter((box) => box[6] >= 0).length;
  const both = objects.length + found.length;
  return { objects: objects.length, found: found.length, hits, f1: both ? (2 * hits) / both : 1 };
}

/**
 * Draws an image with boxes: [left, top, width, height, label, style, note]. Polygons are optional: [points, style].
 * @param {number} letters The size of the letters as a part of the image's longer side.
 * @param {boolean} notes Whether to add the notes to the labels.
 */
function drawing(image, boxes, letters, notes = false) {
  const size = Math.max(image.width, image.height) * letters;
  const made = svg("svg", { viewBox: `0 0 ${image.width} ${image.height}` });
  made.append(svg("image", { href: image.src, width: image.width, height: image.height }));
  for (const [points, style] of image.outlines ?? []) made.append(svg("polygon", { class: style, points }));
  for (const [left, top, width, height, , style] of boxes) {
    made.append(svg("rect", { class: style, x: left, y: top, width, height }));
  }
  for (const [left, top, , , text, , note] of boxes) {
    const label = notes && note ? `${text} ${note}` : text;
    // A label that would extend beyond the right or the lower edge ends there.
    const fits = left + 0.65 * size * label.length < image.width;
    const place = fits ? { x: left + size / 8 } : { x: image.width - size / 8, "text-anchor": "end" };
    made.append(svg("text", { ...place, y: Math.min(Math.max(top + size, size), image.height - size / 4), "font-size": size }, label));
  }
  return made;
}

/** Creates a check box that shows or hides the labels of boxes in an element. */
function labelControl(place, checked = true) {
  const show = (on) => place.classList.toggle("plain", !on);
  show(checked);
  return element("label", {}, element("input", { type: "checkbox", checked, onchange: (event) => show(event.target.checked) }), " labels");
}

/** Shows an image in a dialog that fills the window, until it is closed or clicked. */
function enlarge(content, caption, controls = []) {
  const close = () => dialog.close();
  const bar = element("div", { class: "controls" }, ...controls, element("button", { onclick: close }, "Close"));
  const dialog = element("dialog", { "aria-label": caption, onclose: () => dialog.remove() }, bar, content, element("p", { class: "quiet" }, caption));
  content.addEventListener("click", close);
  document.body.append(dialog);
  dialog.showModal();
}

/** Makes an element a button that enlarges an image. */
function enlargeable(part, action) {
  part.classList.add("enlargeable");
  part.setAttribute("tabindex", "0");
  part.setAttribute("role", "button");
  part.addEventListener("click", action);
  part.addEventListener("keydown", (event) => {
    if (event.key === "Enter") action();
  });
  return part;
}

/** Makes an <img> element enlargeable. */
const enlargeableImage = (image) => enlargeable(image, () => enlarge(element("img", { src: image.src, alt: image.alt }), image.alt));

/** Draws an image with boxes and a caption. A click enlarges it. */
function panel(image, caption, boxes) {
  const made = drawing(image, boxes, 1 / 20);
  enlargeable(made, () => {
    const plain = made.closest(".plain") !== null;
    const large = drawing(image, boxes, 1 / 50, true);
    enlarge(large, `${image.name}, ${caption}`, [labelControl(large, !plain)]);
  });
  made.setAttribute("aria-label", `enlarge ${image.name}`);
  return element("figure", {}, made, element("figcaption", {}, caption));
}

/** Creates the container of a gallery's cards, and a function that shows a message and cards in it. */
function board() {
  const said = element("p", { class: "quiet", role: "status" });
  const cards = element("div", { class: "cards" });
  const more = element("div", { class: "more" });
  const fill = portions(cards, more);
  const show = (sentence, makers) => {
    said.textContent = sentence;
    fill(makers);
  };
  return { cards, parts: [said, cards, more], show };
}

/** Creates the drop-down lists of sort orders and of classes, given as [index, name]. */
function orderAndClass(state, orders, classes, draw) {
  return [
    choice("order", orders, (event) => {
      state.order = event.target.value;
      draw();
    }),
    choice("class", [["-1", "all classes"], ...classes], (event) => {
      state.wanted = Number(event.target.value);
      draw();
    }),
  ];
}

/** Draws the objects in an image, marking those that at least one of the runs missed. */
function objectsPanel(image, classes, { runs, wanted, least }) {
  const taken = [...runs].map((run) => {
    const hits = (image.found[run] ?? []).filter((box) => box[5] >= least && box[6] >= 0);
    return new Set(hits.map((box) => box[6]));
  });
  const boxes = [...image.truth.entries()]
    .filter(([, box]) => wanted < 0 || box[4] === wanted)
    .map(([place, box]) => [...box.slice(0, 4), classes[box[4]], taken.every((hits) => hits.has(place)) ? "truth" : "missed"]);
  return panel(image, "ground truth", boxes);
}

/** Draws the detections of a run in an image. */
function foundPanel(image, { classes, errors }, run, name, { wanted, least, error }) {
  const boxes = (image.found[run] ?? [])
    .filter((box) => box[5] >= least && (wanted < 0 || box[4] === wanted) && (error < 0 || isError(box, error)))
    .map((box) => [...box.slice(0, 4), `${classes[box[4]]} ${box[5]}`, box[6] >= 0 ? "hit" : "wrong", box[6] >= 0 ? "" : errors[box[7]]]);
  const { hits, found, objects, f1 } = count(image, run, wanted, least);
  return panel(image, `${name}: ${hits} hits of ${objects} objects, ${found - hits} false, F1 ${f1.toFixed(2)}`, boxes);
}

/** Returns whether a detection is an error of a type. */
const isError = (box, error) => box[6] < 0 && box[7] === error;

/** Returns the images with the selected class and error type, in the selected order. */
function sortedImages(images, { runs, wanted, least, order, error }) {
  const kept = [];
  for (const image of images) {
    const has = (run) => (image.found[run] ?? []).some((box) => box[5] >= least && (wanted < 0 || box[4] === wanted) && isError(box, error));
    if (error >= 0 && ![...runs].some(has)) continue;
    const counts = [...runs].map((run) => count(image, run, wanted, least));
    if (wanted >= 0 && !counts.some((one) => one.objects + one.found)) continue;
    kept.push([image, counts.reduce((sum, one) => sum + one.f1, 0) / (counts.length || 1)]);
  }
  const byName = (a, b) => (a[0].name < b[0].name ? -1 : 1);
  const sign = order === "worst" ? 1 : -1;
  kept.sort(order === "name" ? byName : (a, b) => sign * (a[1] - b[1]) || byName(a, b));
  return kept.map(([image]) => image);
}

/** Creates a slider for the minimum score. */
function scoreControl(state, draw) {
  const score = element("output", {}, "0.50");
  return element("label", {}, "score from ", element("input", {
    type: "range", min: "10", max: "95", step: "5", value: "50", "aria-label": "least score",
    oninput: (event) => {
      state.least = Number(event.target.value);
      score.textContent = (state.least / 100).toFixed(2);
      draw();
    },
  }), " ", score);
}

/** Creates a check box that shows or hides a run's detections. */
function runControl(state, run, name, draw) {
  return element("label", {}, element("input", {
    type: "checkbox", checked: state.runs.has(run),
    onchange: (event) => {
      if (event.target.checked) state.runs.add(run);
      else state.runs.delete(run);
      draw();
    },
  }), " ", key(run), name);
}

/** Creates the gallery of the detections in one dataset. */
function detectionGallery(gallery, names) {
  const { images, total, classes } = gallery;
  const state = { wanted: -1, error: -1, least: 50, order: "worst", runs: new Set(gallery.runs.slice(0, 2)) };
  const { cards, parts, show } = board();
  const card = (image) => () => {
    const found = [...state.runs].map((run) => foundPanel(image, gallery, run, names[run], state));
    const panels = element("div", { class: "panels" }, objectsPanel(image, classes, state), ...found);
    return element("div", { class: "card" }, element("p", {}, image.name), panels);
  };
  const part = images.length < total ? ` The page contains the ${images.length} worst and best of the dataset's ${total} images.` : "";
  const draw = () => {
    const kept = sortedImages(images, state);
    cards.style.setProperty("--panels", 1 + state.runs.size);
    show(`${kept.length} images.${part}`, kept.map(card));
  };
  const orders = [["worst", "worst first"], ["best", "best first"], ["name", "by file name"]];
  // Missed objects are not detections. They are marked among the objects.
  const errors = gallery.errors.slice(0, -1).entries();
  const errorControl = choice("error type", [["-1", "all detections"], ...errors], (event) => {
    state.error = Number(event.target.value);
    draw();
  });
  const lists = [...orderAndClass(state, orders, classes.entries(), draw), errorControl];
  const controls = element("div", { class: "controls" }, ...lists, scoreControl(state, draw), labelControl(cards));
  if (gallery.runs.length > 1) controls.append(...gallery.runs.map((run) => runControl(state, run, names[run], draw)));
  draw();
  return [element("h3", {}, gallery.data), controls, ...parts];
}

/** Creates a card with images of one class that were classified as another. */
function confusedCard({ label, taken, count, of, examples }, { classes, images }) {
  const pictures = examples.map(([place, probability]) => {
    const picture = images[place] ? [enlargeableImage(element("img", { src: images[place], alt: `${classes[label]} classified as ${classes[taken]}` }))] : [];
    return element("figure", {}, ...picture, element("figcaption", {}, `${probability}%`));
  });
  const [from, to] = [label, taken].map((place) => element("strong", {}, classes[place]));
  const share = element("span", { class: "quiet" }, `${count} of ${of} images`);
  return element(
    "div",
    { class: "card" },
    element("p", {}, from, " classified as ", to, element("br"), share),
    element("div", { class: "examples" }, ...pictures),
  );
}

/** Creates the gallery of confused classes of one dataset. */
function confusionGallery(gallery, names) {
  const state = { run: gallery.runs[0], wanted: -1, order: "count" };
  const { parts, show } = board();
  const value = { count: (pair) => pair.count, share: (pair) => pair.count / pair.of, sure: (pair) => pair.examples[0]?.[1] ?? 0 };
  const draw = () => {
    const kept = gallery.pairs.filter((pair) => pair.run === state.run && (state.wanted < 0 || pair.label === state.wanted || pair.taken === state.wanted));
    kept.sort((a, b) => value[state.order](b) - value[state.order](a));
    const sentence = kept.length ? `${kept.length} pairs of classes.` : "All images are classified correctly.";
    show(sentence, kept.map((pair) => () => confusedCard(pair, gallery)));
  };
  const involved = [...new Set(gallery.pairs.flatMap((pair) => [pair.label, pair.taken]))].sort((a, b) => a - b);
  const classes = involved.map((place) => [place, gallery.classes[place]]);
  const orders = [["count", "most images first"], ["share", "largest share first"], ["sure", "most confident first"]];
  const controls = element("div", { class: "controls" }, ...orderAndClass(state, orders, classes, draw));
  if (gallery.runs.length > 1) {
    controls.append(choice("run", gallery.runs.map((run) => [run, names[run]]), (event) => {
      state.run = Number(event.target.value);
      draw();
    }));
  }
  draw();
  return [element("h3", {}, gallery.data), controls, ...parts];
}
