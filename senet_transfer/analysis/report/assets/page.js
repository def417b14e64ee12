"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);

/** Draws the curves of a metric for all runs. */
const curve = (metric) =>
  chart({
    title: metric,
    across: "iteration",
    lines: Object.entries(DATA.curves[metric]).map(([run, points]) => ({ name: DATA.runs[run], run: Number(run), points })),
  });

/** Draws the loss, the learning rate and the main evaluation metrics; others can be selected. */
function curves() {
  const place = document.getElementById("charts");
  const known = Object.keys(DATA.curves).sort();
  const main = ["total_loss", "lr", ...known.filter((name) => /\/(AP|AP50|top1_error|top5_error)$/.test(name))].filter((name) => known.includes(name));
  place.append(...main.map(curve));
  const others = known.filter((name) => !main.includes(name));
  if (others.length) {
    const more = element("div");
    const draw = (metric) => {
      const made = curve(metric);
      hideLines(made);
      more.replaceChildren(made);
    };
    place.append(element("div", {}, choice("another metric", others.map((name) => [name, name]), (event) => draw(event.target.value)), more));
    draw(others[0]);
  }
  if (!known.length) place.append(element("p", {}, "There is no metric that changes yet."));
  if (DATA.runs.length > 1) document.getElementById("legend").append(...legend(DATA.runs));
}

/** Draws the reliability diagram of each run and lists the expected calibration errors. */
function calibration(gallery) {
  const lines = Object.entries(gallery.calibration).map(([run, points]) => ({ name: DATA.runs[run], run: Number(run), points }));
  const said = Object.entries(gallery.ece).map(([run, error]) => `${DATA.runs[run]} ${error.toFixed(2)}%`);
  const made = chart({ title: gallery.data, across: "probability", lines, range: [[0, 1], [0, 1]], diagonal: true });
  made.append(element("p", { class: "quiet" }, `Expected calibration error: ${said.join(", ")}`));
  return made;
}

for (const mark of document.querySelectorAll("i[data-run]")) mark.style.background = colour(Number(mark.dataset.run));
curves();
document.querySelectorAll(".diagnostics").forEach((place, number) => place.append(...diagnosticsParts(DATA.diagnostics[number], DATA.runs)));
for (const image of document.querySelectorAll("#excitations img")) enlargeableImage(image);
for (const gallery of DATA.detection) document.getElementById("detection").append(...detectionGallery(gallery, DATA.runs));
for (const gallery of DATA.classification) {
  document.getElementById("confusions").append(...confusionGallery(gallery, DATA.runs));
  document.querySelector("#calibration .charts").append(calibration(gallery));
}
