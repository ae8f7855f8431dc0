// A picture as the language model reads it: tokenpacker/sequence.py in JavaScript. A picture is its tiles row by row, a
// separator after each, and the thumbnail: n tiles of T tokens cost exactly n (T + 1) tokens.
import { chooseTileGrid, tileViews } from './tiling.js';

/**
 * The tokens of a picture of `size` [height, width]: {grid, numTiles, tokenGrid, perTile, numTokens, scaleFactor}.
 *
 * `maxImageTokens` null sets no limit. Throws if it is too small for one tile.
 */
export function planLayout(size, page, scaleFactor, maxImageTokens = null) {
  const { tile_size: tileSize, max_tiles: most, grid_list: gridList } = page.processor;
  const tokenGrid = page.scale_factors[scaleFactor].token_grid;
  const perTile = tokenGrid[0] * tokenGrid[1];
  let maxTiles = most;
  if (maxImageTokens !== null) {
    const affordable = Math.floor(maxImageTokens / (perTile + 1));
    if (affordable < 1) {
      throw new Error(
        `max_image_tokens=${maxImageTokens} is too small: one tile costs ${perTile + 1} tokens;` +
          ' raise the budget or the scale factor',
      );
    }
    maxTiles = Math.min(most, Math.max(1, affordable - 1)); // one of several tiles is the thumbnail
  }
  const grid = chooseTileGrid(size, tileSize, maxTiles, gridList);
  const numTiles = grid[0] * grid[1] + (grid[0] * grid[1] > 1 ? 1 : 0);
  return { grid, numTiles, tokenGrid, perTile, numTokens: numTiles * (perTile + 1), scaleFactor };
}

/** The ids of a picture's tokens; packed tokens take the places of the image token later. */
export function imageTokenIds({ grid: [rows, cols], numTiles, perTile }, page) {
  const ids = [];
  for (let tile = 1; tile <= numTiles; tile++) {
    for (let i = 0; i < perTile; i++) ids.push(page.image_token_id);
    const endsRow = tile % cols === 0 || tile > rows * cols;
    ids.push(endsRow ? page.row_separator_id : page.tile_separator_id);
  }
  return ids;
}

/** The ids of a whole prompt. Throws if the question itself holds a mark for a picture or a region. */
export function promptIds(tokenizer, question, layout, page) {
  const text = page.prompt.before + question + page.prompt.after;
  const ids = tokenizer.encode(text, { add_special_tokens: page.prompt.add_special_tokens }).ids;
  const place = ids.indexOf(page.image_token_id);
  if (place < 0 || ids.indexOf(page.image_token_id, place + 1) >= 0) {
    throw new Error(`The question holds ${page.image_token}, which stands for a picture; leave it out.`);
  }
  if (ids.includes(page.region_token_id)) throw new Error('This page knows no regions; leave the mark of one out.');
  return [...ids.slice(0, place), ...imageTokenIds(layout, page), ...ids.slice(place + 1)];
}

/**
 * What the token at `index` shows: {tile, row, col, isThumbnail, box}; null for a separator.
 *
 * `box` [top, left, bottom, right] is in image pixels and clipped to the image; null if only padding is there.
 */
export function tokenSource(layout, index, size, page) {
  const tile = Math.floor(index / (layout.perTile + 1));
  const place = index % (layout.perTile + 1);
  if (place === layout.perTile) return null;
  const [row, col] = [Math.floor(place / layout.tokenGrid[1]), place % layout.tokenGrid[1]];
  const unclipped = windowBox(layout, tile, row, col, size, page);
  const [top, left, bottom, right] = unclipped.map((edge, i) => Math.min(Math.max(edge, 0), size[i % 2]));
  const box = bottom > top && right > left ? [top, left, bottom, right] : null;
  return { tile, row, col, isThumbnail: tile === layout.grid[0] * layout.grid[1], box };
}

/** The window of one token in image pixels, cut off at the edge of its tile; it may reach beyond the image. */
export function windowBox(layout, tile, row, col, size, page) {
  const { tile_size: tileSize } = page.processor;
  const { scale, offset } = tileViews(size, layout.grid, tileSize)[tile];
  const edges = [row, col, row + 1, col + 1].map((line, i) => {
    const length = (tileSize[i % 2] / page.patch_grid[i % 2]) * layout.scaleFactor;
    return Math.min(line * length, tileSize[i % 2]);
  });
  return edges.map((edge, i) => edge * scale[i % 2] + offset[i % 2]);
}
