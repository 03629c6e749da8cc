// The patch size of every step: a strip of cells, its legend, and the same in words.

import { element } from "./dom.js";

const NAMES = { 0: "skipped", 1: "p (full)" };
const nameOf = (multiple) => NAMES[multiple] ?? `${multiple}p`;
const kindOf = (multiple) => ([0, 1, 2].includes(multiple) ? `size-${multiple}` : "size-4");

/** Runs of equal steps in words, "3 p (full), 1 skipped". */
function inWords(steps) {
  const runs = [];
  for (const multiple of steps) {
    if (runs.length && runs.at(-1).multiple === multiple) runs.at(-1).count += 1;
    else runs.push({ multiple, count: 1 });
  }
  return runs.map(({ multiple, count }) => `${count} ${nameOf(multiple)}`).join(", ");
}

/** Strip and legend of a list of multiples, one per step, 0 where the model was not run. */
export function stripOf(steps) {
  const cells = steps.map((multiple, index) =>
    element("span", { className: kindOf(multiple), title: `step ${index + 1}: ${nameOf(multiple)}` }),
  );
  const strip = element("div", { className: "strip", role: "img" }, ...cells);
  strip.setAttribute("aria-label", `Patch sizes of ${steps.length} steps in order: ${inWords(steps)}`);
  const sizes = [...new Set(steps)].sort((a, b) => (a || Infinity) - (b || Infinity));
  const entries = sizes.map((multiple) =>
    element(
      "li",
      {},
      element("span", { className: `swatch ${kindOf(multiple)}`, ariaHidden: "true" }),
      `${nameOf(multiple)}: ${steps.filter((step) => step === multiple).length}`,
    ),
  );
  return [strip, element("ul", { className: "legend", ariaLabel: "Steps by patch size" }, ...entries)];
}
