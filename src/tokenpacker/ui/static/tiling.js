// From a picture to the tiles that the vision encoder reads: tokenpacker/tiling.py and the image processor's mode
// `slice`, in JavaScript. Sizes are [height, width] in pixels, boxes [top, left, bottom, right].

const SIZE_WEIGHT = 0.1; // as in tiling.py, like the two below
const SIZE_HEADROOM = 1.4;
const LONGEST_RELEASED_LINE = 9;
const CHANNELS = 4; // red, green, blue and an alpha that is not used
const MAX_PRECISION = 22; // bits; torch's, for resizing bytes, like the next
const WEIGHT_BITS = 15;

/** Rounds half to even, as Python does. */
function round(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? below + 1 : below;
}

/** Every grid [rows, cols] of at most `maxTiles` tiles, by rows, then columns. */
function tileGrids(maxTiles, gridList) {
  const grids = [];
  for (let rows = 1; rows <= maxTiles; rows++) {
    for (let cols = 1; cols * rows <= maxTiles; cols++) {
      const isLine = Math.min(rows, cols) === 1 && rows * cols > LONGEST_RELEASED_LINE;
      if (gridList === 'all' || !isLine) grids.push([rows, cols]);
    }
  }
  return grids;
}

/** The share of the canvas that the fitted image fills, plus a small term for size. */
function gridScore([height, width], [rows, cols], [tileHeight, tileWidth]) {
  const canvas = [rows * tileHeight, cols * tileWidth];
  const area = canvas[0] * canvas[1];
  const ratio = Math.min(canvas[0] / height, canvas[1] / width);
  const filled = (round(height * ratio) * round(width * ratio)) / area;
  const large = [height * SIZE_HEADROOM, width * SIZE_HEADROOM];
  const overlap = Math.min(canvas[0], large[0]) * Math.min(canvas[1], large[1]);
  return filled + (SIZE_WEIGHT * overlap) / (area + large[0] * large[1] - overlap);
}

/** The grid [rows, cols] with the highest score, the first of equals. */
export function chooseTileGrid(size, tileSize, maxTiles, gridList) {
  let best = null;
  let highest = -Infinity;
  for (const grid of tileGrids(maxTiles, gridList)) {
    const score = gridScore(size, grid, tileSize);
    if (score > highest) [best, highest] = [grid, score];
  }
  return best;
}

/** The largest size within the canvas that keeps the aspect ratio; each side is at least 1. */
export function fitWithin([height, width], [canvasHeight, canvasWidth]) {
  if (canvasHeight / height <= canvasWidth / width) {
    return [canvasHeight, Math.max(1, Math.min(canvasWidth, round(width * (canvasHeight / height))))];
  }
  return [Math.max(1, Math.min(canvasHeight, round(height * (canvasWidth / width)))), canvasWidth];
}

/** Which of `from` pixels each of `to` pixels is made of: {first, count, weights} of a triangle filter. */
function filterWeights(from, to, asFloat32) {
  const f = asFloat32 ? Math.fround : Number; // torch computes the weights of floats in float32
  const scale = f(from / to);
  const support = f(Math.max(scale, 1));
  const size = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(to);
  const count = new Int32Array(to);
  const weights = new Float64Array(to * size);
  for (let i = 0; i < to; i++) {
    const centre = f(scale * f(i + 0.5));
    first[i] = Math.max(Math.trunc(f(f(centre - support) + 0.5)), 0);
    count[i] = Math.min(Math.trunc(f(f(centre + support) + 0.5)), from) - first[i];
    count[i] = Math.max(0, Math.min(count[i], size));
    let total = 0;
    for (let j = 0; j < count[i]; j++) {
      const distance = Math.abs(f(f(f(j + first[i] - centre) + 0.5) * f(1 / support)));
      weights[i * size + j] = f(Math.max(0, 1 - distance));
      total = f(total + weights[i * size + j]);
    }
    for (let j = 0; total && j < count[i]; j++) weights[i * size + j] = f(weights[i * size + j] / total);
  }
  return { first, count, weights, size };
}

/** The weights as whole numbers of 15 bits at most, and the number of bits behind their point; in place. */
function fixPoint(weights) {
  const largest = weights.reduce((most, weight) => Math.max(most, weight), 0);
  let bits = 0;
  while (bits < MAX_PRECISION && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** WEIGHT_BITS) bits++;
  weights.forEach((weight, i) => (weights[i] = Math.trunc(0.5 + weight * 2 ** bits)));
  return bits;
}

/** Resizes the middle axis of (outer, from, inner) values to `to`; bytes stay bytes, floats stay floats. */
function resizeAxis(values, outer, from, to, inner) {
  const isBytes = !(values instanceof Float32Array);
  const { first, count, weights, size } = filterWeights(from, to, !isBytes);
  const bits = isBytes ? fixPoint(weights) : 0;
  const half = isBytes ? 2 ** (bits - 1) : 0;
  const result = isBytes ? new Uint8ClampedArray(outer * to * inner) : new Float32Array(outer * to * inner);
  for (let o = 0, place = 0; o < outer; o++) {
    for (let i = 0; i < to; i++) {
      const start = (o * from + first[i]) * inner;
      for (let k = 0; k < inner; k++, place++) {
        let sum = half;
        for (let j = 0, at = start + k; j < count[i]; j++, at += inner) sum += values[at] * weights[i * size + j];
        result[place] = isBytes ? sum >> bits : sum;
      }
    }
  }
  return result;
}

/** Resizes (height, width, 4) values, first the width and then the height; bilinear, antialiased. */
function resize(values, [height, width], [newHeight, newWidth]) {
  if (newWidth !== width) values = resizeAxis(values, height, width, newWidth, CHANNELS);
  return newHeight === height ? values : resizeAxis(values, 1, height, newHeight, newWidth * CHANNELS);
}

/** Returns a function from (height, width, 4) bytes to floats: mean 0 and deviation 1 by the encoder's statistics. */
function normaliser({ image_mean: mean, image_std: std, rescale_factor: factor }) {
  const f = Math.fround;
  const tables = [0, 1, 2].map((channel) =>
    Float32Array.from({ length: 256 }, (_, level) => {
      const value = factor === 1 / 255 ? f(level / 255) : f(level * f(factor));
      return f(f(value - f(mean[channel])) / f(std[channel]));
    }),
  );
  return (bytes) => {
    const floats = new Float32Array(bytes.length);
    for (let i = 0; i < bytes.length; i += CHANNELS) {
      for (let channel = 0; channel < 3; channel++) floats[i + channel] = tables[channel][bytes[i + channel]];
    }
    return floats;
  };
}

/** The tiles of `picture` {pixels, height, width}, RGBA bytes, as (tiles, 3, h, w) floats; the thumbnail is last. */
export function makeTiles({ pixels, height, width }, grid, processor) {
  const [rows, cols] = grid;
  const [tileHeight, tileWidth] = processor.tile_size;
  const normalise = normaliser(processor);
  const fit = (canvas) => {
    const size = fitWithin([height, width], canvas);
    const grows = size[0] * size[1] >= height * width;
    const resized = (values) => resize(values, [height, width], size);
    return { size, values: grows ? resized(normalise(pixels)) : normalise(resized(pixels)) };
  };
  const numTiles = rows * cols + (rows * cols > 1 ? 1 : 0);
  const tiles = new Float32Array(numTiles * 3 * tileHeight * tileWidth); // 0 is padding
  const put = ({ size, values }, tile, top, left) => {
    for (let y = 0; y < Math.min(tileHeight, size[0] - top); y++) {
      for (let x = 0; x < Math.min(tileWidth, size[1] - left); x++) {
        for (let channel = 0; channel < 3; channel++) {
          const value = values[((top + y) * size[1] + left + x) * CHANNELS + channel];
          tiles[((tile * 3 + channel) * tileHeight + y) * tileWidth + x] = value;
        }
      }
    }
  };
  const whole = fit([rows * tileHeight, cols * tileWidth]);
  for (let tile = 0; tile < rows * cols; tile++) {
    put(whole, tile, Math.floor(tile / cols) * tileHeight, (tile % cols) * tileWidth);
  }
  if (numTiles > 1) put(fit([tileHeight, tileWidth]), numTiles - 1, 0, 0);
  return tiles;
}

/** For each tile {scale, offset}: a place of the image is a place of the tile times scale plus offset. */
export function tileViews(size, [rows, cols], tileSize) {
  const fitted = fitWithin(size, [rows * tileSize[0], cols * tileSize[1]]);
  const scale = [size[0] / fitted[0], size[1] / fitted[1]];
  const views = [];
  for (let tile = 0; tile < rows * cols; tile++) {
    const place = [Math.floor(tile / cols), tile % cols];
    views.push({ scale, offset: place.map((line, axis) => line * tileSize[axis] * scale[axis]) });
  }
  const small = fitWithin(size, tileSize);
  if (rows * cols > 1) views.push({ scale: [size[0] / small[0], size[1] / small[1]], offset: [0, 0] });
  return views;
}
