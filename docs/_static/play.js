// The page `play`: what its controls show. PLAY is in play_data.js, which .ci/site writes.
"use strict";
const at = id => document.getElementById(id);
const colours = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"]; // matplotlib's
const text = () => getComputedStyle(document.body).color;
const plots = [];

// A part of a sprite: a file with pictures in rows and columns.
function show(element, file, column, columns, row, rows, says) {
  element.style.backgroundImage = `url(_static/play/${file})`;
  element.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
  element.style.backgroundPosition =
    `${100 * column / Math.max(1, columns - 1)}% ${100 * row / Math.max(1, rows - 1)}%`;
  element.setAttribute("aria-label", says);
}

function pictureButton(place, name, onClick) {
  const button = document.createElement("button"), image = document.createElement("span");
  const label = document.createElement("span");
  button.type = "button";
  image.className = "play-picture";
  image.setAttribute("role", "img");
  label.textContent = name;
  button.append(image, label);
  button.addEventListener("click", onClick);
  place.append(button);
  return {button, image, label};
}

// A plot as wide as its place, in the colours of the page.
function plot(place, says, data, series, axes, scales, onCursor) {
  const axis = label => ({
    label, stroke: text, grid: {stroke: "#8884", width: 1}, ticks: {stroke: "#8884"},
    size: 55, labelSize: 22,
  });
  const made = new uPlot({
    width: Math.max(200, place.clientWidth), height: 280, scales,
    axes: axes.map(axis), series: [{label: axes[0]}, ...series],
    legend: {live: false}, cursor: {drag: {x: false, y: false}, points: {show: true}},
    hooks: {setCursor: [u => { // uPlot calls it, too, when the cursor is moved by `point`
      const byMouse = u.cursor.event && u.cursor.idx !== null;
      u.cursor.event = null;
      if (byMouse) onCursor(u.cursor.idx);
    }]},
  }, data, place);
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", says);
  new ResizeObserver(() => made.setSize(
    {width: Math.max(200, place.clientWidth), height: 280})).observe(place);
  plots.push(made);
  return made;
}

// Move a plot's cursor, once its data have been drawn.
function point(made, x, y) {
  requestAnimationFrame(() => made.setCursor(
    {left: made.valToPos(x, "x"), top: made.valToPos(y, "y")}, false));
}

function runs() {
  const names = Object.keys(PLAY.runs), prompts = PLAY.prompts, looks = PLAY.runs[names[0]].length;
  let algorithm = names[0], prompt = 0;
  const slider = at("look"), look = () => +slider.value;
  slider.max = looks - 1;
  const byAlgorithm = names.map(name => pictureButton(at("by-algorithm"), name, () => {
    algorithm = name; update();
  }));
  const byPrompt = prompts.map((name, i) => pictureButton(at("by-prompt"), name, () => {
    prompt = i; update();
  }));
  const xs = [...Array(looks).keys()].map(i => 100 * i / (looks - 1));
  const made = plot(
    at("runs-plot"), "Share of right animals in the course of the five runs. The table below has "
    + "the numbers of the evaluation that is chosen.",
    [xs, ...names.map(name => PLAY.runs[name].map(row => 100 * row.right))],
    names.map((name, i) => ({label: PLAY.names[name], stroke: colours[i],
                             width: 2, points: {show: true, size: 6}})),
    ["part of the run, %", "right animals, %"],
    {x: {time: false}}, index => { if (index !== look()) { slider.value = index; update(); } });

  function update() {
    const i = look();
    at("look-says").textContent = i === 0 ? "before training"
      : `${Math.round(xs[i])}% of each run`;
    names.forEach((name, n) => {
      const row = PLAY.runs[name][i], {button, image, label} = byAlgorithm[n];
      show(image, `play_${name}.webp`, i, looks, prompt, prompts.length,
           `${prompts[prompt]}, ${PLAY.names[name]}, epoch ${row.epoch}`);
      label.innerHTML = "";
      label.append(PLAY.names[name], document.createElement("br"), `epoch ${row.epoch}`,
                   document.createElement("br"), `reward ${row.rewards[prompt].toFixed(2)}`);
      button.setAttribute("aria-pressed", name === algorithm);
    });
    prompts.forEach((name, p) => {
      show(byPrompt[p].image, `play_${algorithm}.webp`, i, looks, p, prompts.length,
           `${name}, ${PLAY.names[algorithm]}, epoch ${PLAY.runs[algorithm][i].epoch}`);
      byPrompt[p].button.setAttribute("aria-pressed", p === prompt);
    });
    at("runs-table").replaceChildren(...names.map(name => {
      const row = PLAY.runs[name][i], line = document.createElement("tr");
      [PLAY.names[name], row.epoch, `${Math.round(100 * row.right)}%`, row.reward.toFixed(2),
       row.spread.toFixed(2)].forEach((value, k) => {
        const cell = document.createElement(k ? "td" : "th");
        if (!k) cell.scope = "row";
        cell.textContent = value;
        line.append(cell);
      });
      return line;
    }));
    point(made, xs[i], 100 * PLAY.runs[algorithm][i].right);
  }
  slider.addEventListener("input", update);
  update();
}

function clip() {
  const xs = [...Array(101).keys()].map(i => i / 50);
  const values = id => +at(id).value;
  const surrogate = (ratio, a, e) =>
    Math.min(ratio * a, Math.min(Math.max(ratio, 1 - e), 1 + e) * a);
  const lines = () => [xs, xs.map(x => x * values("advantage")),
                       xs.map(x => surrogate(x, values("advantage"), values("clip")))];
  const made = plot(
    at("clip-plot"), "The surrogate objective over the ratio, with and without the clip. The "
    + "sentence below says what it is at the ratio that is chosen.", lines(),
    [{label: "ρA", stroke: "#888", dash: [6, 4], width: 1},
     {label: "clipped", stroke: colours[0], width: 2}],
    ["ratio ρ", "objective"], {x: {time: false}, y: {range: [-4, 4]}},
    index => { if (Math.abs(xs[index] - values("ratio")) > 1e-9) {
      at("ratio").value = xs[index]; update(); } });

  function update() {
    const a = values("advantage"), e = values("clip"), ratio = values("ratio");
    at("advantage-says").textContent = a.toFixed(1);
    at("clip-says").textContent = e.toFixed(2);
    at("ratio-says").textContent = ratio.toFixed(2);
    const flat = a > 0 ? ratio > 1 + e : ratio < 1 - e;
    at("clip-text").textContent =
      `At ratio ${ratio.toFixed(2)} the objective is ${surrogate(ratio, a, e).toFixed(2)}. `
      + (a === 0 ? "An advantage of 0 says nothing: the gradient is 0."
         : flat ? "Here it is flat: the gradient is 0, and the sample has no effect any more."
         : `Its slope is the advantage, ${a.toFixed(1)}: the update makes this step `
           + (a > 0 ? "more" : "less") + " probable.");
    made.setData(lines());
    point(made, ratio, surrogate(ratio, a, e));
  }
  for (const id of ["advantage", "clip", "ratio"]) at(id).addEventListener("input", update);
  update();
}

function noise() {
  const {timesteps, noise, std} = PLAY.schedule, count = timesteps.length, slider = at("eta");
  const xs = [...Array(count + 1).keys()], eta = () => +slider.value;
  const rows = 1 + (slider.max - slider.min) / slider.step; // of the sprite, one for each η
  const lines = () => [xs, noise, [...std.map(x => x * eta()), null]];
  const made = plot(
    at("noise-plot"), "Noise of the latent after each step, and the standard deviation of the "
    + "noise that the next step adds. The sentence below has the numbers.", lines(),
    [{label: "noise in the latent", stroke: colours[0], width: 2},
     {label: "noise that the next step adds", stroke: colours[1], width: 2}],
    ["steps done", "standard deviation"], {x: {time: false}, y: {range: [0, 1.05]}},
    index => { if (index !== +at("step").value) { at("step").value = index; update(); } });

  function update() {
    const step = +at("step").value;
    at("step-says").textContent = `${step} of ${count}`;
    at("eta-says").textContent = eta().toFixed(2);
    show(at("step-picture"), "play_steps.webp", step, count + 1, eta() / slider.step, rows,
         `a tiger after ${step} of ${count} steps, eta ${eta()}`);
    const share = `${(100 * noise[step] ** 2).toFixed(1)}% of the latent's variance is noise`;
    const before = step ? `After ${step} steps ${share}. `
      : `The latent is drawn as pure noise; for the model, ${share}. `;
    at("noise-text").textContent = before + (step === count ? "This is the picture."
      : `The next step, at timestep ${timesteps[step]}, adds noise of standard deviation `
        + `${(std[step] * eta()).toFixed(3)}.`);
    made.setData(lines());
    point(made, step, noise[step]);
  }
  for (const id of ["step", "eta"]) at(id).addEventListener("input", update);
  update();
}

runs();
clip();
noise();
new MutationObserver(() => plots.forEach(made => made.redraw())).observe(
  document.documentElement, {attributes: true, attributeFilter: ["data-theme"]});
