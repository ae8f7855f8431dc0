// A picture file to upright RGBA bytes on white. What cannot be used is refused in one sentence, before it is decoded.

export const MAX_PIXELS = 50_000_000; // 200 MB as bytes; phones have no room for more
const SIGNATURES = [
  ['PNG', /^\x89PNG\r\n\x1a\n/],
  ['JPEG', /^\xff\xd8\xff/],
  ['WebP', /^RIFF[^]{4}WEBP/],
  ['GIF', /^GIF8[79]a/],
];

/** Returns {bitmap, picture: {pixels, height, width}} of a Blob. Throws an Error that says what is wrong. */
export async function readPicture(file, name = 'The file') {
  const head = String.fromCharCode(...new Uint8Array(await file.slice(0, 16).arrayBuffer()));
  if (!SIGNATURES.some(([, pattern]) => pattern.test(head))) {
    throw new Error(`${name} is not a picture that this page reads; give a PNG, JPEG, WebP or GIF file.`);
  }
  const { width, height } = await sizeOf(file, name);
  if (width * height > MAX_PIXELS) {
    const [size, most] = [width * height, MAX_PIXELS].map((pixels) => Math.round(pixels / 1e6));
    throw new Error(
      `${name} is ${height} × ${width}, ${size} million pixels; this page reads ${most}. Shrink it first.`,
    );
  }
  try {
    // Colour profiles are not applied, as in Python; the EXIF orientation is.
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none', imageOrientation: 'from-image' });
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    const context = canvas.getContext('2d', { willReadFrequently: true });
    context.fillStyle = 'white';
    context.fillRect(0, 0, bitmap.width, bitmap.height);
    context.drawImage(bitmap, 0, 0);
    const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
    return { bitmap, picture: { pixels, height: bitmap.height, width: bitmap.width } };
  } catch {
    throw new Error(
      `${name} cannot be decoded; it is damaged, or too large for this browser. Save it anew, or smaller.`,
    );
  }
}

/** {width, height} from the file's header: an image element knows them before anything is decoded. */
async function sizeOf(file, name) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject }));
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    throw new Error(`${name} cannot be read; it is damaged, or too large for this browser. Save it anew, or smaller.`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}
