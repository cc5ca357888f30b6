// λ(t), s(t), A(t) and c(t) as functions of the schedule, k and τ: the formulas of
// s2dm_loss/coefficients.py, and a test holds the two equal.
"use strict";
(() => {
  const T = 1000;
  const MAX_C2 = 100;

  const linspace = (a, b) => Array.from({ length: T }, (_, i) => a + ((b - a) * i) / (T - 1));
  const cosineAlphaBar = (u) => Math.cos((((u + 0.008) / 1.008) * Math.PI) / 2) ** 2;
  const BETAS = {
    linear: linspace(1e-4, 0.02),
    "scaled linear": linspace(Math.sqrt(0.00085), Math.sqrt(0.012)).map((x) => x * x),
    cosine: Array.from({ length: T }, (_, i) =>
      Math.min(1 - cosineAlphaBar((i + 1) / T) / cosineAlphaBar(i / T), 0.999)),
  };

  function tables(schedule, k, tau) {
    let sum = 0;
    const logAlphaBar = BETAS[schedule].map((beta) => (sum += Math.log1p(-beta)));
    const c2 = logAlphaBar.map((value, t) =>
      t < k ? 0 : Math.min(Math.max(Math.expm1(logAlphaBar[t - k] - value), 0), MAX_C2));
    return {
      c: c2.map(Math.sqrt),
      weight: c2.map((x, t) => (t < k ? 1 : tau + (1 - tau) * x)),
      lambda: c2.map((x) => 1 + ((1 - tau) / tau) * x),
      gain: c2.map((x) => tau / (tau + (1 - tau) * x)),
    };
  }

  const SVG = "http://www.w3.org/2000/svg";
  function element(name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // A step of 1, 2 or 5 times a power of ten that cuts `span` into about four.
  function tickStep(span) {
    const raw = span / 4;
    const power = 10 ** Math.floor(Math.log10(raw));
    return power * [1, 2, 5, 10].find((x) => x * power >= raw);
  }

  function draw(svg, values, name) {
    // Drawn at the size it has, so that its text is as large on a phone as on a desk.
    const width = Math.max(svg.clientWidth, 260);
    const [height, left, right, top, bottom] = [260, 52, 22, 12, 34];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const [least, most] = [Math.min(...values), Math.max(...values)];
    const step = tickStep(Math.max(most - least, 1e-6));
    const [low, high] = [step * Math.floor(least / step + 1e-9), step * Math.ceil(most / step - 1e-9)];
    const x = (t) => left + ((width - left - right) * t) / (T - 1);
    const y = (v) => top + ((height - top - bottom) * (high - v)) / (high - low);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (let v = low; v <= high + step / 2; v += step) {
      svg.append(element("line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: "grid" }));
      svg.append(element("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, v.toFixed(digits)));
    }
    for (let t = 0; t <= T; t += 250) {
      svg.append(element("text", { x: x(Math.min(t, T - 1)), y: height - 14, "text-anchor": "middle" }, t));
    }
    svg.append(element("text", { x: left + 10, y: name === "λ(t)" ? top + 14 : height - bottom - 8 }, name));
    svg.append(element("text", { x: width - right, y: height, "text-anchor": "end" }, "t"));
    const points = values.map((v, t) => `${x(t).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
    svg.append(element("polyline", { points, class: "curve" }));
  }

  function build(box) {
    box.innerHTML = `
      <div class="controls">
        <label>schedule <select>${Object.keys(BETAS).map((name) => `<option>${name}</option>`).join("")}</select></label>
        <label>k <input name="k" type="range" min="1" max="200" value="49"><output></output></label>
        <label>τ <input name="tau" type="range" min="0.9" max="0.999" step="0.001" value="0.99"><output></output></label>
      </div>
      <div class="pair">
        <svg role="img" aria-label="λ over t for the chosen schedule, k and τ"></svg>
        <svg role="img" aria-label="s over t for the chosen schedule, k and τ"></svg>
      </div>
      <p class="readout" aria-live="polite"></p>`;
    const select = box.querySelector("select");
    const [k, tau] = box.querySelectorAll("input");
    const update = () => {
      const table = tables(select.value, Number(k.value), Number(tau.value));
      const [lambdas, gains] = box.querySelectorAll("svg");
      draw(lambdas, table.lambda, "λ(t)");
      draw(gains, table.gain, "s(t)");
      k.nextElementSibling.textContent = k.value;
      tau.nextElementSibling.textContent = Number(tau.value).toFixed(3);
      const show = (name) => Math.max(...table[name]).toFixed(4);
      // Where ᾱ comes near 0 the largest values are those of the bound, whatever k is.
      const middle = table.gain[899].toFixed(4);
      box.querySelector(".readout").textContent =
        `s at t = 899 ${middle}, smallest s ${Math.min(...table.gain).toFixed(4)}, ` +
        `largest λ ${show("lambda")}, largest weight A ${show("weight")}, largest c ${show("c")}.`;
    };
    box.addEventListener("input", update);
    window.addEventListener("resize", update);
    update();
  }

  const box = document.getElementById("explorer");
  if (box) build(box);
})();
