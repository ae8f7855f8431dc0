// Runs the model beside the page, so that the page stays responsive. Messages in: load, picture, ask; out: progress,
// ready, piece, done, error. `task` is the number of the question; a newer one ends an older one.
import { Model } from './model.js';
import { planLayout } from './sequence.js';

let model = null;
let picture = null; // {pixels, height, width}
let newest = 0;

async function ask({ task, question, scaleFactor, maxImageTokens }) {
  const asked = picture;
  const start = performance.now();
  let first = null;
  const layout = planLayout([asked.height, asked.width], model.page, scaleFactor, maxImageTokens);
  const ids = [];
  let text = '';
  for await (const id of model.answer(asked, question, layout)) {
    if (task !== newest) return;
    first ??= performance.now() - start;
    ids.push(id);
    const decoded = model.tokenizer.decode(ids, { skip_special_tokens: true }).trimStart();
    if (!decoded.endsWith('\ufffd')) text = decoded; // else a character is not complete
    self.postMessage({ kind: 'piece', task, text, first });
    await new Promise((resolve) => setTimeout(resolve)); // a newer question may be waiting
  }
  first ??= performance.now() - start;
  self.postMessage({ kind: 'done', task, text, ids, first, total: performance.now() - start, layout });
}

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === 'load') {
      model = await Model.load(data.page, (loaded, total) => self.postMessage({ kind: 'progress', loaded, total }));
      self.postMessage({ kind: 'ready' });
    } else if (data.kind === 'picture') {
      picture = data.picture;
    } else {
      newest = data.task;
      await ask(data);
    }
  } catch (error) {
    self.postMessage({ kind: 'error', task: data.task, message: error.message });
  }
};
