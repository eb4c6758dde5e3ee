// The page: what is chosen, what keys do, and when what is drawn.

/** @typedef {{name: string, state: string, alarms: string[], remarks: string[], missing: string[],
 *   shown: number, recorded: number, is_credit_known: boolean}} Run */
/** @type {{reload_s: number|null, runs: Run[], summary: [string, string[]][], charts: Chart[]}} */
const VALUES = JSON.parse(document.getElementById("values")?.textContent ?? "");

/** @template {HTMLElement} T @param {string} id @returns {T} */
const byId = (id) => /** @type {T} */ (document.getElementById(id));

function writeSummary() {
  const [head, ...rows] = VALUES.summary;
  byId("summary-table").append(
    el("thead", {}, el("tr", {}, el("th", {}, ""), ...head[1].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...rows.map(([name, values]) =>
      el("tr", {}, el("th", { scope: "row" }, name), ...values.map((value) => el("td", {}, value))))));
  for (const run of VALUES.runs) {
    for (const [kind, title, lines] of /** @type {[string, string, string[]][]} */ ([
      ["alarm", `${run.name} stopped`, run.alarms], ["missing", `${run.name}: not everything is there`, run.missing]])) {
      if (lines.length) byId("notes").append(el("div", { class: `note ${kind}`, role: "note" }, el("b", {}, title), el("ul", {}, ...lines.map((l) => el("li", {}, l)))));
    }
    if (run.remarks.length) {
      byId("notes").append(el("details", {}, el("summary", {}, `log of ${run.name}: ${run.remarks.length} remarks`), el("pre", {}, run.remarks.join("\n"))));
    }
  }
  if (VALUES.reload_s) {
    const box = /** @type {HTMLInputElement} */ (el("input", { type: "checkbox", checked: "" }));
    byId("sections").before(el("label", {}, box, ` reload every ${Math.round(VALUES.reload_s)} s`));
    setInterval(() => box.checked && location.reload(), 1000 * VALUES.reload_s);
  }
}

function drawAll() {
  const chosen = /** @type {HTMLInputElement} */ (document.querySelector("input[name=axis]:checked"));
  drawCharts(VALUES.charts, chosen.value);
  byId("bands").hidden = !VALUES.charts.some((chart) => chart.sets.some((set) => set.lines.some((line) => line.deviation.length)));
  const sections = [...document.querySelectorAll("main section")];
  byId("sections").replaceChildren(...sections.map((section) => el("a", { href: `#${section.id}` }, section.querySelector("h2")?.textContent ?? "")));
}

class Browser {
  /** @param {RunRollouts[]} runs */
  constructor(runs) {
    this.runs = runs;
    /** @type {Entry[]} */ this.entries = [];
    /** @type {Entry[]} */ this.found = [];
    this.numRows = MOST_ROWS;
    /** @type {Map<Element, Rollout>} */ this.shown = new Map();
    this.run = /** @type {HTMLSelectElement} */ (byId("run"));
    this.step = /** @type {HTMLSelectElement} */ (byId("step"));
    this.kind = /** @type {HTMLSelectElement} */ (byId("kind"));
    this.search = /** @type {HTMLInputElement} */ (byId("search"));
    this.list = byId("list");
    this.detail = byId("detail");
    this.run.append(...runs.map((run, i) => el("option", { value: String(i) }, run.run)));
    this.run.addEventListener("change", () => this.chooseRun());
    for (const input of [this.step, this.kind]) input.addEventListener("change", () => this.filter());
    this.search.addEventListener("input", () => this.filter());
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("step-before").addEventListener("click", () => this.moveStep(-1));
    byId("step-after").addEventListener("click", () => this.moveStep(1));
    this.list.addEventListener("click", (event) => this.clicked(event));
    this.list.addEventListener("keydown", (event) => this.keyInList(event));
    this.detail.addEventListener("keydown", (event) => this.keyInTree(event));
    this.detail.addEventListener("pointerover", (event) => this.tell(event));
    this.detail.addEventListener("pointerleave", () => (byId("tip").hidden = true));
    document.addEventListener("keydown", (event) => this.keyAnywhere(event));
    this.chooseRun();
    this.openFromAddress();
  }

  get record() {
    return VALUES.runs[Number(this.run.value)];
  }

  chooseRun() {
    const run = this.runs[Number(this.run.value)];
    this.entries = run.steps.flatMap(({ step, prompts }) => prompts.map((prompt) => entryOf(step, prompt)));
    const before = this.step.value;
    const steps = run.steps.map(({ step, of, prompts }) =>
      el("option", { value: String(step) }, prompts.length < of ? `${step} (${prompts.length} of ${of} prompts)` : String(step)));
    this.step.replaceChildren(...steps, el("option", { value: "all" }, "all"));
    this.step.value = [...this.step.options].some((option) => option.value === before) ? before : (run.steps.at(-1)?.step ?? "all").toString();
    const { shown, recorded } = this.record;
    byId("rollouts-note").textContent = recorded === 0 ? "No rollouts are on record."
      : shown === recorded ? `The whole journal, prompts in all steps: ${recorded}.`
      : `A sample: ${shown} of the journal's ${recorded} prompts. Each step has the same room; in a step, prompts with resets come first, then the journal's order. Curves and depths are of all rollouts.`;
    this.filter();
    this.prepareSearch(this.entries, 0);
  }

  /** While nothing else is to be done, so that the first search need not.
   * @param {Entry[]} entries @param {number} at */
  prepareSearch(entries, at) {
    if (at < entries.length && entries === this.entries) {
      requestIdleCallback((idle) => {
        while (at < entries.length && idle.timeRemaining() > 1) searched(entries[at++]);
        this.prepareSearch(entries, at);
      });
    }
  }

  filter() {
    const words = this.search.value.trim().toLowerCase(), step = this.step.value, kind = this.kind.value;
    this.found = this.entries.filter((entry) => (step === "all" || entry.step === Number(step)) && entry.is[kind]
      && (!words || searched(entry).includes(words)));
    if (kind === "longest") this.found.sort((a, b) => b.length - a.length);
    this.numRows = MOST_ROWS;
    this.writeList();
  }

  writeList() {
    const isOfOneStep = this.step.value !== "all";
    const rows = this.found.slice(0, this.numRows).map((entry, i) => rowOf(entry, i, isOfOneStep));
    rows[0]?.setAttribute("tabindex", "0");
    this.list.setAttribute("tabindex", rows.length ? "-1" : "0");
    this.list.replaceChildren(...rows);
    const rest = this.found.length - rows.length;
    if (rest > 0) this.list.append(el("button", { type: "button", id: "more" }, `show ${Math.min(rest, MOST_ROWS)} more`));
    const prompts = this.found.length === 1 ? "prompt" : "prompts";
    byId("count").textContent = `${this.found.length} ${prompts}`;
  }

  /** @param {Event} event */
  clicked(event) {
    const target = /** @type {Element} */ (event.target);
    if (target.id === "more") {
      this.numRows += MOST_ROWS;
      this.writeList();
    }
    const row = target.closest(".row");
    if (row) this.open(row);
  }

  /** @param {Element} row */
  open(row) {
    const entry = this.found[Number(/** @type {HTMLElement} */ (row).dataset.number)];
    for (const other of this.list.querySelectorAll("[aria-selected=true]")) other.setAttribute("aria-selected", "false");
    row.setAttribute("aria-selected", "true");
    this.rove(this.list, ".row", row, false);
    this.shown = new Map();
    this.detail.replaceChildren(...treeOf(entry, this.shown));
    this.detail.scrollTop = 0;
    location.replace(`#rollout/${this.run.value}/${entry.step}/${encodeURIComponent(entry.prompt.id)}`);
  }

  openFromAddress() {
    const [where, run, step, id] = location.hash.slice(1).split("/");
    if (where === "rollout" && this.runs[Number(run)]) {
      this.run.value = run;
      this.chooseRun();
      this.step.value = step;
      this.filter();
    }
    const at = where === "rollout" ? this.found.findIndex((entry) => entry.prompt.id === decodeURIComponent(id)) : 0;
    const row = this.list.querySelector(`[data-number="${at}"]`);
    if (row && where === "rollout") this.open(row);
  }

  /** @param {number} by */
  moveStep(by) {
    const at = this.step.selectedIndex + by;
    if (at < 0 || at >= this.step.options.length) return;
    this.step.selectedIndex = at;
    this.filter();
  }

  /** Makes one of many the one that Tab reaches.
   * @param {Element} within @param {string} all @param {Element} one @param {boolean} isFocused */
  rove(within, all, one, isFocused = true) {
    for (const other of within.querySelectorAll(`${all}[tabindex="0"]`)) other.setAttribute("tabindex", "-1");
    one.setAttribute("tabindex", "0");
    if (isFocused) /** @type {HTMLElement} */ (one).focus();
  }

  /** Where a key leads among these; none if it is no such key.
   * @param {KeyboardEvent} event @param {Element[]} all @returns {Element|undefined} */
  toward(event, all) {
    const at = all.indexOf(/** @type {Element} */ (document.activeElement));
    const targets = { ArrowDown: Math.min(at + 1, all.length - 1), ArrowUp: Math.max(at - 1, 0), Home: 0, End: all.length - 1 };
    return event.key in targets ? all[targets[/** @type {keyof targets} */ (event.key)]] : undefined;
  }

  /** @param {KeyboardEvent} event */
  keyInList(event) {
    const row = /** @type {Element} */ (event.target).closest(".row");
    const next = this.toward(event, [...this.list.querySelectorAll(".row")]);
    if (next) this.rove(this.list, ".row", next);
    else if (row && ["Enter", " ", "ArrowRight"].includes(event.key)) {
      this.open(row);
      /** @type {HTMLElement|null} */ (this.detail.querySelector("[role=treeitem]"))?.focus();
    } else return;
    event.preventDefault();
  }

  /** @param {KeyboardEvent} event */
  keyInTree(event) {
    const item = /** @type {HTMLElement|null} */ (document.activeElement?.closest("[role=treeitem]"));
    const visible = [...this.detail.querySelectorAll("[role=treeitem]")].filter((each) => !each.parentElement?.closest("[aria-expanded=false]"));
    const next = this.toward(event, visible);
    if (next) this.rove(this.detail, "[role=treeitem]", next);
    else if (item && event.key === "ArrowRight") this.unfold(item);
    else if (item && event.key === "ArrowLeft") this.fold(item);
    else if (event.key === "Escape") /** @type {HTMLElement|null} */ (this.list.querySelector('.row[tabindex="0"]'))?.focus();
    else return;
    event.preventDefault();
  }

  /** @param {HTMLElement} item */
  unfold(item) {
    if (item.getAttribute("aria-expanded") === "false") return item.setAttribute("aria-expanded", "true");
    const first = item.querySelector("[role=treeitem]");
    if (first) this.rove(this.detail, "[role=treeitem]", first);
  }

  /** @param {HTMLElement} item */
  fold(item) {
    const above = item.parentElement?.closest("[role=treeitem]");
    if (item.getAttribute("aria-expanded") === "true") item.setAttribute("aria-expanded", "false");
    else if (above) this.rove(this.detail, "[role=treeitem]", above);
  }

  /** @param {KeyboardEvent} event */
  keyAnywhere(event) {
    const isTyping = /** @type {Element} */ (event.target).matches("input[type=search], select, textarea");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      event.preventDefault();
      this.search.focus();
    } else if (event.key === "n" || event.key === "p") this.moveStep(event.key === "n" ? 1 : -1);
  }

  /** @param {PointerEvent} event */
  tell(event) {
    const tip = byId("tip"), token = /** @type {HTMLElement} */ (event.target).closest(".token");
    const item = token?.closest("[role=treeitem]"), rollout = item && this.shown.get(item);
    tip.hidden = !rollout;
    if (!token || !rollout) return;
    const index = Number(/** @type {HTMLElement} */ (token).dataset.i);
    tip.textContent = saidOf(rollout, { text: "", index, copied: token.classList.contains("copied") }, this.record.is_credit_known);
    const place = token.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${place.bottom + 6 + tip.offsetHeight > innerHeight ? place.top - tip.offsetHeight - 6 : place.bottom + 6}px`;
  }
}

writeSummary();
drawAll();
byId("axis-choice").addEventListener("change", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
// Charts are painted before the rollouts, which are most of the page, are read.
requestAnimationFrame(() => setTimeout(() => {
  new Browser(JSON.parse(byId("rollout-values").textContent ?? ""));
  document.body.dataset.ready = "";
}));
