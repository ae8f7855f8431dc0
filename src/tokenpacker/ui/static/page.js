// The page: a picture, a question, two sliders, and the answer of the model that runs in the worker.
import { readPicture } from './picture.js';
import { planLayout, tokenSource } from './sequence.js';
import { drawPicture, drawWindow, windowPatches } from './view.js';

const PAUSE_MS = 200; // before a moved slider asks again

const $ = (id) => document.getElementById(id);
const elements = {
  planes: $('planes'),
  tiles: $('tiles'),
  thumbnail: $('thumbnail'),
  thumbnailTile: $('thumbnail-tile'),
};
const number = new Intl.NumberFormat('en');
const state = {
  page: null,
  bitmap: null,
  layout: null,
  factors: [],
  scaleFactor: null,
  budget: null,
  token: null,
  show: 'picture',
  isReady: false,
  task: 0,
  asked: null,
  answers: new Map(),
  pictures: 0,
  timer: 0,
};

function say(text) {
  $('problem').textContent = text;
  $('problem').hidden = !text;
}

/** Starts the worker. A worker from a blob has the content security policy of this page; one from a file has none. */
function startWorker() {
  const source = `import ${JSON.stringify(new URL('worker.js', import.meta.url).href)};`;
  const worker = new Worker(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })), { type: 'module' });
  worker.onerror = () => ($('status-text').textContent = 'The model cannot be loaded: this browser does not run it.');
  worker.onmessage = ({ data }) => receive(data);
  return worker;
}

const worker = startWorker();

function receive(data) {
  if (data.kind === 'progress') {
    const [loaded, total] = [data.loaded, data.total].map((bytes) => (bytes / 1e6).toFixed(0));
    $('status-text').textContent = `Loading the model: ${loaded} of ${total} MB`;
    $('progress').value = data.loaded / data.total;
  } else if (data.kind === 'ready') {
    state.isReady = true;
    $('progress').hidden = true;
    $('status-text').textContent = 'Ready. From here on the page works without a network.';
    update();
  } else if (!state.isReady) {
    worker.onmessage = null; // other files report their progress still
    $('status-text').textContent = `The model cannot be loaded: ${data.message}`;
  } else if (data.task === state.task) {
    // no newer question was asked
    if (data.kind !== 'error') return showAnswer(data);
    $('answer-text').textContent = '';
    say(data.message);
  }
}

function showAnswer({ kind, text, first, layout }) {
  $('answer-text').textContent = text || ' ';
  $('answer-text').className = '';
  $('answer-cost').textContent = `first token after ${number.format(Math.round(first))} ms`;
  if (kind !== 'done') return;
  const { scaleFactor, numTokens } = layout;
  $('answer-cost').textContent += `, from ${number.format(numTokens)} image tokens`;
  const key = `${scaleFactor}/${numTokens}`;
  state.answers.set(key, [scaleFactor, number.format(numTokens), `${Math.round(first)} ms`, text]);
  const rows = [...state.answers].sort(([, a], [, b]) => a[0] - b[0]);
  $('answers').tBodies[0].replaceChildren(
    ...rows.map(([at, cells]) => {
      const row = document.createElement('tr');
      row.className = at === key ? 'now' : '';
      row.append(...cells.map((cell) => Object.assign(document.createElement('td'), { textContent: cell })));
      return row;
    }),
  );
  $('answers').hidden = state.answers.size < 2;
}

/** Shows a picture file; what is wrong with it is said in one sentence. */
async function show(file, name) {
  const turn = ++state.pictures;
  try {
    const { bitmap, picture } = await readPicture(file, name);
    if (turn !== state.pictures) return; // another was chosen meanwhile
    worker.postMessage({ kind: 'picture', picture }, [picture.pixels.buffer]);
    say('');
    state.bitmap?.close();
    clearTimeout(state.timer);
    Object.assign(state, { bitmap, token: null, asked: null, task: state.task + 1 });
    forget();
    update();
  } catch (error) {
    if (turn === state.pictures) say(error.message);
  }
}

function forget() {
  state.answers.clear();
  $('answers').hidden = true;
  $('answer-text').textContent = $('answer-cost').textContent = '';
}

/** Brings everything but the answer up to date: plan, count, sliders, pictures. */
function update() {
  const { page, bitmap, scaleFactor } = state;
  $('ask').disabled = !(state.isReady && bitmap);
  const { token_grid: tokenGrid } = page.scale_factors[scaleFactor];
  const perTile = tokenGrid[0] * tokenGrid[1] + 1;
  const most = (page.processor.max_tiles + 1) * perTile;
  const hasLimit = state.budget !== null && state.budget < most;
  const limit = hasLimit ? Math.max(perTile, Math.floor(state.budget / perTile) * perTile) : most;
  Object.assign($('budget'), { min: perTile, max: most, step: perTile });
  $('budget').value = limit;
  $('budget-text').textContent = hasLimit ? `at most ${number.format(limit)} a picture` : 'no limit';
  const patches = page.patch_grid[0] * page.patch_grid[1];
  $('factor-text').textContent = `${scaleFactor}: ${patches} patches become ${perTile - 1} tokens`;
  if (!bitmap) return;
  const size = [bitmap.height, bitmap.width];
  state.layout = planLayout(size, page, scaleFactor, hasLimit ? limit : null);
  const { grid, numTiles, numTokens } = state.layout;
  const full = numTiles * (patches + 1);
  $('count').textContent = number.format(numTokens);
  $('full').textContent = `instead of ${number.format(full)}`;
  $('bar').style.width = `${(100 * numTokens) / full}%`;
  const tiles = numTiles > 1 ? `${grid[0]} × ${grid[1]} tiles and a thumbnail` : 'one tile';
  $('layout').textContent = `${size[0]} × ${size[1]} pixels: ${tiles}, ${perTile - 1} tokens each`;
  elements.tiles.setAttribute('aria-label', `The picture in ${tiles}, with ${numTokens} tokens`);
  draw();
}

function draw() {
  const { bitmap, layout, page } = state;
  if (state.token !== null && state.token >= layout.numTokens) state.token = null;
  const size = [bitmap.height, bitmap.width];
  const source = state.token === null ? null : tokenSource(layout, state.token, size, page);
  drawPicture(elements, state, source, (token) => {
    state.token = token;
    draw();
  });
  Object.assign($('token'), { max: layout.numTokens - 1, value: state.token ?? 0 });
  $('token-number').textContent = state.token === null ? 'none' : `${state.token + 1} of ${layout.numTokens}`;
  $('window').hidden = !source;
  if (source) drawWindow($('window'), state, source);
  $('token-text').textContent = tokenText(source);
}

function tokenText(source) {
  if (state.token === null) return 'Click a token to see its window.';
  if (!source) return 'A separator: it ends a tile, and shows nothing of the picture.';
  const patches = windowPatches(state.layout, source.row, source.col, state.page);
  const tile = source.isThumbnail && state.layout.numTiles > 1 ? 'the thumbnail' : `tile ${source.tile + 1}`;
  const box = source.box?.map((edge) => Math.round(edge));
  const where = box ? `rows ${box[0]} to ${box[2]} and columns ${box[1]} to ${box[3]} of the picture` : 'padding only';
  const place = `Row ${source.row + 1}, column ${source.col + 1} of ${tile}`;
  return `${place}. Its window is ${patches[0]} × ${patches[1]} patches: ${where}.`;
}

function ask(question) {
  if (!state.isReady || !state.bitmap) return;
  if (!question.trim()) {
    say('The question is empty; write one, or take one of those below.');
    return;
  }
  say('');
  if (question !== state.asked) forget();
  state.asked = question;
  $('answer-text').textContent = 'reading the picture';
  $('answer-text').className = 'waiting';
  $('answer-cost').textContent = '';
  const maxImageTokens = $('budget').value === $('budget').max ? null : Number($('budget').value);
  worker.postMessage({ kind: 'ask', task: ++state.task, question, scaleFactor: state.scaleFactor, maxImageTokens });
}

/** After a slider moved: the count at once, and soon the answer to the last question. */
function moved() {
  update();
  clearTimeout(state.timer);
  if (state.asked) state.timer = setTimeout(() => ask(state.asked), PAUSE_MS);
}

function suggest(questions) {
  $('suggestions').replaceChildren(
    ...questions.map((text) => {
      const button = Object.assign(document.createElement('button'), {
        type: 'button',
        className: 'button',
        textContent: text,
      });
      button.onclick = () => {
        $('question').value = text;
        ask(text);
      };
      return button;
    }),
  );
}

async function showExample({ file, questions }, button) {
  for (const other of $('examples').querySelectorAll('button')) other.setAttribute('aria-pressed', other === button);
  await show(file, 'The example');
  $('question').value = questions[0];
  suggest(questions);
}

function openFile(file) {
  if (!file) return;
  for (const button of $('examples').querySelectorAll('button')) button.setAttribute('aria-pressed', false);
  suggest([]);
  show(file, file.name || 'The picture');
}

function listen() {
  $('file').onchange = () => {
    openFile($('file').files[0]);
    $('file').value = ''; // so that the same file can be opened again
  };
  $('factor').oninput = () => {
    state.scaleFactor = state.factors[$('factor').value];
    moved();
  };
  $('budget').oninput = () => {
    state.budget = $('budget').value === $('budget').max ? null : Number($('budget').value);
    moved();
  };
  $('token').oninput = () => {
    state.token = Number($('token').value);
    if (state.layout) draw();
  };
  $('form').onsubmit = (event) => {
    event.preventDefault();
    ask($('question').value);
  };
  for (const radio of document.getElementsByName('show')) {
    radio.onchange = () => {
      state.show = radio.value;
      if (state.layout) draw();
    };
  }
  document.ondragover = (event) => {
    event.preventDefault();
    document.body.classList.add('over');
  };
  document.ondragleave = () => document.body.classList.remove('over');
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove('over');
    openFile(event.dataTransfer.files[0]);
  };
  document.onpaste = (event) => openFile(event.clipboardData.files[0]);
  const redraw = () => state.layout && draw();
  window.addEventListener('resize', redraw);
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
}

/** Fetches a file of the page's folder. */
async function fetchFile(path) {
  const response = await fetch(new URL(path, import.meta.url));
  if (!response.ok) throw new Error(`${path} cannot be fetched (${response.status}); host the folder whole.`);
  return response;
}

async function start() {
  const page = await (await fetchFile('page.json')).json();
  worker.postMessage({ kind: 'load', page });
  state.page = page;
  state.factors = Object.keys(page.scale_factors)
    .map(Number)
    .sort((a, b) => a - b);
  state.scaleFactor = page.scale_factor;
  $('model').textContent = page.model;
  Object.assign($('factor'), { max: state.factors.length - 1, value: state.factors.indexOf(page.scale_factor) });
  $('factor').disabled = state.factors.length < 2;
  const files = await Promise.all(page.examples.map(async ({ picture }) => (await fetchFile(picture)).blob()));
  const buttons = files.map((file, i) => {
    const button = Object.assign(document.createElement('button'), { type: 'button' });
    button.append(Object.assign(new Image(), { src: URL.createObjectURL(file), alt: `Example ${i + 1}` }));
    button.onclick = () => showExample({ file, questions: page.examples[i].questions }, button);
    return button;
  });
  $('examples').append(...buttons);
  listen();
  update();
  buttons[0].click();
}

start().catch((error) => ($('status-text').textContent = `The page cannot start: ${error.message}`));
