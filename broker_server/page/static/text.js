// Words, numbers and elements. Whatever comes from a device becomes text, never markup.

export const dash = '–';
const known = (value) => value !== null && value !== undefined;

export function bytes(count) {
  if (!known(count)) return dash;
  for (const [size, unit] of [[1e9, 'GB'], [1e6, 'MB'], [1e3, 'kB']]) if (count >= size) return `${(count / size).toPrecision(3)} ${unit}`;
  return `${Math.round(count)} B`;
}

export function rate(bps) {
  if (!known(bps)) return dash;
  return bps >= 1e6 ? `${(bps / 1e6).toPrecision(3)} Mbit/s` : `${(bps / 1e3).toPrecision(3)} kbit/s`;
}

export function joules(value) {
  if (!known(value)) return 'unmeasured';
  return value >= 1e6 ? `${(value / 1e6).toPrecision(3)} MJ` : value >= 1e3 ? `${(value / 1e3).toPrecision(3)} kJ` : `${value.toPrecision(3)} J`;
}

export const number = (value, digits = 3) => (known(value) ? value.toFixed(digits) : dash);
export const count = (value) => (known(value) ? value.toLocaleString('en') : dash);
export const percent = (value) => (known(value) ? `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %` : dash);

export function span(seconds) {
  if (!known(seconds)) return dash;
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export const clock = (at_s) => new Date(1000 * at_s).toLocaleTimeString([], { hour12: false });
export const date = (at_s) => new Date(1000 * at_s).toLocaleString([], { hour12: false });

/** An element: el('a', { href: '#/' , class: 'x', onclick: f }, 'text', child, ...). */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, '');
    else if (value !== false && known(value)) made.setAttribute(key, value);
  }
  made.append(...children.filter(known));
  return made;
}

export function facts(pairs) {
  return el('dl', { class: 'facts' }, ...pairs.filter(([, value]) => known(value) && value !== '')
    .flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, value)]));
}

/** A table for screen readers and people; columns: [title, is a number]. */
export function table(caption, columns, rows) {
  const head = el('tr', {}, ...columns.map(([title, numeric]) => el('th', { scope: 'col', class: numeric ? 'number' : null }, title)));
  const body = rows.map((row) => el('tr', {}, ...row.map((cell, at) => (at
    ? el('td', { class: columns[at][1] ? 'number' : null }, cell)
    : el('th', { scope: 'row' }, cell)))));
  return el('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': caption }, el('table', {},
    el('caption', { class: 'hidden' }, caption), el('thead', {}, head), el('tbody', {}, ...body)));
}

/** A density as a bar that fills; `set(value, first)` lets it regrow. first: where it began, marked. */
export function bar(wide = false) {
  const fill = el('i');
  const mark = el('b', { hidden: true });
  const made = el('div', { class: wide ? 'bar wide' : 'bar', role: 'meter', 'aria-valuemin': '0', 'aria-valuemax': '1' }, fill, mark);
  let shown = null;
  let whose = null;
  made.set = (who, value, first) => {
    const key = `${who} ${value} ${first}`;
    if (key === shown) return;
    shown = key;
    fill.className = who === whose ? '' : 'still'; // it regrows; another device's bar does not become this one's
    whose = who;
    fill.style.transform = `scaleX(${value ?? 0})`;
    mark.hidden = !known(first) || first >= value;
    if (!mark.hidden) mark.style.left = `${100 * first}%`;
    made.setAttribute('aria-label', `Density of ${who}`);
    made.setAttribute('aria-valuenow', value ?? 0);
    made.setAttribute('aria-valuetext', `${percent(value)} of the model`);
  };
  return made;
}

/** What a device is doing, in one word, and whether that is bad. */
export function stateOf(row) {
  if (row.declined || row.excluded) return ['cannot train', 'bad'];
  if (row.resting) return [`resting: ${row.resting}`, 'warn'];
  if (!row.online) return ['silent', 'bad'];
  if (row.standing) return [row.standing, 'warn'];
  if (row.limit) return ['limited', 'warn'];
  return ['online', ''];
}
