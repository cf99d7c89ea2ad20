"use strict";
// Draws the charts of a report with uPlot: when they come into view, again when the axis, the
// colours or the width change, and all of them for printing. All texts are set as text.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [14, 4, 4, 4]];
  const HEIGHT = 220, PRINT_WIDTH = 330;
  const controls = document.getElementById("controls");
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const chosen = (name) => controls.querySelector(`input[name="${name}"]:checked`)?.value;
  const isOn = (name, value) =>
    !!controls.querySelector(`input[name="${name}"][value="${value}"]:checked`);
  const faint = (colour, share) => `color-mix(in srgb, ${colour} ${share}%, transparent)`;

  function short(x) {
    if (x == null || !isFinite(x)) return "-";
    const size = Math.abs(x);
    if (size >= 1e15 || (size < 1e-3 && size > 0)) return x.toExponential(2).replace("e+", "e");
    for (const [least, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "K"]])
      if (size >= least) return +(x / (least === 1e4 ? 1e3 : least)).toPrecision(3) + letter;
    return String(+x.toPrecision(4));
  }

  // How long a step is on the chosen axis; null where a run does not say.
  const unitOf = (run) => ({ steps: 1, tokens: run.tokens, flops: run.flops })[chosen("x")];
  const xName = () => ({ steps: "steps", tokens: "tokens", flops: "model FLOPs" })[chosen("x")];

  function marksOf(runs) {
    return runs.flatMap((number) => {
      const run = page.runs[number], unit = unitOf(run);
      if (unit == null) return [];
      return run.marks
        .filter((mark) => isOn("mark", mark[1]))
        .map(([step, kind, letter, text]) => ({ x: step * unit, step, kind, letter, text, number }));
    }).sort((a, b) => a.x - b.x);  // letters keep their distance from the one to their left
  }

  function drawMarks(u, marks) {
    const { ctx } = u, { left, top, width, height } = u.bbox, ratio = devicePixelRatio;
    const taken = {};
    ctx.save();
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    for (const mark of marks) {
      const x = Math.round(u.valToPos(mark.x, "x", true));
      if (x < left || x > left + width) continue;
      const colour = page.runs.length > 1 ? css(`--c${mark.number % 8}`) : css("--soft");
      const short = mark.kind === "save";
      ctx.strokeStyle = faint(colour, 65);
      ctx.lineWidth = ratio;
      ctx.setLineDash(short ? [] : [3 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, short ? top + height - 8 * ratio : top);
      ctx.lineTo(x, top + height);
      ctx.stroke();
      if (short || x < (taken.end ?? -1)) continue;
      taken.end = x + 11 * ratio;
      ctx.fillStyle = colour;
      ctx.fillText(mark.letter, x, top - 3 * ratio);
    }
    ctx.restore();
  }

  function nearMark(u, marks) {
    const at = u.cursor.left;
    if (at == null || at < 0) return "";
    const near = marks
      .map((mark) => [Math.abs(u.valToPos(mark.x, "x") - at), mark])
      .filter(([far]) => far < 6)
      .sort((a, b) => a[0] - b[0]);
    return near.slice(0, 3).map(([, m]) => `step ${m.step.toLocaleString("en")}: ${m.text}`).join(" · ");
  }

  function axes(withGrid) {
    const line = css("--line"), font = "12px system-ui, sans-serif";
    const base = { stroke: css("--soft"), font, ticks: { stroke: line, size: 4 } };
    const grid = withGrid ? { stroke: line, width: 1 } : { show: false };
    const values = (u, splits) => splits.map((x) => (x == null ? "" : short(x)));
    return [
      { ...base, grid, values, space: 64, size: 26, label: xName(), labelSize: 18, labelGap: 0, labelFont: font },
      { ...base, grid, values, size: 52 },
    ];
  }

  const frame = (width, hooks, extra) => ({
    width, height: HEIGHT, pxAlign: 0, padding: [16, 12, 0, 0],
    scales: { x: { time: false } }, hooks, ...extra,
  });

  function lines(chart, place, width, say) {
    const several = page.runs.length > 1;
    const anyAbove = chart.lines.some((line) => line.mean.some((y) => y > 0));
    const isLog = anyAbove && chart.log !== isOn("y", "log");
    const shown = chart.lines.filter((line) => unitOf(page.runs[line.run]) != null);
    if (!shown.length) return null;
    const series = [{}], bands = [], tables = [], bars = [];
    const positive = (xs) => (isLog ? xs.map((x) => (x > 0 ? x : null)) : xs);
    shown.forEach((line, index) => {
      const n = several ? line.run : index, colour = css(`--c${n % 8}`);
      const dash = DASHES[(n + Math.floor(n / 8)) % DASHES.length];
      const at = line.at.map((step) => step * unitOf(page.runs[line.run]));
      const table = [at, positive(line.mean)];
      series.push({
        label: line.label, stroke: colour, width: 1.75, dash, spanGaps: true,
        points: { size: 5, fill: colour, stroke: colour, ...(line.errors && { show: true, size: 7 }) },
        value: (u, value, own, i) => {
          let k = i ?? u.data[0].length - 1;
          while (k > 0 && u.data[own][k] == null) k--;
          return short(u.data[own][k]);
        },
      });
      if (line.low) {
        table.push(positive(line.high), positive(line.low));
        const edge = { class: "edge", stroke: faint(colour, 30), width: 1, points: { show: false }, spanGaps: true };
        series.push({ ...edge }, { ...edge });
        bands.push({ series: [series.length - 2, series.length - 1], fill: faint(colour, 22) });
      }
      if (line.errors) bars.push({ at, line, colour });
      tables.push(table);
    });
    const ends = Math.max(...page.runs.map((run) => (run.last * unitOf(run)) || 0));
    const joined = uPlot.join([...tables, [[0, ends]]]);  // all charts have the same width in steps
    const marks = marksOf([...new Set(shown.map((line) => line.run))]);
    const tips = bars.flatMap(({ line }) => line.mean.flatMap((y, i) => [y - line.errors[i], y + line.errors[i]]));
    const levels = chart.levels.map(([, y]) => y).concat(tips);
    // A spike would flatten all the rest: what is far above most points is cut, and said.
    const sorted = shown.flatMap((line) => line.mean).sort((a, b) => a - b);
    const quantile = (share) => sorted[Math.round(share * (sorted.length - 1))];
    const most = quantile(0.95) + 3 * (quantile(0.95) - quantile(0.05));
    const greatest = Math.max(...shown.map((line) => Math.max(...(line.high ?? line.mean))));
    const isCut = !isLog && most > quantile(0.5) && greatest > most;
    const range = (u, min, max) => {
      if (min == null) return [0, 1];
      const low = Math.min(min, ...levels), high = Math.max(isCut ? Math.min(max, most) : max, ...levels);
      const room = (high - low || Math.abs(high)) * 0.06;
      return [chart.zero ? 0 : low - room, high + room || 1];
    };
    const idle = isCut ? `cut above: it goes up to ${short(greatest)}` : "";
    say(idle);
    const drawLevels = (u) => {
      const { ctx } = u, { left, width: wide } = u.bbox, ratio = devicePixelRatio;
      ctx.save();
      ctx.font = `${11 * ratio}px system-ui, sans-serif`;
      ctx.fillStyle = css("--soft");
      ctx.strokeStyle = css("--soft");
      ctx.lineWidth = ratio;
      for (const [name, y] of chart.levels) {
        const at = Math.round(u.valToPos(y, "y", true));
        ctx.setLineDash([ratio, 3 * ratio]);
        ctx.beginPath();
        ctx.moveTo(left, at);
        ctx.lineTo(left + wide, at);
        ctx.stroke();
        ctx.textAlign = "right";
        ctx.fillText(name, left + wide - 4 * ratio, at - 3 * ratio);
      }
      ctx.setLineDash([]);
      for (const { at, line, colour } of bars) {
        ctx.strokeStyle = colour;
        ctx.lineWidth = 1.5 * ratio;
        at.forEach((x, i) => {
          if (!line.errors[i]) return;
          const px = u.valToPos(x, "x", true);
          ctx.beginPath();
          ctx.moveTo(px, u.valToPos(line.mean[i] - line.errors[i], "y", true));
          ctx.lineTo(px, u.valToPos(line.mean[i] + line.errors[i], "y", true));
          ctx.stroke();
        });
      }
      ctx.restore();
    };
    const hooks = {
      drawAxes: [(u) => drawMarks(u, marks)],
      draw: [drawLevels],
      ready: [(u) => u.setLegend({ idx: joined[0].length - 1 })],
      setCursor: [
        (u) => {
          if (u.cursor.idx == null) u.setLegend({ idx: joined[0].length - 1 });
          say(nearMark(u, marks) || idle);
        },
      ],
      setSeries: [
        (u, index, options) => {
          if (index == null || options.show == null) return;
          for (let k = index + 1; k < series.length && series[k].class === "edge"; k++)
            if (u.series[k].show !== options.show) u.setSeries(k, { show: options.show });
        },
      ],
    };
    const y = isLog ? { distr: 3 } : { range };
    const extra = {
      series, bands, axes: axes(true), scales: { x: { time: false }, y },
      legend: { markers: { width: 3, dash: (u, i) => (u.series[i].dash?.length ? "dashed" : "solid") } },
      cursor: { points: { size: 7 }, drag: { x: true, y: false } },
    };
    series[0] = { label: xName(), value: (u, x) => short(x ?? joined[0].at(-1)) };
    return new uPlot(frame(width, hooks, extra), joined, place);
  }

  const mix = (from, to, share) => from.map((x, i) => Math.round(x + (to[i] - x) * share));
  function palette(fair) {
    const [none, low, even, high] = ["none", "low", "even", "high"].map((name) =>
      css(`--load-${name}`).split(" ").map(Number));
    return Array.from({ length: 256 }, (_, x) => {
      if (x === 0) return none;
      return x < fair ? mix(even, low, (fair - x) / fair) : mix(even, high, (x - fair) / fair);
    });
  }

  function loads(chart, place, width, say) {
    const unit = unitOf(page.runs[chart.run]);
    if (unit == null) return null;
    const cells = Uint8Array.from(atob(chart.cells), (c) => c.charCodeAt(0));
    const columns = chart.at.length, E = chart.experts, colours = palette(chart.fair);
    const image = new ImageData(columns, E);
    for (let x = 0; x < columns; x++)
      for (let e = 0; e < E; e++) {
        const [r, g, b] = colours[cells[x * E + e]];
        image.data.set([r, g, b, 255], 4 * ((E - 1 - e) * columns + x));
      }
    const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: E });
    canvas.getContext("2d").putImageData(image, 0, 0);
    const at = chart.at.map((step) => step * unit), marks = marksOf([chart.run]);
    const left = (i) => (i ? at[i - 1] : 0), ends = Math.max(...page.runs.map((run) => run.last * unitOf(run) || 0));
    const paint = (u) => {
      const { ctx } = u, y0 = u.valToPos(E + 0.5, "y", true), y1 = u.valToPos(0.5, "y", true);
      ctx.save();
      ctx.beginPath();
      ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
      ctx.clip();
      ctx.imageSmoothingEnabled = false;
      for (let i = 0; i < columns; i++) {
        const x0 = Math.floor(u.valToPos(left(i), "x", true)), x1 = Math.ceil(u.valToPos(at[i], "x", true));
        ctx.drawImage(canvas, i, 0, 1, E, x0, y0, Math.max(x1 - x0, 1), y1 - y0);
      }
      ctx.restore();
    };
    const tell = (u) => {
      const { left: x, top } = u.cursor;
      if (x == null || x < 0) return say("");
      const value = u.posToVal(x, "x"), expert = Math.round(u.posToVal(top, "y"));
      const i = at.findIndex((end) => value <= end);
      if (i < 0 || expert < 1 || expert > E) return say("");
      const cell = cells[i * E + expert - 1];
      const times = cell ? `${+(2 ** ((cell - chart.fair) / chart.octave)).toPrecision(2)} times an even share` : "no token";
      const near = nearMark(u, marks);
      say(`expert ${expert}, step ${chart.at[i].toLocaleString("en")}: ${times}${near && ` · ${near}`}`);
    };
    const hooks = { drawAxes: [paint, (u) => drawMarks(u, marks)], setCursor: [tell] };
    const extra = {
      series: [{}, { show: false }], axes: axes(false), legend: { show: false },
      scales: { x: { time: false, range: (u, min, max) => [min, max] }, y: { range: [0.5, E + 0.5] } },
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false } },
    };
    return new uPlot(frame(width, hooks, extra), [[0, ...at, ends], [1, ...at.map(() => E), E]], place);
  }

  const views = [...document.querySelectorAll("figure[data-chart]")].map((figure) => {
    const place = figure.querySelector(".plot"), output = figure.querySelector("output");
    const chart = page.charts[+figure.dataset.chart];
    const view = { place, plot: null, width: 0 };
    view.draw = (width) => {
      view.plot?.destroy();
      view.plot = null;
      place.textContent = "";
      view.width = width;
      if (width < 40) return;
      const make = chart.kind === "loads" ? loads : lines;
      view.plot = make(chart, place, width, (text) => (output.textContent = text));
      if (!view.plot) place.textContent = `not known by ${xName()}`;
    };
    return view;
  });
  const byPlace = new Map(views.map((view) => [view.place, view]));
  const seen = new Set();
  const redraw = () => seen.forEach((view) => view.draw(view.place.clientWidth));
  const inView = new IntersectionObserver(
    (entries) =>
      entries.forEach((entry) => {
        const view = byPlace.get(entry.target);
        if (!entry.isIntersecting || seen.has(view)) return;
        seen.add(view);
        view.draw(view.place.clientWidth);
      }),
    { rootMargin: "400px" },
  );
  const resized = new ResizeObserver((entries) =>
    entries.forEach(({ target }) => {
      const view = byPlace.get(target);
      const width = target.clientWidth;
      if (!seen.has(view) || width === view.width || root.classList.contains("print")) return;
      if (view.plot && width >= 40) {
        view.width = width;
        view.plot.setSize({ width, height: HEIGHT });
      } else view.draw(width);
    }),
  );
  views.forEach((view) => {
    inView.observe(view.place);
    resized.observe(view.place);
  });
  controls.addEventListener("change", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    root.classList.add("print");
    views.forEach((view) => view.place.clientWidth && view.draw(PRINT_WIDTH));
  });
  addEventListener("afterprint", () => {
    root.classList.remove("print");
    views.forEach((view) => view.place.clientWidth && view.draw(view.place.clientWidth));
  });
})();
