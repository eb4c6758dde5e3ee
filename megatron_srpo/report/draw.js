// Charts: the values of charts.py -> uPlot. Colours come from page.css and follow its scheme.

/** @typedef {{name: string, mean: (number|null)[], deviation: (number|null)[]}} Line */
/** @typedef {{experiment: string, x: Record<string, (number|null)[]>, lines: Line[]}} Lines */
/** @typedef {{id: string, section: string, title: string, unit: string, kind: string, sets: Lines[]}} Chart */
/** @typedef {{name: string, x: number[], y: (number|null)[], kind: "line"|"low"|"high", order: number}} Series */

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4], [2, 7]];
const DASH_SIGNS = ["———", "- - -", "·····", "—·—·", "— —", "·  ·"]; // in legends, which colour alone would not tell apart
const AXES = { step: "step", tokens: "generated tokens", hours: "hours", depth: "part of the chain that is kept" };
const NUM_COLOURS = 12;
const CHART_HEIGHT = 210;
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });

/** An element; text is only ever text.
 * @param {string} tag @param {Record<string, string>} [attributes] @param {(Node|string)[]} children */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** @param {number|null|undefined} value */
function shortNumber(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (value !== 0 && size < 1e-3) return value.toExponential(1);
  return size >= 1e4 ? compact.format(value) : String(Number(value.toPrecision(4)));
}

/** Where a chart's points stand: its own axis, or the one that was chosen.
 * @param {Chart} chart @param {string} axis */
function axisOf(chart, axis) {
  return axis in chart.sets[0].x ? axis : Object.keys(chart.sets[0].x)[0];
}

/** One table of series for each set: bars stand side by side, areas on top of each other.
 * @param {Chart} chart @param {string} axis @returns {Series[][]} */
function seriesOf(chart, axis) {
  let order = 0;
  return chart.sets.map((set, number) => {
    const shift = chart.kind === "bars" ? ((number + 0.5) / chart.sets.length - 0.5) * 0.08 : 0;
    const x = set.x[axis].map((value) => (value ?? 0) + shift);
    const below = x.map(() => 0);
    return set.lines.flatMap((line) => {
      const own = { name: line.name, x, order: order++ };
      if (chart.sets.length > 1) own.name = set.lines.length > 1 ? `${set.experiment}: ${line.name}` : set.experiment;
      if (chart.kind === "stack") {
        line.mean.forEach((value, i) => (below[i] += value ?? 0));
        return [{ ...own, y: [...below], kind: /** @type {const} */ ("line") }];
      }
      /** @type {Series[]} */
      const made = [{ ...own, y: line.mean, kind: "line" }];
      if (line.deviation.length) {
        for (const [kind, sign] of /** @type {[("low"|"high"), number][]} */ ([["high", 1], ["low", -1]])) {
          const y = line.mean.map((m, i) => (m === null ? null : m + sign * (line.deviation[i] ?? 0)));
          made.push({ ...own, y, kind });
        }
      }
      return made;
    });
  });
}

/** @param {Chart} chart @param {Series} series @param {(number|null)[]} raw @returns {uPlot.Series} */
function styled(chart, series, raw) {
  const style = getComputedStyle(document.documentElement);
  const colour = style.getPropertyValue(`--c${series.order % NUM_COLOURS}`).trim();
  const isLine = series.kind === "line";
  const isArea = chart.kind !== "lines";
  const isDashed = chart.kind === "lines" && chart.sets.flatMap((set) => set.lines).length > 1;
  return {
    label: isDashed ? `${DASH_SIGNS[series.order % DASHES.length]} ${series.name}` : series.name,
    class: isLine ? "line" : "band",
    stroke: isLine ? colour : "transparent",
    fill: isArea ? colour + "90" : undefined,
    width: isLine ? 2 : 0,
    dash: isArea ? [] : DASHES[series.order % DASHES.length],
    spanGaps: true,
    points: { show: isLine && chart.kind === "lines" && raw.length <= 40, size: 5 },
    paths: chart.kind === "bars" ? uPlot.paths.bars?.({ size: [0.85 / chart.sets.length, 60] }) : undefined,
    value: (_, v) => shortNumber(v),
  };
}

/** uPlot's options and data.
 * @param {Chart} chart @param {string} axis @param {number} width
 * @returns {{data: uPlot.AlignedData, options: uPlot.Options}} */
function plotted(chart, axis, width) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), rule = style.getPropertyValue("--rule").trim();
  const tables = seriesOf(chart, axis), all = tables.flat();
  const aligned = tables.map((table) => /** @type {uPlot.AlignedData} */ ([table[0].x, ...table.map((s) => s.y)]));
  const data = aligned.length === 1 ? aligned[0] : uPlot.join(aligned);
  const series = all.map((s) => styled(chart, s, s.y));
  /** @type {uPlot.Band[]} */
  const bands = all.flatMap((s, i) => {
    if (chart.kind === "stack") return i ? [{ series: [i + 1, i] }] : [];
    return s.kind === "high" ? [{ series: [i + 1, i + 2], fill: series[i - 1].stroke + "33" }] : [];
  });
  if (chart.kind === "stack") {  // the legend says how much each is, not how high it reaches
    chart.sets[0].lines.forEach((line, i) => {
      series[i].value = (_, __, ___, at) => shortNumber(at === null ? null : line.mean[at]);
    });
  }
  const look = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 } };
  return {
    data,
    options: {
      width,
      height: CHART_HEIGHT,
      scales: {
        x: { time: false, range: chart.kind === "bars" ? [0, 1] : undefined },
        y: { range: (_, low, high) =>
          low === null ? [0, 1] : [Math.min(0, low * 1.05), high > 0 ? high * 1.05 : low < 0 ? 0 : 1] },
      },
      axes: [
        { ...look, label: AXES[/** @type {keyof AXES} */ (axis)], labelSize: 20, size: 34, space: 60, values: (_, ticks) => ticks.map(shortNumber) },
        { ...look, size: 58, values: (_, ticks) => ticks.map(shortNumber) },
      ],
      series: [{ label: AXES[/** @type {keyof AXES} */ (axis)], value: (_, v) => shortNumber(v) }, ...series],
      bands,
      cursor: { sync: { key: axis }, points: { size: 7 }, focus: { prox: 16 } },
      focus: { alpha: chart.kind === "lines" ? 0.25 : 1 },
      legend: { live: true },
      hooks: {  // without a pointer, the legend says how it ended
        setCursor: [(u) => u.cursor.idx === null && chart.kind !== "bars" && u.setLegend({ idx: data[0].length - 1 })],
      },
    },
  };
}

/** The numbers of a chart, as a table.
 * @param {Chart} chart @param {string} axis */
function numbersOf(chart, axis) {
  const tables = chart.sets.map((set) => {
    const bands = set.lines.map((line) => line.deviation.length > 0);
    const heads = set.lines.flatMap((line, i) => (bands[i] ? [line.name, "±"] : [line.name]));
    const rows = set.x[axis].map((x, at) => [x, ...set.lines.flatMap((line, i) =>
      bands[i] ? [line.mean[at], line.deviation[at]] : [line.mean[at]])]);
    return el("table", {},
      el("caption", {}, set.experiment),
      el("thead", {}, el("tr", {}, ...[AXES[/** @type {keyof AXES} */ (axis)], ...heads].map((h) => el("th", {}, h)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((v) => el("td", {}, shortNumber(v)))))));
  });
  return el("div", { class: "scrolls" }, ...tables);
}

/** @param {Chart} chart @param {string} axis */
function figureOf(chart, axis) {
  const own = axisOf(chart, axis);
  const frame = el("div", { class: "frame" });
  const numbers = el("details", { class: "numbers" }, el("summary", {}, "numbers"));
  numbers.addEventListener("toggle", () => numbers.childElementCount < 2 && numbers.append(numbersOf(chart, own)));
  const made = el("figure", { id: chart.id, class: chart.kind },
    el("figcaption", {}, el("strong", {}, chart.title), " ", el("small", {}, chart.unit + (chart.kind === "stack" ? ", from below in the legend's order" : ""))), frame, numbers);
  /** @type {uPlot|null} */
  let plot = null;
  const size = new ResizeObserver(() => {
    const width = frame.clientWidth;
    if (!width) return;
    if (plot) return void plot.setSize({ width, height: CHART_HEIGHT });
    const { options, data } = plotted(chart, own, width);
    plot = new uPlot(options, data, frame);
    if (chart.kind !== "bars") plot.setLegend({ idx: data[0].length - 1 });
  });
  size.observe(frame);
  return made;
}

/** All charts anew, under the headings of their sections.
 * @param {Chart[]} charts @param {string} axis */
function drawCharts(charts, axis) {
  const sections = [...new Set(charts.map((chart) => chart.section))];
  const made = sections.map((name) => {
    const figures = charts.filter((chart) => chart.section === name).map((chart) => figureOf(chart, axis));
    const grid = el("div", { class: "grid" }, ...figures);
    const body = name === "Other" ? el("details", {}, el("summary", {}, "metrics without a chart of their own"), grid) : grid;
    return el("section", { id: name.toLowerCase() }, el("h2", {}, name), body);
  });
  document.getElementById("charts")?.replaceChildren(...made);
}
