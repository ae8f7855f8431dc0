// The image of the page: pick or drop images, tiles and tokens over the one that is shown, tools to mark regions.
// gradio gives element, props, trigger and watch. All drawing is of props.value, which the server makes.
const SVG = "http://www.w3.org/2000/svg";
const TOOLS = { look: "Tokens", box: "Box", polygon: "Outline", brush: "Brush" };
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
// what a tool does with Enter
const HOW = {
  box: "Enter sets a corner, and the second one ends the box",
  polygon: "Enter sets a point, and twice at one place it closes the outline",
  brush: "Enter puts the brush down, and again lifts it",
};
const limits = props.limits;
// path: of the region that is being drawn, by pointer or, where a cross-hair is moved, by keyboard
let tool = "look", thumbnail = false, place = [0, 0, 0], path = [], pressed = false, byKeys = false;
let cross = [0, 0], crossed = null, known = 0, picked = 0;

const find = (name) => element.querySelector(name);
const adding = find(".stage-add input");
const node = (name, attributes, parent) => {
  const made = name in { svg: 1, image: 1, path: 1, rect: 1, text: 1 }
    ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    key === "textContent" ? (made.textContent = value) : made.setAttribute(key, value);
  parent.append(made);
  return made;
};
const button = (text, pressed, parent, act) => {
  const state = pressed === null ? {} : { "aria-pressed": pressed };
  const made = node("button", { type: "button", textContent: text, ...state }, parent);
  made.addEventListener("click", act);
  return made;
};
const say = (text, calm = false) => {
  find(".stage-say").textContent = text;
  find(".stage-say").classList.toggle("stage-calm", calm);
};
// a part that draw makes anew is known by its name
const nameOf = (part) => part.closest("svg") ? "svg"
  : part.tagName + (part.getAttribute("aria-label") ?? part.textContent) + (part.querySelector("img")?.alt ?? "");
const rect = ([top, left, bottom, right]) => `M${left} ${top}H${right}V${bottom}H${left}Z`;

const sizes = ({ tokens }) => new Set(tokens.map(String)).size > 1 ? "different numbers of" : tokens[0].join(" by ");

// Boxes of the tiles that are shown, and the place of the first among all.
const tiles = (grid) => {
  const slices = grid.tiles[0] * grid.tiles[1];
  return thumbnail ? [grid.boxes.slice(slices), slices] : [grid.boxes.slice(0, slices), 0];
};
const tokenBox = (grid, tile, row, col) => {
  const [top, left, bottom, right] = grid.boxes[tile];
  const high = (bottom - top) * grid.window[tile][0], wide = (right - left) * grid.window[tile][1];
  return [top + row * high, left + col * wide,
    Math.min(top + (row + 1) * high, bottom), Math.min(left + (col + 1) * wide, right)];
};

// An image can be removed until a question was asked about it.
function offerRemoval() {
  const { shown } = props.value, there = find(".stage-remove");
  const act = () => trigger("remove", { image: shown });
  if (!props.pictures[shown] || shown < props.asked) there?.remove();
  else if (!there) button(`Remove image ${shown + 1}`, null, find(".stage-strip"), act).className = "stage-remove";
}

function draw() {
  const { shown, grid, regions, marking } = props.value, pictures = props.pictures;
  const strip = find(".stage-strip"), tools = find(".stage-tools"), view = find(".stage-view");
  const held = element.contains(document.activeElement) && nameOf(document.activeElement);
  for (const part of [strip, tools, view]) part.replaceChildren();
  element.classList.toggle("stage-empty", !pictures.length);
  pictures.forEach((picture, number) => {
    const made = button("", number === shown, strip, () => trigger("turn", { image: number }));
    node("img", { src: picture, alt: `Image ${number + 1}` }, made);
  });
  if (!grid || !pictures[shown]) {
    if (held) adding.focus();
    return;
  }
  offerRemoval();
  if (grid.boxes.length <= grid.tiles[0] * grid.tiles[1]) thumbnail = false;
  else button("Thumbnail", thumbnail, tools, () => { thumbnail = !thumbnail; place = [0, 0, 0]; draw(); });
  if (marking) {
    for (const [name, text] of Object.entries(TOOLS))
      button(text, tool === name, tools, () => { tool = name; path = []; say(""); draw(); });
    const label = node("label", { class: "stage-pick" }, tools);
    const input = node("input", { type: "file", accept: "image/png,image/gif,image/bmp", "aria-label": "Add a mask" }, label);
    node("span", { textContent: "Mask file", "aria-hidden": "true" }, label);
    input.addEventListener("change", async () => trigger("mark", { form: "mask", data: (await read(input.files))?.[0] }));
    button("Clear regions", null, tools, () => trigger("clear"));
  }
  const [boxes, first] = tiles(grid);
  const [top, left] = [0, 1].map((side) => Math.min(0, ...boxes.map((box) => box[side])));
  const bottom = Math.max(grid.size[1], ...boxes.map((box) => box[2]));
  const right = Math.max(grid.size[0], ...boxes.map((box) => box[3]));
  const svg = node("svg", {
    viewBox: `${left} ${top} ${right - left} ${bottom - top}`, tabindex: 0, role: "application", class: `stage-${tool}`,
    "aria-label": `Image ${shown + 1} under ${boxes.length} tiles of ${sizes(grid)} tokens. ${how()}`,
  }, view);
  const ratio = (right - left) / (bottom - top);
  Object.assign(svg.style, { aspectRatio: ratio, width: `min(100%, min(56vh, 460px) * ${ratio})` });
  const small = Math.max(...grid.size) < 400 ? "pixelated" : "auto";
  node("image", { href: pictures[shown], width: grid.size[0], height: grid.size[1],
    preserveAspectRatio: "none", style: `image-rendering: ${small}` }, svg);
  let tokens = "";
  for (const tile of boxes.keys())
    for (let row = 0; row < grid.tokens[first + tile][0]; row++)
      for (let col = 0; col < grid.tokens[first + tile][1]; col++) tokens += rect(tokenBox(grid, first + tile, row, col));
  node("path", { d: tokens, class: "stage-tokens" }, svg);
  node("path", { d: boxes.map(rect).join(""), class: "stage-tiles" }, svg);
  node("path", { class: "stage-chosen" }, svg);
  for (const [number, region] of regions.entries()) if (region.image === shown) drawRegion(svg, region, number + 1);
  node("path", { class: "stage-draft" }, svg);
  for (const name of ["stage-cross stage-halo", "stage-cross"]) node("path", { class: name }, svg);
  svg.addEventListener("keydown", key);
  svg.addEventListener("pointerdown", down);
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerup", up);
  svg.addEventListener("pointercancel", () => { path = []; pressed = false; showDraft(); });
  svg.addEventListener("focus", focus);
  if (crossed !== pictures[shown]) [path, cross] = [[], grid.size.map((side) => Math.round(side / 2))];
  crossed = pictures[shown];
  if (path.length) showDraft();
  if (held) ([...element.querySelectorAll("button, input, svg")].find((part) => nameOf(part) === held) ?? adding).focus();
  if (held && regions.length !== known)
    say(`${regions.length} region${regions.length === 1 ? "" : "s"} in the question.`, true);
  known = regions.length;
}

const outline = (form, points) => {
  if (form === "box" || form === "mask") {
    const [[x0, y0], [x1, y1]] = [points[0], points[points.length - 1]];
    return `M${x0} ${y0}H${x1}V${y1}H${x0}Z`;
  }
  return "M" + points.map((point) => point.join(" ")).join("L") + (form === "polygon" ? "Z" : "");
};
const drawRegion = (svg, { form, points, width }, number) => {
  const made = node("path", { d: outline(form, points), class: `stage-region stage-region-${form}` }, svg);
  if (form === "brush") made.style.strokeWidth = width;
  const x = Math.min(...points.map((point) => point[0])), y = Math.min(...points.map((point) => point[1]));
  const size = svg.viewBox.baseVal.width / 24;
  node("text", { x, y: Math.max(y, size), "font-size": size, textContent: number }, svg);
};

// Chooses the token at a row and column of a tile, of all tiles that the image has.
function choose(tile, row, col) {
  const { grid } = props.value, [boxes, first] = tiles(grid);
  if (!boxes[tile - first]) return;
  place = [tile - first, row, col];
  find(".stage-chosen").setAttribute("d", rect(tokenBox(grid, tile, row, col)));
  clearTimeout(picked);  // a key that is held down asks once, for where it stops
  picked = setTimeout(() => trigger("pick", { tile, row, col }), 100);
}
function key(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (tool !== "look") drawByKey(event);
  else chooseByKey(event);
}
function chooseByKey(event) {
  const step = event.key === "Enter" ? [0, 0] : ARROWS[event.key];
  if (!step) return;
  event.preventDefault();
  const { grid } = props.value, [boxes, first] = tiles(grid), shape = thumbnail ? [1, 1] : grid.tiles;
  const now = Math.min(place[0], boxes.length - 1), own = grid.tokens[first + now];
  const at = [Math.floor(now / shape[1]), now % shape[1]];
  const to = [0, 1].map((side) => Math.min(own[side] - 1, place[side + 1]) + step[side]);
  const out = [0, 1].map((side) => to[side] < 0 || to[side] >= own[side] ? step[side] : 0);
  const next = [0, 1].map((side) => Math.max(0, Math.min(shape[side] - 1, at[side] + out[side])));
  const tile = first + next[0] * shape[1] + next[1], crossed = tile !== first + now;
  const [row, col] = [0, 1].map((side) => {  // the next tile may have other tokens
    const last = grid.tokens[tile][side] - 1;
    if (crossed && out[side]) return out[side] > 0 ? 0 : last;
    return Math.max(0, Math.min(last, crossed ? Math.floor((to[side] + 0.5) * (last + 1) / own[side]) : to[side]));
  });
  choose(tile, row, col);
}

// Regions by keyboard: arrows move a cross-hair, and the other keys do with it what a pointer does.
function drawByKey(event) {
  const { size } = props.value.grid, step = ARROWS[event.key], drawing = path.length > 0;
  [byKeys, pressed] = [true, false];
  if (step) {
    const length = Math.max(0.1, Math.max(...size) / (event.shiftKey ? 500 : 50));
    cross = cross.map((at, axis) => tenths(Math.max(0, Math.min(size[axis], at + length * step[1 - axis]))));
    if (tool === "brush" && drawing) path.push(cross);
    say(cross.join(", "), true);
  } else if (event.key === "Enter" || event.key === " ") event.repeat || setPoint();
  else if (event.key === "Escape" && drawing) cancel();
  else if (event.key === "Delete" || event.key === "Backspace") drawing ? cancel() : trigger("unmark");
  else return;
  event.preventDefault();
  showDraft();
}
function setPoint() {
  const last = path[path.length - 1], same = last && last.every((at, axis) => at === cross[axis]);
  if (tool === "polygon" && same && path.length < 3) return say("An outline needs three points.", true);
  if (tool === "box" && last) path.push(cross);
  if (last && (tool !== "polygon" || same)) return finish();
  path.push(cross);
  say(`${tool === "brush" ? "The brush is down" : `Point ${path.length}`} at ${cross.join(", ")}.`, true);
}
function cancel() {
  path = [];
  say("Cancelled.", true);
}
const how = () => tool === "look" ? "Arrow keys choose a token and explain it."
  : `${TOOLS[tool]}: arrow keys move the cross-hair, Shift by small steps. ${HOW[tool]}. `
    + "Escape cancels, Delete removes the last region.";
function focus(event) {
  if (tool === "look" || !(byKeys || event.currentTarget.matches(":focus-visible"))) return;
  byKeys = true;
  say(how(), true);
  showDraft();
}

const tenths = (value) => Math.round(10 * value) / 10;
const point = (event) => {
  const svg = event.currentTarget, { x, y } = new DOMPoint(event.clientX, event.clientY)
    .matrixTransform(svg.getScreenCTM().inverse());
  return [tenths(x), tenths(y)];
};
const brushWidth = () => Math.max(4, Math.round(Math.max(...props.value.grid.size) / 20));
function showDraft() {
  const draft = find(".stage-draft"), points = byKeys && path.length ? [...path, cross] : path;
  draft.setAttribute("d", points.length > 1 ? outline(tool, points) : "");
  draft.classList.toggle("stage-region-brush", tool === "brush");
  draft.style.strokeWidth = tool === "brush" ? brushWidth() : "";
  const [x, y] = cross, arm = draft.ownerSVGElement.viewBox.baseVal.width / 20;
  const lines = byKeys ? `M${x - arm} ${y}H${x + arm}M${x} ${y - arm}V${y + arm}` : "";
  for (const part of element.querySelectorAll(".stage-cross")) part.setAttribute("d", lines);
}
function down(event) {
  const [x, y] = point(event), { grid } = props.value, [boxes, first] = tiles(grid);
  if (tool !== "look") {
    event.currentTarget.setPointerCapture(event.pointerId);
    [path, pressed, byKeys] = [[[x, y]], true, false];
    showDraft();
    return;
  }
  boxes.forEach((box, number) => {
    const [top, left, bottom, right] = box;
    if (x < left || x >= right || y < top || y >= bottom) return;
    const [rows, cols] = grid.tokens[first + number], [high, wide] = grid.window[first + number];
    choose(first + number, Math.min(rows - 1, Math.floor((y - top) / ((bottom - top) * high))),
      Math.min(cols - 1, Math.floor((x - left) / ((right - left) * wide))));
  });
}
function move(event) {
  if (!pressed || !path.length) return;
  const next = point(event), last = path[path.length - 1];
  if (Math.hypot(next[0] - last[0], next[1] - last[1]) * 200 < Math.max(...props.value.grid.size)) return;
  path.push(next);
  showDraft();
}
function up() {
  if (pressed && path.length) finish();
  pressed = false;
}
// Ends the region that is being drawn, and sends it.
function finish() {
  const [first, last] = [path[0], path[path.length - 1]], points = tool === "box" ? [first, last] : path;
  path = [];
  showDraft();
  if (tool === "box" && first.some((at, axis) => at === last[axis])) say("A box needs two corners apart.");
  else if (tool === "polygon" && points.length < 3) say("An outline needs three points.");
  else trigger("mark", { form: tool, points, width: brushWidth() });
}

async function read(files) {
  const all = [...files], bytes = all.reduce((sum, file) => sum + file.size, 0);
  if (bytes * 1.4 > limits.body_bytes || all.some((file) => file.size > limits.image_bytes)) {
    say(`At most ${limits.image_bytes >> 20} MiB a file and ${Math.floor(limits.body_bytes / 1.4) >> 20} MiB at once; shrink the images.`);
    return null;
  }
  say("");
  return Promise.all(all.map((file) => new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  })));
}
async function add(files) {
  const data = files.length ? await read(files) : null;
  if (data) trigger("upload", { data });
}
adding.addEventListener("change", async () => { await add(adding.files); adding.value = ""; });
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => { event.preventDefault(); add(event.dataTransfer.files); });
document.addEventListener("paste", (event) => { if (element.isConnected) add(event.clipboardData.files); });
element.classList.add("stage");
// names in quotes are events to gradio, which would send the address of their handler
watch(Object.keys({ value: 0, pictures: 0 }), draw);
watch(Object.keys({ asked: 0 }), offerRemoval);
draw();
