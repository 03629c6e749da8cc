// Elements without markup: what comes from a server or a user only ever becomes text.

/** An element with properties and children; strings among these become text. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

export const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`;

/** Options of a select, as [value, text] or plain strings. */
export function fill(select, options, chosen = null) {
  const entries = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  select.replaceChildren(...entries.map(([value, textContent]) => element("option", { value, textContent })));
  if (chosen !== null && entries.some(([value]) => value === chosen)) select.value = chosen;
}
