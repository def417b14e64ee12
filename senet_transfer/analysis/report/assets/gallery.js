"use strict";

const PAGE = 24;

/** A drop-down list of [value, text]. */
function choice(label, entries, onchange) {
  const list = element("select", { "aria-label": label, onchange });
  for (const [value, text] of entries) list.append(element("option", { value }, text));
  return list;
}

/** Shows cards in portions, with a button for more. */
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

/** Hits, detections and objects of an image, of one class (-1: all) and from a score on. */
function count(image, run, wanted, least) {
  const objects = image.truth.filter((box) => wanted < 0 || box[4] === wanted);
  const found = (image.found[run] ?? []).filter((box) => box[5] >= least && (wanted < 0 || box[4] === wanted));
  const hits = found.filter((box) => box[6] >= 0).length;
  const both = objects.length + found.length;
  return { objects: objects.length, found: found.length, hits, f1: both ? (2 * hits) / both : 1 };
}

/** A picture with boxes: [left, top, width, height, class name, style]. */
function panel(image, caption, boxes) {
  const size = Math.max(image.width, image.height) / 20;
  const drawing = svg("svg", { viewBox: `0 0 ${image.width} ${image.height}` });
  drawing.append(svg("image", { href: image.src, width: image.width, height: image.height }));
  for (const [left, top, width, height, , style] of boxes) {
    drawing.append(svg("rect", { class: style, x: left, y: top, width, height }));
  }
  for (const [left, top, , , text] of boxes) {
    drawing.append(svg("text", { x: left + 2, y: Math.max(top + size, size), "font-size": size }, text));
  }
  return element("figure", {}, drawing, element("figcaption", {}, caption));
}

/** The gallery of one data set's detections. */
function detectionGallery(gallery, names) {
  const state = { wanted: -1, least: 50, order: "worst", runs: new Set(gallery.runs.slice(0, 2)) };
  const cards = element("div", { class: "cards" });
  const more = element("div", { class: "more" });
  const said = element("p", { class: "quiet", role: "status" });
  const show = portions(cards, more);

  const card = (image) => () => {
    const only = (box) => state.wanted < 0 || box[4] === state.wanted;
    const runs = [...state.runs];
    const taken = runs.map((run) => new Set((image.found[run] ?? []).filter((box) => box[5] >= state.least && box[6] >= 0).map((box) => box[6])));
    const truth = image.truth
      .map((box, place) => [...box.slice(0, 4), gallery.classes[box[4]], taken.every((hits) => hits.has(place)) ? "truth" : "missed", box[4]])
      .filter((box) => state.wanted < 0 || box[6] === state.wanted);
    const panels = [panel(image, "ground truth", truth)];
    for (const run of runs) {
      const boxes = (image.found[run] ?? [])
        .filter((box) => box[5] >= state.least && only(box))
        .map((box) => [...box.slice(0, 4), `${gallery.classes[box[4]]} ${box[5]}`, box[6] >= 0 ? "hit" : "wrong"]);
      const { hits, found, objects, f1 } = count(image, run, state.wanted, state.least);
      panels.push(panel(image, `${names[run]}: ${hits} hits of ${objects} objects, ${found - hits} false, F1 ${f1.toFixed(2)}`, boxes));
    }
    return element("div", { class: "card" }, element("p", {}, image.name), element("div", { class: "panels" }, ...panels));
  };

  const draw = () => {
    const runs = [...state.runs];
    const kept = [];
    for (const image of gallery.images) {
      const counts = runs.map((run) => count(image, run, state.wanted, state.least));
      if (state.wanted >= 0 && !counts.some((one) => one.objects + one.found)) continue;
      kept.push([image, counts.reduce((sum, one) => sum + one.f1, 0) / (counts.length || 1)]);
    }
    cards.style.setProperty("--panels", 1 + runs.length);
    const sign = state.order === "worst" ? 1 : -1;
    kept.sort(
      state.order === "name"
        ? (a, b) => (a[0].name < b[0].name ? -1 : 1)
        : (a, b) => sign * (a[1] - b[1]) || (a[0].name < b[0].name ? -1 : 1),
    );
    const part = gallery.images.length < gallery.total ? ` Of the data set's ${gallery.total} images the page has the ${gallery.images.length} worst and best.` : "";
    said.textContent = `${kept.length} images.${part}`;
    show(kept.map(([image]) => card(image)));
  };

  const score = element("output", {}, "0.50");
  const controls = element(
    "div",
    { class: "controls" },
    choice("order", [["worst", "worst first"], ["best", "best first"], ["name", "by file name"]], (event) => {
      state.order = event.target.value;
      draw();
    }),
    choice("class", [["-1", "all classes"], ...gallery.classes.map((name, place) => [place, name])], (event) => {
      state.wanted = Number(event.target.value);
      draw();
    }),
    element("label", {}, "score from ", element("input", {
      type: "range", min: "10", max: "95", step: "5", value: "50", "aria-label": "least score",
      oninput: (event) => {
        state.least = Number(event.target.value);
        score.textContent = (state.least / 100).toFixed(2);
        draw();
      },
    }), " ", score),
  );
  if (gallery.runs.length > 1) {
    for (const run of gallery.runs) {
      controls.append(element("label", {}, element("input", {
        type: "checkbox", checked: state.runs.has(run),
        onchange: (event) => {
          if (event.target.checked) state.runs.add(run);
          else state.runs.delete(run);
          draw();
        },
      }), " ", key(run), names[run]));
    }
  }
  draw();
  return [element("h3", {}, gallery.data), controls, said, cards, more];
}

/** The gallery of one data set's confused classes. */
function confusionGallery(gallery, names) {
  const state = { run: gallery.runs[0], wanted: -1, order: "count" };
  const cards = element("div", { class: "cards" });
  const more = element("div", { class: "more" });
  const said = element("p", { class: "quiet", role: "status" });
  const show = portions(cards, more);
  const card = (pair) => () => {
    const pictures = pair.examples.map(([place, probability]) => {
      const text = `${probability}%`;
      const source = gallery.images[place];
      return element("figure", {}, ...(source ? [element("img", { src: source, alt: gallery.classes[pair.label] })] : []), element("figcaption", {}, text));
    });
    return element(
      "div",
      { class: "card" },
      element("p", {}, element("strong", {}, gallery.classes[pair.label]), " taken for ", element("strong", {}, gallery.classes[pair.taken]), element("br"), element("span", { class: "quiet" }, `${pair.count} of ${pair.of} images`)),
      element("div", { class: "examples" }, ...pictures),
    );
  };
  const value = { count: (pair) => pair.count, share: (pair) => pair.count / pair.of, sure: (pair) => pair.examples[0]?.[1] ?? 0 };
  const draw = () => {
    const kept = gallery.pairs.filter((pair) => pair.run === state.run && (state.wanted < 0 || pair.label === state.wanted || pair.taken === state.wanted));
    kept.sort((a, b) => value[state.order](b) - value[state.order](a));
    said.textContent = kept.length ? `${kept.length} pairs of classes.` : "No images are taken for another class.";
    show(kept.map(card));
  };
  const involved = [...new Set(gallery.pairs.flatMap((pair) => [pair.label, pair.taken]))].sort((a, b) => a - b);
  const controls = element(
    "div",
    { class: "controls" },
    choice("order", [["count", "most images first"], ["share", "largest share first"], ["sure", "surest first"]], (event) => {
      state.order = event.target.value;
      draw();
    }),
    choice("class", [["-1", "all classes"], ...involved.map((place) => [place, gallery.classes[place]])], (event) => {
      state.wanted = Number(event.target.value);
      draw();
    }),
  );
  if (gallery.runs.length > 1) {
    controls.append(choice("run", gallery.runs.map((run) => [run, names[run]]), (event) => {
      state.run = Number(event.target.value);
      draw();
    }));
  }
  draw();
  return [element("h3", {}, gallery.data), controls, said, cards, more];
}
