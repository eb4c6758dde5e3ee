// The rollout browser: list of prompts, and the tree of the one that is open. What each key of the
// values means is in rollouts.py. Texts of rollouts become text nodes, never markup.

/** @typedef {{k?: number, w: string, a?: string, o?: number, n?: number}} Reset */
/** @typedef {{n: string, v?: number, c?: number, f?: string, k?: number, t: string[], p?: string, r?: number[],
 *   m?: number, u?: string, z?: number, l?: number, x?: Reset, s?: Rollout[]}} Rollout */
/** @typedef {{id: string, q: string, a: string, sol?: string[], b: Rollout[]}} Prompt */
/** @typedef {{run: string, steps: {step: number, of: number, prompts: Prompt[]}[]}} RunRollouts */
/** @typedef {{step: number, prompt: Prompt, all: Rollout[], length: number, text: string,
 *   is: Record<string, boolean>}} Entry */
/** @typedef {{text: string, index: number, copied: boolean}} Token */

const MOST_ROWS = 200;
const SIGNS = { pass: "✓", fail: "✗", none: "?" };

/** @param {Rollout} rollout @returns {"pass"|"fail"|"none"} */
const verdictOf = (rollout) => (rollout.c === undefined ? "none" : rollout.c ? "pass" : "fail");

/** A rollout, and all that came of it.
 * @param {Rollout} rollout @returns {Rollout[]} */
const allOf = (rollout) => [rollout, ...(rollout.s ?? []).flatMap(allOf)];

/** @param {number} step @param {Prompt} prompt @returns {Entry} */
function entryOf(step, prompt) {
  const all = prompt.b.flatMap(allOf);
  const trained = all.filter((rollout) => !rollout.u);
  const length = Math.max(0, ...all.map((rollout) => rollout.t.reduce((sum, text) => sum + text.length, 0)));
  return {
    step, prompt, all, length, text: "",
    is: {
      all: true,
      longest: true,
      pass: all.some((rollout) => rollout.c === 1),
      fail: all.some((rollout) => rollout.c === 0),
      reset: prompt.b.some((root) => root.x?.k !== undefined),
      corrected: all.some((rollout) => rollout.s?.some((suffix) => suffix.c === 1)),
      silent: trained.every((rollout) => rollout.z === 1),
    },
  };
}

/** What a search looks into.
 * @param {Entry} entry */
function searched(entry) {
  const { id, q, a } = entry.prompt;
  entry.text ||= [id, q, a, ...entry.all.map((rollout) => rollout.t.join(""))].join("\n").toLowerCase();
  return entry.text;
}

/** Lengths of tokens; see `packed` in rollouts.py.
 * @param {string} digits */
function unpacked(digits) {
  const lengths = [];
  let length = 0;
  for (const digit of digits) {
    const value = parseInt(digit, 36);
    length += value;
    if (value < 35) {
      lengths.push(length);
      length = 0;
    }
  }
  return lengths;
}

/** Thoughts, divided into tokens; of a suffix, those of the seed come first. Without a tokenizer a
 * thought is one token.
 * @param {Rollout} rollout @param {Rollout[]} seeds the one that was reset last @returns {Token[][]} */
function thoughtsOf(rollout, seeds) {
  const seed = seeds.at(-1);
  const copied = seed ? thoughtsOf(seed, seeds.slice(0, -1)).slice(0, rollout.k ?? 0) : [];
  const lengths = rollout.p === undefined ? null : unpacked(rollout.p);
  let index = rollout.m ?? 0, at = 0;
  const own = rollout.t.map((text, number) => {
    if (!lengths) return [{ text, index, copied: false }];
    /** @type {Token[]} */
    const tokens = [];
    const isLast = number === rollout.t.length - 1;
    for (let done = 0; at < lengths.length && (done < text.length || isLast); at++) {
      tokens.push({ text: text.slice(done, done + lengths[at]), index: index++, copied: false });
      done += lengths[at];
    }
    return tokens;
  });
  return [...copied.map((thought) => thought.map((token) => ({ ...token, copied: true }))), ...own];
}

/** [loss weight, advantage] of a token.
 * @param {Rollout} rollout @param {number} index */
function creditAt(rollout, index) {
  const runs = rollout.r ?? [];
  for (let i = 0, end = 0; i < runs.length; i += 3) {
    end += runs[i];
    if (index < end) return [runs[i + 1], runs[i + 2]];
  }
  return null;
}

/** @param {number} value */
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + shortNumber(Math.abs(value));

/** What is said of a token under the pointer.
 * @param {Rollout} rollout @param {Token} token @param {boolean} isCreditKnown */
function saidOf(rollout, token, isCreditKnown) {
  if (rollout.u) return `not trained: ${rollout.u === "seeds" ? "drawn in search of a failed rollout" : "drawn anew"}`;
  if (!isCreditKnown) return "credit not known: the rule is not the package's own";
  const credit = creditAt(rollout, token.index);
  const [weight, advantage] = credit ?? [0, 0];
  if (token.copied && !weight) return `token ${token.index}: copied, masked, no loss`;
  return `token ${token.index}: advantage ${signed(advantage)}, loss weight ${shortNumber(weight)}`;
}

/** The rollout's own line: everything that colour says is here in words and signs, too.
 * @param {Rollout} rollout */
function headOf(rollout) {
  const verdict = verdictOf(rollout);
  const own = (rollout.r ?? []).length ? rollout.r?.slice(-3) : null;
  const words = [
    rollout.v === undefined ? "" : `reward ${shortNumber(rollout.v)}`,
    own ? `advantage ${signed(own[2])}` : "",
    rollout.z && !rollout.u ? "= group without signal" : "",
    rollout.u === "seeds" ? "not trained: search for a failed one" : rollout.u ? "not trained: drawn anew" : "",
    rollout.l ? "cut by length" : "",
    rollout.f ? `no verdict: ${rollout.f}` : "",
  ];
  return el("div", { class: "head" },
    el("b", { class: `sign ${verdict}` }, `${SIGNS[verdict]} ${verdict === "none" ? "no verdict" : verdict}`),
    el("code", {}, rollout.n), el("span", {}, words.filter(Boolean).join(" · ")));
}

/** @param {Rollout} rollout @param {Rollout[]} seeds */
function textOf(rollout, seeds) {
  const reset = rollout.x;
  const thoughts = thoughtsOf(rollout, seeds).map((tokens, number) => {
    const isBlamed = reset?.k !== undefined && number === (reset.o ?? reset.k);
    const classes = [isBlamed && "blamed", tokens.every((token) => token.copied) && "copied"];
    const spans = tokens.map((token) => {
      const kinds = ["token", token.text === "" && "end", token.copied && "copied"];
      return el("span", { class: kinds.filter(Boolean).join(" "), "data-i": String(token.index) }, token.text);
    });
    const notes = [];
    if (isBlamed) notes.push(el("mark", {}, reset?.o === undefined ? "↶ blamed: reset to before this" : "↶ blamed"));
    if (reset?.o !== undefined && number === reset.k) notes.push(el("mark", {}, "↶ reset moved to before this"));
    return el("li", { class: classes.filter(Boolean).join(" "), value: String(number + 1) }, el("span", { class: "thought" }, ...spans), ...notes);
  });
  return el("ol", { class: "thoughts" }, ...thoughts);
}

const CAUSES = { named: "the policy named the thought", random: "drawn at random", oracle: "the known first error",
  dial: "the known first error, or at random", prompt: "always the prompt", nearer: "another reset went further",
  depth_matched: "a depth that the policy would have named", unparsed: "the answer could not be parsed",
  no_error: "the policy found no error", too_long: "the question was too long" };

/** @param {Reset} reset */
function resetOf(reset) {
  const cause = CAUSES[/** @type {keyof CAUSES} */ (reset.w)] ?? reset.w;
  const where = reset.k === undefined ? "nothing was reset" : reset.k === 0 ? "back to the prompt" : `back to before thought ${reset.k + 1}`;
  const parts = [el("p", {}, el("b", {}, `↶ ${where}`), ` · ${cause}`)];
  if (reset.a !== undefined) {
    parts.push(el("p", {}, "Asked which thought went wrong first, the policy said:"), el("pre", { class: "localization" }, reset.a));
  }
  return el("div", { class: "reset" }, ...parts);
}

/** @param {Rollout} rollout @param {Rollout[]} seeds @param {Map<Element, Rollout>} shown */
function branchOf(rollout, seeds, shown) {
  const verdict = verdictOf(rollout);
  const item = el("div", { role: "treeitem", tabindex: "-1", class: `branch ${verdict}`, "aria-level": String(seeds.length + 1),
    "aria-label": `${rollout.n}, ${verdict === "none" ? "no verdict" : verdict}` }, headOf(rollout), textOf(rollout, seeds));
  shown.set(item, rollout);
  if (rollout.x) item.append(resetOf(rollout.x));
  if (rollout.s) {
    item.setAttribute("aria-expanded", "true");
    const rights = rollout.s.filter((suffix) => suffix.c === 1).length;
    item.append(el("div", { role: "group", class: "suffixes" },
      el("p", {}, `${rights} of ${rollout.s.length} suffixes are right`), ...rollout.s.map((suffix) => branchOf(suffix, [...seeds, rollout], shown))));
  }
  return item;
}

/** @param {Entry} entry @param {Map<Element, Rollout>} shown */
function treeOf(entry, shown) {
  const { id, q, a, sol, b } = entry.prompt;
  const facts = el("dl", { class: "prompt" }, el("dt", {}, "prompt"), el("dd", {}, q), el("dt", {}, "answer"), el("dd", {}, a));
  if (sol) facts.append(el("dt", {}, "right thoughts"), el("dd", {}, sol.map((thought, i) => `${i + 1} ${thought}`).join("  ")));
  const seeds = b.filter((root) => root.x), rest = b.filter((root) => !root.x);
  const tree = el("div", { role: "tree", "aria-label": `rollouts of ${id}` }, ...[...seeds, ...rest].map((root) => branchOf(root, [], shown)));
  tree.querySelector("[role=treeitem]")?.setAttribute("tabindex", "0");
  return [el("h3", {}, `${id}, step ${entry.step}`), facts, tree];
}

/** ✗↶3(✓✗): wrong, reset to before thought 3, what came of it.
 * @param {Rollout} rollout @returns {string} */
function markOf(rollout) {
  const suffixes = rollout.s ? `(${rollout.s.map(markOf).join("")})` : "";
  return SIGNS[verdictOf(rollout)] + (rollout.x?.k === undefined ? "" : `↶${rollout.x.k + 1}`) + suffixes;
}

/** @param {Entry} entry @param {number} number @param {boolean} isOfOneStep */
function rowOf(entry, number, isOfOneStep) {
  const marks = entry.prompt.b.map((root) => el("span", { class: verdictOf(root) }, markOf(root)));
  const id = (isOfOneStep ? "" : `${entry.step} · `) + entry.prompt.id;
  return el("div", { role: "option", tabindex: "-1", class: "row", "data-number": String(number), "aria-selected": "false" },
    el("b", {}, id), el("span", { class: "question" }, entry.prompt.q.slice(0, 120)),
    el("span", { class: "marks" }, ...marks, ...(entry.is.silent ? [el("span", { title: "no signal" }, "=")] : [])));
}
