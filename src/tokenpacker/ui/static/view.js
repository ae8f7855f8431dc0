// Draws a picture as the encoder sees it: its tiles, its tokens, and the window behind one token.
import { windowBox } from './sequence.js';
import { fitWithin } from './tiling.js';

const LARGEST = { height: 440, width: 640 }; // of the tiles, in CSS pixels
const THUMBNAIL = 96;
const GAP = 16; // as in style.css
const WINDOW = 168;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
}

/** Gives a canvas its size in CSS pixels, and returns a context that draws in them. */
function prepare(canvas, width, height) {
  const density = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * density), height: Math.round(height * density) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext('2d');
  context.scale(density, density);
  return context;
}

/** Draws lines at places across and down; the last ones are kept inside. */
function drawLines(context, across, down, width, height, thickness) {
  for (const x of across) context.fillRect(Math.min(x, width - thickness), 0, thickness, height);
  for (const y of down) context.fillRect(0, Math.min(y, height - thickness), width, thickness);
}

/** Draws a grid of tiles. Returns a function from a place in CSS pixels to {at: [row, col] of the tile, row, col}. */
function drawPlane(canvas, available, { bitmap, layout, page, show }, grid, chosen) {
  const size = [bitmap.height, bitmap.width];
  const tile = page.processor.tile_size;
  const whole = [grid[0] * tile[0], grid[1] * tile[1]];
  const zoom = Math.min(available.width / whole[1], available.height / whole[0]);
  const [height, width] = whole.map((length) => length * zoom);
  const fitted = fitWithin(size, whole);
  const context = prepare(canvas, width, height);
  context.fillStyle = colour('padding');
  context.fillRect(0, 0, width, height);
  const step = [0, 1].map((axis) => (tile[axis] / page.patch_grid[axis]) * layout.scaleFactor); // of a window
  context.imageSmoothingQuality = 'high';
  if (show === 'tokens') drawMeans(context, bitmap, fitted, step, zoom);
  else context.drawImage(bitmap, 0, 0, fitted[1] * zoom, fitted[0] * zoom);

  const places = (axis, inner) => {
    const found = [];
    for (let line = 0; line < grid[axis]; line++) {
      for (let place = 0; place < layout.tokenGrid[axis]; place++) {
        if ((place === 0) !== inner) found.push((line * tile[axis] + place * step[axis]) * zoom);
      }
    }
    return found;
  };
  context.fillStyle = show === 'tokens' ? colour('card') : 'rgb(60 70 85 / 28%)';
  drawLines(context, places(1, true), places(0, true), width, height, 1);
  context.fillStyle = colour('accent');
  drawLines(context, [...places(1, false), width], [...places(0, false), height], width, height, 2);
  if (chosen) {
    const begin = [chosen.row, chosen.col].map((place, axis) => chosen.at[axis] * tile[axis] + place * step[axis]);
    const end = begin.map((place, axis) => Math.min(place + step[axis], (chosen.at[axis] + 1) * tile[axis]));
    context.strokeStyle = colour('accent');
    context.lineWidth = 4;
    context.strokeRect(begin[1] * zoom, begin[0] * zoom, (end[1] - begin[1]) * zoom, (end[0] - begin[0]) * zoom);
  }
  return (x, y) => {
    const place = [y / zoom, x / zoom].map((at, axis) => Math.max(0, Math.min(at, whole[axis] - 0.001)));
    const at = place.map((pixel, axis) => Math.floor(pixel / tile[axis]));
    const [row, col] = place.map((pixel, axis) => Math.floor((pixel - at[axis] * tile[axis]) / step[axis]));
    return { at, row, col };
  };
}

/** Fills each token with the mean colour of its pixels. */
function drawMeans(context, bitmap, fitted, step, zoom) {
  const [height, width] = fitted.map((length, axis) => length / step[axis]);
  const means = new OffscreenCanvas(Math.ceil(width), Math.ceil(height));
  const small = means.getContext('2d');
  small.imageSmoothingQuality = 'high';
  small.drawImage(bitmap, 0, 0, Math.ceil(width), Math.ceil(height));
  context.imageSmoothingEnabled = false;
  context.drawImage(means, 0, 0, means.width * step[1] * zoom, means.height * step[0] * zoom);
}

/** Draws tiles and thumbnail; `onToken` gets the index of a token that is clicked. */
export function drawPicture(elements, state, source, onToken) {
  const { layout } = state;
  const [, cols] = layout.grid;
  const index = (tile, row, col) => tile * (layout.perTile + 1) + row * layout.tokenGrid[1] + col;
  const isSliced = layout.numTiles > 1;
  const beside = isSliced && elements.planes.clientWidth > 4 * THUMBNAIL ? THUMBNAIL + GAP + 1 : 0;
  const room = { ...LARGEST, width: Math.min(LARGEST.width, elements.planes.clientWidth - beside) };
  const inTiles = source && !(isSliced && source.isThumbnail);
  const chosen = inTiles ? { ...source, at: [Math.floor(source.tile / cols), source.tile % cols] } : null;
  const pick = drawPlane(elements.tiles, room, state, layout.grid, chosen);
  elements.tiles.onclick = ({ offsetX, offsetY }) => {
    const { at, row, col } = pick(offsetX, offsetY);
    onToken(index(at[0] * cols + at[1], row, col));
  };
  elements.thumbnail.hidden = !isSliced;
  if (!isSliced) return;
  const small = { height: THUMBNAIL, width: THUMBNAIL };
  const chosenSmall = source && source.isThumbnail ? { ...source, at: [0, 0] } : null;
  const pickSmall = drawPlane(elements.thumbnailTile, small, state, [1, 1], chosenSmall);
  elements.thumbnailTile.onclick = ({ offsetX, offsetY }) => {
    const { row, col } = pickSmall(offsetX, offsetY);
    onToken(index(layout.numTiles - 1, row, col));
  };
}

/** Draws the window of a token with half a window around it, and its patches. */
export function drawWindow(canvas, { bitmap, layout, page }, { tile, row, col }) {
  const context = prepare(canvas, WINDOW, WINDOW);
  const size = [bitmap.height, bitmap.width];
  const [top, left, bottom, right] = windowBox(layout, tile, row, col, size, page);
  const [height, width] = [bottom - top, right - left];
  context.fillStyle = colour('padding');
  context.fillRect(0, 0, WINDOW, WINDOW);
  context.imageSmoothingQuality = 'high';
  const zoom = [WINDOW / 2 / height, WINDOW / 2 / width];
  const corner = [top - height / 2, left - width / 2];
  context.drawImage(bitmap, -corner[1] * zoom[1], -corner[0] * zoom[0], size[1] * zoom[1], size[0] * zoom[0]);
  context.fillStyle = colour('card');
  context.globalAlpha = 0.6;
  const quarter = WINDOW / 4;
  context.fillRect(0, 0, WINDOW, quarter);
  context.fillRect(0, 3 * quarter, WINDOW, quarter);
  context.fillRect(0, quarter, quarter, 2 * quarter);
  context.fillRect(3 * quarter, quarter, quarter, 2 * quarter);
  context.globalAlpha = 1;
  context.strokeStyle = colour('accent');
  const patches = windowPatches(layout, row, col, page);
  for (let y = 0; y < patches[0]; y++) {
    for (let x = 0; x < patches[1]; x++) {
      const cell = [(2 * quarter) / patches[0], (2 * quarter) / patches[1]];
      context.strokeRect(quarter + x * cell[1], quarter + y * cell[0], cell[1], cell[0]);
    }
  }
  context.lineWidth = 3;
  context.strokeRect(quarter, quarter, 2 * quarter, 2 * quarter);
}

/** [rows, cols] of the patches behind a token; fewer than the scale factor at the edge of a tile. */
export function windowPatches(layout, row, col, page) {
  return [row, col].map((place, axis) =>
    Math.min(layout.scaleFactor, page.patch_grid[axis] - place * layout.scaleFactor),
  );
}
