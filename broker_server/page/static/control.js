// What a person can tell the run, behind the token; and its settings, with where they come from.

import { ask, live, setToken, token, watch } from './live.js';
import { el, span, table } from './text.js';

/** Fill `main`; returns what ends it. */
export function controlView(main) {
  const said = el('p', { role: 'status' });
  const state = el('p');
  const rest = el('div');
  const asked = el('input', { id: 'token', type: 'password', autocomplete: 'off', value: token() });
  const form = el('form', { class: 'line', onsubmit: async (event) => {
    event.preventDefault();
    setToken(asked.value.trim());
    await check();
  } }, el('div', { class: 'field' }, el('label', { for: 'token' }, 'Token'), asked), el('button', { class: 'do', type: 'submit' }, 'Use it'));
  const start = action('Start', 'start', 'main');
  const pause = action('Pause', 'pause');
  const stop = el('button', { class: 'do', type: 'button', onclick: () => sure.showModal() }, 'Stop');
  const sure = el('dialog', { 'aria-labelledby': 'sure' }, el('h2', { id: 'sure' }, 'Stop the run?'),
    el('p', {}, 'The gateway writes the model and the metrics and ends, and this page with it. The same command goes on where it was.'),
    el('div', { class: 'tools' }, el('button', { class: 'do main', type: 'button', onclick: () => { sure.close(); order('stop', {}); } }, 'Stop'),
      el('button', { class: 'do', type: 'button', onclick: () => sure.close() }, 'Go on')));
  const end = stopForm();
  main.append(el('h1', {}, 'Control'), state, el('div', { class: 'tools' }, start, pause, stop), said, sure,
    el('section', { 'aria-labelledby': 'who' }, el('h2', { id: 'who' }, 'Token'),
      el('p', { class: 'muted' }, 'Whoever tells the run something shows the token. On the gateway, ', el('code', {}, 'regrow page token'), ' tells it; it stays in this tab.'), form),
    el('section', { 'aria-labelledby': 'end' }, el('h2', { id: 'end' }, 'When it ends'), end), rest);

  function action(title, name, look = '') {
    return el('button', { class: `do ${look}`, type: 'button', onclick: () => order(name, {}) }, title);
  }
  async function order(name, body) {
    try {
      said.textContent = (await ask(`api/${name}`, body)).done;
      await load();
    } catch (error) { said.textContent = error.message; }
  }
  async function check() {
    try {
      said.textContent = (await ask('api/token')).valid ? 'The token is right.' : 'That is not the token.';
    } catch (error) { said.textContent = error.message; }
    show();
  }
  function stopForm() {
    const field = (name, title, attributes) => el('div', { class: 'field' }, el('label', { for: `end-${name}` }, title),
      el('input', { id: `end-${name}`, name, type: 'number', ...attributes }));
    const made = el('form', { class: 'line', onsubmit: (event) => {
      event.preventDefault();
      const values = Object.fromEntries([...new FormData(made)].filter(([, text]) => text !== '').map(([name, text]) => [name, Number(text)]));
      order('end', values);
    } }, field('seconds', 'After seconds', { min: 1, step: 'any' }), field('aggregations', 'After aggregations', { min: 1, step: 1 }),
    field('accuracy', 'At accuracy', { min: 0.0001, max: 1, step: 'any' }), el('button', { class: 'do', type: 'submit' }, 'Change'),
    el('button', { class: 'do', type: 'button', onclick: () => order('end', null) }, 'As in task.toml'));
    return made;
  }
  async function load() {
    try {
      const found = await ask('api/settings');
      for (const [name, value] of Object.entries({ seconds: '', aggregations: '', accuracy: '', ...found.stop })) {
        const input = end.elements[name];
        if (input && document.activeElement !== input) input.value = value ?? '';
      }
      rest.replaceChildren(
        el('p', { class: 'muted' }, `When it ends is what ${found.stop_source} says. The other settings hold for the whole run.`),
        el('h2', {}, 'Settings of the task'), settings('Settings of the task', found.task),
        el('h2', {}, 'Options of regrow serve'), settings('Options of regrow serve', found.serve));
    } catch (error) { rest.replaceChildren(el('p', { class: 'bad' }, error.message)); }
  }
  const settings = (title, rows) => table(title, [['Setting', false], ['Value', false], ['From', false]], rows.map((row) => [row.name, row.value, row.source]));
  function show() {
    const { run } = live;
    const doing = !live.connected ? 'Not connected to the gateway.' : run.finished ? `Finished: ${run.finished}.` : run.paused ? 'Paused: nobody gets new work; the clock of the run goes on.' : `Running for ${span(run.elapsed_s)}.`;
    if (state.textContent !== doing) state.textContent = doing;
    start.disabled = !live.connected || !token() || !run.paused;
    pause.disabled = !live.connected || !token() || Boolean(run.paused);
    stop.disabled = !live.connected || !token();
    for (const each of end.elements) each.disabled = !live.connected || !token();
  }
  show();
  load();
  const unwatch = watch(show);
  return unwatch;
}
