// The form: what the chosen model offers, what is asked of it, and the runs that follow.

import { sendForJson } from "./api.js";
import { Card } from "./card.js";
import { differenceOf } from "./difference.js";
import { byId, fill, seconds } from "./dom.js";
import { film, picture } from "./runs.js";

const KEY = "ddit_rt.key";
const MAX_SEED = 2 ** 32;

let models = [];
let cards = [];
let running = null;

const chosen = () => models.find((model) => model.id === byId("model").value);
const key = () => byId("key").value.trim();

function tell(text) {
  byId("status").textContent = text;
}

function complain(error) {
  byId("error").textContent = error ? error.message : "";
  byId("error").hidden = !error;
}

async function loadModels() {
  try {
    models = (await sendForJson("v1/models", { key: key() })).data;
    complain(null);
  } catch (error) {
    models = [];
    complain(error);
    if (error.status === 401) byId("key").focus();
  }
  const before = byId("model").value;
  fill(byId("model"), models.map((model) => model.id), before || null);
  showModel();
}

/** Puts the model's own values into the form, and hides what it has not. */
function showModel() {
  const model = chosen();
  byId("generate").disabled = !model || running !== null;
  if (!model) return;
  const { kind, sizes, default_size: size, steps, guidance, speedup, edits, masks, prompts } = model.ddit;
  const { negative_prompt: negative } = model.ddit;
  fill(byId("size"), sizes, size);
  byId("steps").value = steps ?? "";
  byId("guidance").value = guidance ?? "";
  byId("speedup").value = speedup ?? 1;
  showSpeedup();
  fill(byId("examples"), [["", "Choose one"], ...(prompts ?? [])]);
  byId("examples-field").hidden = !prompts?.length;
  if (!byId("prompt").value && prompts?.length) byId("prompt").value = prompts[0];
  const isVideo = kind === "video";
  byId("edit").hidden = !edits;
  byId("mask-field").hidden = !masks;
  if (!edits) byId("image").value = "";
  if (!edits || !masks) byId("mask").value = "";
  showUploads();
  byId("negative-field").hidden = negative === false;
  byId("strength-field").hidden = isVideo;
  byId("seconds-field").hidden = !isVideo;
  byId("compare-field").hidden = isVideo;
}

function showSpeedup() {
  const slider = byId("speedup");
  const text = Number(slider.value) === 1 ? "plain" : `${Number(slider.value)}x`;
  byId("speedup-text").textContent = text;
  slider.setAttribute("aria-valuetext", text);
}

function showUploads() {
  byId("no-image").hidden = !byId("image").files.length && !byId("mask").files.length;
}

/** The uploads of a request by the field that they are sent in; a mask alone is none. */
function filesOf(model) {
  const [image] = byId("image").files;
  const [mask] = byId("mask").files;
  if (!image) return {};
  if (model.ddit.kind === "video") return { input_reference: image };
  return mask ? { image, mask } : { image };
}

/** The fields of a request; what is left empty is the model's to choose. */
function fieldsOf(model, files) {
  const fields = { model: model.id, prompt: byId("prompt").value, size: byId("size").value };
  for (const name of ["steps", "guidance"]) {
    if (byId(name).value !== "") fields[name] = Number(byId(name).value);
  }
  const seed = byId("seed").value;
  fields.seed = seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] % MAX_SEED : Number(seed);
  if (byId("negative").value && model.ddit.negative_prompt !== false) fields.negative_prompt = byId("negative").value;
  if (model.ddit.kind === "video") {
    if (byId("seconds").value) fields.seconds = byId("seconds").value;
  } else if (files.image && byId("strength").value !== "") {
    fields.strength = Number(byId("strength").value);
  }
  return fields;
}

function clear() {
  complain(null);
  tell("");
  for (const card of cards) card.close();
  cards = [];
  byId("difference").hidden = true;
  byId("empty").hidden = true;
}

async function compare(accelerated, plain) {
  const { psnr, draw } = await differenceOf(accelerated.blob, plain.blob);
  const [quick, slow] = [accelerated, plain].map((result) => result.ddit.seconds?.denoising);
  byId("psnr").textContent = psnr === Infinity ? "The pictures are equal" : `PSNR ${psnr.toFixed(1)} dB to plain`;
  byId("times").textContent =
    quick && slow
      ? `Denoising ${seconds(quick)} instead of ${seconds(slow)}: ${(slow / quick).toFixed(2)} times as fast`
      : "";
  const redraw = () => draw(byId("difference-canvas"), Number(byId("gain").value));
  byId("gain").onchange = redraw;
  redraw();
  byId("difference").hidden = false;
}

async function generate() {
  const model = chosen();
  if (running || !model || !byId("form").reportValidity()) return;
  clear();
  running = new AbortController();
  byId("generate").disabled = true;
  byId("stop").disabled = false;
  const files = filesOf(model);
  const fields = fieldsOf(model, files);
  const speedup = Number(byId("speedup").value);
  const both = byId("compare").checked && model.ddit.kind !== "video";
  const speeds = both ? [speedup, 1] : [speedup];
  const make = model.ddit.kind === "video" ? film : picture;
  const results = [];
  try {
    for (const speed of speeds) {
      const title = speed === 1 ? "Plain" : `Accelerated, ${speed}x`;
      const card = new Card(title, fields.prompt);
      cards.push(card);
      byId("difference").before(card.node);
      const say = (text) => tell(`${title}: ${text}`);
      say("asked");
      // one after the other, or they would share the device and neither time would be its own
      const around = { files, key: key(), signal: running.signal, tell: say };
      results.push(await make(card, { ...fields, speedup: speed }, around));
      say(`done in ${seconds(card.elapsed)}`);
    }
    if (both) await compare(...results);
  } catch (error) {
    const stopped = error.name === "AbortError";
    cards.at(-1).fail(stopped ? "Stopped" : "Failed");
    tell(stopped ? "Stopped." : "");
    if (!stopped) complain(error);
  } finally {
    running = null;
    byId("generate").disabled = false;
    byId("stop").disabled = true;
  }
}

function start() {
  byId("key").value = sessionStorage.getItem(KEY) ?? "";
  byId("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, key());
    loadModels();
  });
  byId("model").addEventListener("change", showModel);
  byId("speedup").addEventListener("input", showSpeedup);
  byId("examples").addEventListener("change", () => {
    if (byId("examples").value) byId("prompt").value = byId("examples").value;
  });
  byId("image").addEventListener("change", showUploads);
  byId("mask").addEventListener("change", showUploads);
  byId("no-image").addEventListener("click", () => {
    byId("image").value = "";
    byId("mask").value = "";
    showUploads();
    byId("image").focus();
  });
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    }
  });
  const stop = () => running?.abort();
  byId("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  loadModels();
}

start();
