// What differs between two pictures, as a picture and in decibels.

async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** Two pictures of one size: `psnr` in dB over red, green and blue (Infinity where equal), `draw(canvas, gain)`. */
export async function differenceOf(first, second) {
  const [one, other] = await Promise.all([pixelsOf(first), pixelsOf(second)]);
  if (one.width !== other.width || one.height !== other.height) {
    throw new Error(`The pictures are ${one.width}x${one.height} and ${other.width}x${other.height}`);
  }
  const distances = new Uint8ClampedArray(one.data.length);
  let sum = 0;
  for (let i = 0; i < distances.length; i += 1) {
    if (i % 4 === 3) continue;
    distances[i] = Math.abs(one.data[i] - other.data[i]);
    sum += distances[i] ** 2;
  }
  const mean = sum / (one.width * one.height * 3);
  return {
    psnr: mean ? 10 * Math.log10(255 ** 2 / mean) : Infinity,
    draw(canvas, gain) {
      Object.assign(canvas, { width: one.width, height: one.height });
      const picture = new ImageData(one.width, one.height);
      for (let i = 0; i < distances.length; i += 1) picture.data[i] = i % 4 === 3 ? 255 : gain * distances[i];
      canvas.getContext("2d").putImageData(picture, 0, 0);
    },
  };
}
