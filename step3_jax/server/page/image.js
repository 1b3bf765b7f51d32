// Images as data URLs that the server takes.

const FORMATS = ["image/png", "image/jpeg", "image/webp", "image/gif"];
// Nothing finer reaches the model: larger sides are scaled down there too.
const MAX_SIDE = 3024;
const MAX_BYTES = 4 * 2 ** 20;

/** The size that an image is sent in, with sides in the same ratio. */
export function fitSize(width, height, maxSide = MAX_SIDE) {
  const scale = Math.min(1, maxSide / Math.max(width, height));
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** Reads a file; one that is large or of another format is drawn anew. */
export async function readImage(file) {
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "This file"} is no image that this browser can read.`);
  }
  const [width, height] = fitSize(picture.width, picture.height);
  const isSmall = width === picture.width && file.size <= MAX_BYTES;
  if (isSmall && FORMATS.includes(file.type)) return readDataUrl(file);
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  // JPEG has no transparency: on white, as the server does it.
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, width, height);
  return isSmall ? canvas.toDataURL("image/png") : canvas.toDataURL("image/jpeg", 0.92);
}

function readDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
