// One request from first to last: a picture that streams its previews, or a video job that is asked how far it is.

import { blobOf, events, pause, send, sendForJson, RequestError } from "./api.js";
import { element } from "./dom.js";

const POLL_MS = 1000;
const PREVIEWS = 3;

/** Streams one picture into a card; answers its blob and the server's account of it. */
export async function picture(card, fields, { files, key, signal, tell }) {
  const path = files.image ? "v1/images/edits" : "v1/images/generations";
  const body = { ...fields, n: 1, stream: true, partial_images: PREVIEWS, output_format: "png" };
  const response = await send(path, { method: "POST", fields: body, files, key, signal });
  card.advance(0, 0, "Accepted");
  for await (const event of events(response)) {
    const blob = blobOf(event.b64_json, event.output_format);
    if (event.type.endsWith(".partial_image")) {
      const at = event.ddit?.steps ? `, step ${event.ddit.step} of ${event.ddit.steps}` : "";
      const text = `Preview ${event.partial_image_index + 1}${at}`;
      card.preview(blob);
      card.advance(event.ddit?.step ?? 0, event.ddit?.steps ?? 0, text);
      tell(text);
    } else if (event.type.endsWith(".completed")) {
      card.picture(blob);
      card.finish(event.ddit, `ddit-${event.ddit?.seeds?.[0] ?? event.created_at}.${event.output_format ?? "png"}`);
      return { blob, ddit: event.ddit ?? {} };
    }
  }
  throw new RequestError({ message: "The stream ended before the picture was complete" });
}

/** Makes a film: creates the job, follows it, shows the film. A job that is stopped is deleted. */
export async function film(card, fields, { files, key, signal, tell }) {
  // not stopped before its id is known, or nobody could delete it
  let job = await sendForJson("v1/videos", { method: "POST", fields, files, key });
  const path = `v1/videos/${encodeURIComponent(job.id)}`;
  const remove = () => send(path, { method: "DELETE", key });
  try {
    while (job.status === "queued" || job.status === "in_progress") {
      const text = job.status === "queued" ? "Queued" : `In progress, ${job.progress} %`;
      if (text !== card.line.textContent) tell(text);
      card.advance(job.progress, 100, text);
      await pause(POLL_MS, signal);
      job = await sendForJson(path, { key, signal });
    }
    if (job.status !== "completed") throw new RequestError(job.error ?? { message: `The job is ${job.status}` });
    const content = await send(`${path}/content`, { key, signal });
    card.film(await content.blob());
  } catch (error) {
    if (error.name === "AbortError") await remove();
    throw error;
  }
  const button = element("button", { type: "button", className: "quiet", textContent: "Delete from the server" });
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await remove();
      card.close();
      tell("Deleted");
    } catch (error) {
      button.disabled = false;
      tell(error.message);
    }
  });
  card.finish(job.ddit, `${job.id}.mp4`, [button]);
}
