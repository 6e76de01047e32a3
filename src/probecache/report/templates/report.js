"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const main = document.querySelector("main");
  const [limits, rows] = JSON.parse(main.dataset.layers);
  const styles = main.dataset.styles.split(" ");
  const best = Number(main.dataset.best);
  const byLayer = new Map(rows.map((row) => [row[0], row]));
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const three = (value) => value.toFixed(3);

  const draw = (parent, name, attributes, text) => {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };
  const overlay = (svg) => one("g.overlay", svg) ?? draw(svg, "g", { class: "overlay" });
  const frameOf = (svg) => {
    const frame = one('[id$="-frame"]', svg);
    return frame ? frame.getBBox() : null;
  };
  const within = (value, low, high) => (value - low) / (high - low);
  const figuresOf = (row) => {
    const [layer, area, low, high, checked, accuracy] = row;
    const parts = [`Layer ${layer}: AUROC ${three(area)} [${three(low)}, ${three(high)}]`];
    if (checked !== null) parts.push(`cross-validated on training ${three(checked)}`);
    if (accuracy !== null) parts.push(`accuracy ${(100 * accuracy).toFixed(1)}%`);
    return parts.join(" · ");
  };

  // The layer curve: the nearest layer's figures under the pointer, its ROC on a click.
  const curves = all(".curve svg");
  const readout = one(".readout");
  let chosen = best;

  const point = (row) => {
    readout.textContent = figuresOf(row);
    for (const svg of curves) {
      const frame = frameOf(svg);
      if (!frame || !frame.width) continue;
      const x = frame.x + frame.width * within(row[0], limits[0], limits[1]);
      const y = frame.y + frame.height * (1 - within(row[1], limits[2], limits[3]));
      const layer = overlay(svg);
      layer.replaceChildren();
      draw(layer, "line", { class: "guide", x1: x, x2: x, y1: frame.y, y2: frame.y + frame.height });
      draw(layer, "circle", { class: "spot", cx: x, cy: y, r: 4.5 });
    }
  };
  const nearest = (svg, event) => {
    const frame = frameOf(svg);
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(
      svg.getScreenCTM().inverse(),
    );
    const layer = limits[0] + ((place.x - frame.x) / frame.width) * (limits[1] - limits[0]);
    return rows.reduce((a, b) => (Math.abs(b[0] - layer) < Math.abs(a[0] - layer) ? b : a));
  };

  // The chosen layer's ROC curve and scores.
  const roc = one(".roc svg");
  const scores = one(".scores svg");
  const scoresFrame = scores && frameOf(scores);

  const drawRoc = (row) => {
    const frame = frameOf(roc);
    const layer = overlay(roc);
    layer.replaceChildren();
    if (row[0] === best) return;
    const at = (fpr, tpr) => [
      frame.x + frame.width * within(fpr, -0.01, 1.01),
      frame.y + frame.height * (1 - within(tpr, -0.01, 1.01)),
    ];
    const points = [];
    for (let i = 0; i < row[7].length; i += 2) {
      points.push(at(row[7][i] / 1000, row[7][i + 1] / 1000).map((v) => v.toFixed(1)).join(","));
    }
    draw(layer, "polyline", { class: "chosen-line", points: points.join(" ") });
    for (const [fpr, tpr] of row[8]) {
      const [cx, cy] = at(fpr, tpr);
      draw(layer, "circle", { class: "spot", cx, cy, r: 3.5 });
    }
  };
  const roundTicks = (low, high, most) => {
    const raw = (high - low) / most;
    const size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= raw) ?? raw;
    const ticks = [];
    for (let k = Math.ceil(low / step); k * step <= high && ticks.length < 20; k++) ticks.push(k * step);
    return ticks;
  };
  const drawScores = (row) => {
    const own = one('[id$="-axes_1"]', scores);
    const layer = overlay(scores);
    layer.replaceChildren();
    own.style.display = row[0] === best ? "" : "none";
    if (row[0] === best) return;
    const [low, high, ...groups] = row[9];
    const box = scoresFrame;
    const most = Math.max(1, ...groups.flat());
    const x = (value) => box.x + box.width * within(value, low, high);
    const y = (count) => box.y + box.height * (1 - count / (1.05 * most));
    for (const tick of roundTicks(low, high, 4)) {
      const label = Number(tick.toPrecision(4)).toString().replace("-", "−");
      draw(layer, "line", { class: "tick", x1: x(tick), x2: x(tick), y1: y(0), y2: y(0) + 4 });
      draw(layer, "text", { class: "label", x: x(tick), y: y(0) + 15, "text-anchor": "middle" }, label);
    }
    for (const tick of roundTicks(0, most, 3).filter(Number.isInteger)) {
      draw(layer, "line", { class: "rule", x1: box.x, x2: box.x + box.width, y1: y(tick), y2: y(tick) });
      draw(layer, "text", { class: "label", x: box.x - 6, y: y(tick) + 3, "text-anchor": "end" }, tick);
    }
    groups.forEach((counts, g) => {
      const step = (high - low) / counts.length;
      const path = [`M${x(low)},${y(0)}`];
      counts.forEach((count, i) => path.push(`V${y(count)}H${x(low + (i + 1) * step)}`));
      path.push(`V${y(0)}`);
      const filled = groups.length === 2 || g === groups.length - 1;
      const colour = `var(--${styles[g]})`;
      draw(layer, "path", {
        d: path.join(""), stroke: colour, fill: filled ? colour : "none", "fill-opacity": 0.3,
        "stroke-width": 1.3,
      });
    });
    draw(layer, "line", { class: "tick", x1: box.x, x2: box.x + box.width, y1: y(0), y2: y(0) });
    if (row[6] !== null && row[6] >= low && row[6] <= high) {
      draw(layer, "line", { class: "threshold", x1: x(row[6]), x2: x(row[6]), y1: box.y, y2: y(0) });
    }
  };
  const choose = (row) => {
    chosen = row[0];
    point(row);
    if (roc) drawRoc(row);
    if (scores && scoresFrame) drawScores(row);
    for (const label of all(".chosen-layer")) label.textContent = chosen;
    for (const note of all(".other-layer")) note.hidden = chosen === best;
    for (const tr of all("tr[data-layer]")) {
      tr.classList.toggle("chosen", Number(tr.dataset.layer) === chosen && chosen !== best);
    }
  };
  if (rows.length > 1 && readout) {
    for (const svg of curves) {
      svg.addEventListener("pointermove", (event) => point(nearest(svg, event)));
      svg.addEventListener("pointerleave", () => point(byLayer.get(chosen)));
      svg.addEventListener("click", (event) => choose(nearest(svg, event)));
    }
    const figure = one(".curve");
    figure.tabIndex = 0;
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const next = rows[rows.findIndex((row) => row[0] === chosen) + step];
      if (event.key === "Escape") choose(byLayer.get(best));
      else if (step && next) choose(next);
      else return;
      event.preventDefault();
    });
    for (const tr of all("tr[data-layer]")) {
      tr.addEventListener("click", (event) => {
        if (!event.target.closest("a")) choose(byLayer.get(Number(tr.dataset.layer)));
      });
    }
    for (const button of all("button.back")) {
      button.addEventListener("click", () => choose(byLayer.get(best)));
    }
    main.classList.add("live");
    readout.textContent = figuresOf(byLayer.get(best));
  }

  // Tables whose headings sort them.
  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    all("thead th[data-sort]", table).forEach((th) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...th.childNodes);
      th.append(button);
      button.addEventListener("click", () => {
        const down = th.getAttribute("aria-sort") === "ascending";
        for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
        th.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (tr) => {
          const cell = tr.cells[th.cellIndex].dataset.v;
          return cell === undefined || cell === "" ? NaN : Number(cell);
        };
        const sorted = [...body.rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
          return down ? y - x : x - y;
        });
        body.append(...sorted);
      });
    });
  }

  // The table of prompts: filtered by words, class, and side of the threshold.
  const filter = one(".filter");
  if (filter) {
    filter.hidden = false;
    const [words, group, astray] = ["words", "group", "astray"].map((name) => one(`[name=${name}]`, filter));
    const lines = all("tr[data-g]").map((tr) => [tr, tr.textContent.toLowerCase()]);
    const apply = () => {
      const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const [tr, text] of lines) {
        tr.hidden = !(
          wanted.every((word) => text.includes(word)) &&
          (!group.value || tr.dataset.g === group.value) &&
          (!astray.checked || tr.dataset.a === "1")
        );
        count += !tr.hidden;
      }
      one("output", filter).textContent = `${count} of ${lines.length}`;
    };
    filter.addEventListener("input", apply);
    filter.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  // Tokens: one stop of the Tab key per prompt, arrow keys within it.
  for (const prompt of all(".tokens")) {
    const tokens = all("[tabindex]", prompt);
    tokens.slice(1).forEach((token) => (token.tabIndex = -1));
    prompt.addEventListener("keydown", (event) => {
      const at = tokens.indexOf(document.activeElement);
      const next = tokens[at + ({ ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? NaN)];
      if (!next) return;
      tokens[at].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      event.preventDefault();
    });
  }
})();
