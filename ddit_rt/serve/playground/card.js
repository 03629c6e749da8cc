// One result as it comes into being: clock, progress, previews, then the picture or film and what was done for it.

import { element, seconds } from "./dom.js";
import { stripOf } from "./strip.js";

const PHASES = ["queued", "encoding", "denoising", "decoding"];

export class Card {
  constructor(title, prompt) {
    this.prompt = prompt;
    this.started = performance.now();
    this.clock = element("span", { className: "clock" });
    this.bar = element("progress", { ariaLabel: `Progress, ${title}` });
    this.line = element("span", { textContent: "Waiting" });
    this.frame = element("div", { className: "frame" });
    this.details = element("div", { className: "details" });
    this.progress = element("p", { className: "progress" }, this.bar, this.line);
    const figure = element("figure", {}, this.frame, element("figcaption", { textContent: prompt }));
    this.node = element("article", { className: "card", ariaLabel: title }, element("h2", {}, title, this.clock));
    this.node.append(figure, this.progress, this.details);
    this.timer = setInterval(() => this.tick(), 100);
    this.url = null;
  }

  tick() {
    this.elapsed = (performance.now() - this.started) / 1000;
    this.clock.textContent = seconds(this.elapsed);
  }

  /** How far the work is, and the same in words; without a number the bar only moves. */
  advance(done, all, text) {
    if (all) Object.assign(this.bar, { max: all, value: done });
    this.line.textContent = text;
  }

  #show(blob, medium) {
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(blob);
    medium.src = this.url;
    this.frame.replaceChildren(medium);
  }

  preview(blob) {
    this.#show(blob, element("img", { className: "preview", alt: `Preview: ${this.prompt}` }));
  }

  picture(blob) {
    this.#show(blob, element("img", { alt: this.prompt }));
  }

  film(blob) {
    const film = element("video", { controls: true, loop: true, muted: true, playsInline: true });
    film.setAttribute("aria-label", this.prompt);
    this.#show(blob, film);
  }

  /** Ends the progress and says what was done; `file` is the name under which the result is saved. */
  finish(ddit, file, actions = []) {
    this.end();
    this.progress.remove();
    const strip = ddit?.steps?.length ? stripOf(ddit.steps) : [];
    const rows = [];
    for (const phase of PHASES) {
      if (typeof ddit?.seconds?.[phase] === "number") rows.push([phase, seconds(ddit.seconds[phase])]);
    }
    rows.push(["whole request", seconds(this.elapsed)]);
    if (typeof ddit?.speedup === "number") rows.push(["FLOP speed-up", `${ddit.speedup.toFixed(2)}x`]);
    if (ddit?.batch > 1) rows.push(["in a batch of", String(ddit.batch)]);
    if (ddit?.seeds?.length) rows.push(["seed", ddit.seeds.join(", ")]);
    if (ddit?.request_id) rows.push(["request", ddit.request_id]);
    const terms = rows.map(([name, value]) =>
      element("div", { className: name === "request" ? "long" : "" }, element("dt", { textContent: name }), element("dd", { textContent: value })),
    );
    const save = element("a", { href: this.url, download: file, textContent: "Save", className: "button" });
    this.details.replaceChildren(
      ...strip,
      element("dl", { className: "numbers" }, ...terms),
      element("p", { className: "actions" }, save, ...actions),
    );
  }

  /** Ends the progress without a result. */
  fail(text) {
    this.end();
    this.bar.remove();
    this.line.textContent = text;
  }

  end() {
    clearInterval(this.timer);
    this.tick();
  }

  /** Frees the picture; the card is gone from the page. */
  close() {
    clearInterval(this.timer);
    if (this.url) URL.revokeObjectURL(this.url);
    this.node.remove();
  }
}
