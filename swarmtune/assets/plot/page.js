"use strict";
// Draws the charts from the embedded numbers and reads out the values under the pointer. Text from files only ever becomes textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const W = 560, H = 300, LEFT = 58, RIGHT = 12, TOP = 28, BOTTOM = 42;
  const MOST_READ = 8; // lines of the read-out: the curves nearest to the pointer

  const node = (parent, name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.appendChild(made);
    return made;
  };

  const compact = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}G`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return `${+value.toPrecision(5)}`;
  };

  const ticks = (low, high) => {
    const rough = (high - low) / 6 || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
    return found;
  };

  const logTicks = (low, high) => {
    const found = [];
    for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
      for (const factor of [1, 2, 5]) if (factor * power >= low && factor * power <= high) found.push(factor * power);
    return found;
  };

  const range = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

  const scales = (chart) => {
    const xs = chart.series.flatMap((one) => one.x);
    const ys = chart.series.flatMap((one) => one.y).filter((value) => value !== null && !(chart.log && value <= 0));
    let [x0, x1] = range(xs), [y0, y1] = range(ys);
    if (chart.zero) y0 = Math.min(0, y0);
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    const pad = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
    if (chart.log) { y0 /= 1.1; y1 *= 1.1; } else { y1 += pad; if (!chart.zero) y0 -= pad; }
    const along = chart.log ? Math.log : (value) => value;
    return {
      x0, x1, y0, y1,
      x: (value) => LEFT + ((value - x0) / (x1 - x0)) * (W - LEFT - RIGHT),
      y: (value) => H - BOTTOM - ((along(value) - along(y0)) / (along(y1) - along(y0))) * (H - TOP - BOTTOM),
    };
  };

  const pathOf = (one, scale, log) => {
    let path = "", pen = "M";
    one.x.forEach((x, index) => {
      const y = one.y[index];
      if (y === null || (log && y <= 0)) { pen = "M"; return; }
      path += `${pen}${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}`;
      pen = "L";
    });
    return path;
  };

  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };

  const drawAxes = (svg, chart, scale) => {
    for (const value of ticks(scale.x0, scale.x1)) {
      node(svg, "line", { class: "grid", x1: scale.x(value), x2: scale.x(value), y1: TOP, y2: H - BOTTOM });
      node(svg, "text", { x: scale.x(value), y: H - BOTTOM + 15, "text-anchor": "middle" }, compact(value));
    }
    for (const value of chart.log ? logTicks(scale.y0, scale.y1) : ticks(scale.y0, scale.y1)) {
      node(svg, "line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: scale.y(value), y2: scale.y(value) });
      node(svg, "text", { x: LEFT - 6, y: scale.y(value) + 4, "text-anchor": "end" }, compact(value));
    }
    node(svg, "text", { x: (LEFT + W - RIGHT) / 2, y: H - 8, "text-anchor": "middle" }, data.x);
    const middle = (TOP + H - BOTTOM) / 2;
    node(svg, "text", { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }, chart.unit);
  };

  const drawSeries = (svg, one, scale, log) => {
    const style = { fill: "none", stroke: one.colour, "stroke-dasharray": one.dash, "stroke-width": one.faint ? 1 : 1.8, opacity: one.faint ? 0.4 : 1 };
    if (!one.dots) node(svg, "path", { d: pathOf(one, scale, log), ...style });
    if (one.dots || one.joined || one.x.length === 1)
      one.x.forEach((x, index) => {
        const y = one.y[index];
        if (y !== null && !(log && y <= 0)) node(svg, "circle", { cx: scale.x(x), cy: scale.y(y), r: 3, fill: one.colour });
      });
  };

  const follow = (box, svg, chart, scale) => {
    const cursor = node(svg, "line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
    const readout = box.appendChild(document.createElement("div"));
    readout.className = "readout";
    readout.hidden = true;
    const leave = () => { readout.hidden = true; cursor.setAttribute("visibility", "hidden"); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const at = ((event.clientX - frame.left) / frame.width) * W;
      if (at < LEFT || at > W - RIGHT) { leave(); return; }
      const x = scale.x0 + ((at - LEFT) / (W - LEFT - RIGHT)) * (scale.x1 - scale.x0);
      const height = ((event.clientY - frame.top) / frame.height) * H;
      const found = chart.series.filter((one) => !(one.faint && data.runs > 1)).map((one) => {
        const index = nearest(one.x, x), value = one.y[index];
        return { one, index, far: value === null ? Infinity : Math.abs(scale.y(value) - height) };
      });
      const near = new Set([...found].sort((a, b) => a.far - b.far).slice(0, MOST_READ));
      readout.replaceChildren();
      for (const { one, index } of found.filter((each) => near.has(each))) {
        const line = readout.appendChild(document.createElement("div"));
        const dot = line.appendChild(document.createElement("b"));
        dot.textContent = "● ";
        dot.style.color = one.colour;
        line.append(`${one.name}: ${compact(one.y[index])} at ${compact(one.x[index])}`);
      }
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      cursor.setAttribute("visibility", "visible");
      readout.style.left = at < W / 2 ? "" : "4rem";
      readout.style.right = at < W / 2 ? "1rem" : "";
      readout.hidden = false;
    });
  };

  const charts = document.getElementById("charts");
  for (const chart of data.charts) {
    chart.series = chart.series.filter((one) => one.x.length);
    const box = charts.appendChild(document.createElement("div"));
    box.className = "chart";
    const svg = node(box, "svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": chart.title });
    node(svg, "text", { class: "title", x: LEFT, y: 17 }, chart.title);
    if (!chart.series.some((one) => one.y.some((value) => value !== null))) {
      node(svg, "text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, "not recorded");
      continue;
    }
    const scale = scales(chart);
    drawAxes(svg, chart, scale);
    for (const one of chart.series) drawSeries(svg, one, scale, chart.log);
    follow(box, svg, chart, scale);
  }
  // Only once everything is drawn: until then, and without scripts, the picture shows the same.
  document.getElementById("picture").hidden = true;
})();
