// An explorer's part in the browser, a module of anywidget's. Each view of it lies in its explorer.
const NO_KERNEL = 'No kernel answers: this is the last view. Run the cell again to explore.';
const DIRECTIONS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

export default {
  render({model, el}) {
    const [hidden, words] = [document.createElement('style'), document.createElement('p')];
    hidden.textContent = `.ll-still.${model.get('still')} { display: none }`;
    words.textContent = NO_KERNEL;
    words.className = 'll-no-kernel';
    el.append(hidden, words);
    const gone = new AbortController();
    const begin = () => {  // a view is drawn before it is put into its place
      const root = el.closest('.ll-explorer');
      if (root) {
        el.append(...tools(root, model, gone.signal));
        explore(root, model, gone.signal);
      }
      else if (!gone.signal.aborted) requestAnimationFrame(begin);
    };
    begin();
    return () => gone.abort();
  },
};

// Do something now, and at every change of what the kernel tells, until the view is gone.
function follow(model, signal, name, act) {
  model.on(`change:${name}`, act);
  signal.addEventListener('abort', () => model.off(`change:${name}`, act));
  act();
}

function explore(root, model, signal) {
  const listen = (type, act, capture = false) => root.addEventListener(type, act, {signal, capture});
  const tell = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const observer = new MutationObserver(() => {  // parts come one after another, and again
    nameSliders(root);
    mark();
    refocus();
  });
  observer.observe(root, {childList: true, subtree: true});
  signal.addEventListener('abort', () => observer.disconnect());
  nameSliders(root);
  const preview = previewOf(root, model, signal);
  follow(model, signal, 'busy', () => {
    root.classList.toggle('ll-working', model.get('busy'));
    if (!model.get('busy')) preview.end();
  });
  const mark = () => {
    for (const spot of root.querySelectorAll('.ll-spot'))
      spot.setAttribute('aria-pressed', spot.value === model.get('picked'));
  };
  follow(model, signal, 'picked', mark);

  let held = null;  // the value of the point with the focus, which a new picture would lose
  document.addEventListener('focusin', event => { held = event.target.closest('.ll-spot')?.value }, {signal});
  document.addEventListener('pointerdown', event => { held = event.target.closest('.ll-spot')?.value }, {signal});
  const refocus = () => {
    if (held === undefined || held === null || document.activeElement !== document.body) return;
    const spots = [...root.querySelectorAll('.ll-spot')];
    const spot = spots.find(other => other.value === held) || spots.find(other => other.tabIndex === 0);
    if (spot) focusOn(spot);
  };

  let pressed = null;
  listen('pointerdown', event => { pressed = event }, true);
  listen('click', event => {
    const plane = event.target.closest('.ll-plane');
    if (!plane) return;
    const byKey = event.detail === 0;
    const moved = byKey || !pressed ? 0 : distance(event, pressed);
    const spot = byKey ? event.target.closest('.ll-spot') : nearest(plane, event);
    if (!spot || moved >= 5) return;
    focusOn(spot);
    tell('picked', spot.value);
  });
  listen('keydown', event => {
    const control = event.ctrlKey || event.metaKey;
    if (control && !event.shiftKey && event.key === 'z' && !event.target.isContentEditable) {
      event.preventDefault();
      event.stopPropagation();
      model.send('undo');
      return;
    }
    const spot = event.target.closest('.ll-spot');
    if (event.key !== 'Shift' && !event.shiftKey || event.key === 'Escape') dropStretched();
    if (!spot || control || event.altKey) return;
    const steps = event.shiftKey ? [] : ['Home', 'End', 'PageUp', 'PageDown'];
    if (!(event.key in DIRECTIONS) && !steps.includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    const to = next(spot, event.key), area = spot.closest('.ll-plane').querySelector('.ll-brush');
    if (event.shiftKey && area) {
      stretched = stretched || rubber(area, preview, ...centre(spot));
      stretched.to(...centre(to));
    }
    focusOn(to);
  });
  let stretched = null;  // a rectangle, while the shift key is held
  const dropStretched = () => {
    if (stretched) preview.end();
    stretched = null;
  };
  const brushed = corners => tell('brushed', corners.join(','));
  listen('keyup', event => {
    if (event.key !== 'Shift' || !stretched) return;
    brushed(stretched.corners());
    stretched = null;
  });
  listen('pointerdown', down => {
    const plane = down.target.closest('.ll-plane'), area = plane?.querySelector('.ll-brush');
    if (!area || down.button || down.pointerType === 'touch') return;  // a finger scrolls; sliders do the same
    const box = area.getBoundingClientRect();
    if (down.clientX < box.left || down.clientX > box.right || down.clientY < box.top || down.clientY > box.bottom)
      return;
    down.preventDefault();  // no dragging of the image, no selecting of text
    brush(plane, rubber(area, preview, down.clientX, down.clientY), down, brushed, preview.end);
  });
}

// A slider's handle takes the keys but has no name of its own: it gets that of its label.
function nameSliders(root) {
  for (const slider of root.querySelectorAll('.widget-slider, .widget-readout-slider')) {
    const label = slider.querySelector('.widget-label');
    if (!label) continue;
    for (const handle of slider.querySelectorAll('.noUi-handle, [contenteditable]'))
      handle.setAttribute('aria-label', label.textContent);
    const ends = slider.querySelectorAll('.noUi-handle');
    if (ends.length === 2)
      ends.forEach((end, i) => end.setAttribute('aria-label', `${label.textContent}, ${['from', 'to'][i]}`));
  }
}

// Pictures with points to pick and a rectangle to draw (_clickable.py).
const spotsOf = spot => [...spot.closest('.ll-plane').querySelectorAll('.ll-spot')];
const distance = (one, other) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
const centre = element => {
  const box = element.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
};
const focusOn = spot => {
  for (const other of spotsOf(spot)) other.tabIndex = other === spot ? 0 : -1;
  spot.focus({preventScroll: true});
};

// Where points crowd, the button on top is not the one that was meant, and a finger is wider than a point.
function nearest(plane, event) {
  let best = null, least = event.pointerType === 'touch' ? 24 : 12;
  for (const spot of plane.querySelectorAll('.ll-spot')) {
    const [x, y] = centre(spot);
    const far = Math.hypot(event.clientX - x, event.clientY - y) + (spot === event.target ? 0 : 1e-3);
    if (far < least) [best, least] = [spot, far];
  }
  return best;
}

function next(spot, key) {
  const others = spotsOf(spot).filter(other => other === spot || !other.classList.contains('ll-aside'));
  const at = others.indexOf(spot);
  if (key === 'Home' || key === 'End') return others.at(key === 'Home' ? 0 : -1);
  if (key === 'PageUp' || key === 'PageDown') return others[at + (key === 'PageUp' ? -1 : 1)] || spot;
  const [right, down] = DIRECTIONS[key], [x, y] = centre(spot);
  let best = spot, least = Infinity;
  for (const other of others) {
    const [dx, dy] = centre(other).map((place, i) => place - [x, y][i]);
    const along = dx * right + dy * down, cost = along + 2 * Math.abs(dx * down + dy * right);
    if (along > 0.5 && cost < least) [best, least] = [other, cost];
  }
  return best;
}

// A rectangle from one point of the window to another, its corners in shares of the area from the lower left.
function rubber(area, preview, fromX, fromY) {
  const box = area.getBoundingClientRect();
  const share = (way, whole) => Number(Math.min(1, Math.max(0, way / whole)).toFixed(4));
  const at = (x, y) => [share(x - box.left, box.width), share(box.bottom - y, box.height)];
  const from = at(fromX, fromY);
  let to = from;
  return {
    to(x, y) {
      to = at(x, y);
      preview.show(area, from, to);
    },
    corners: () => [...from, ...to],
  };
}

// The rectangle, with the points within it in colour and the others pale, until the kernel's picture shows that choice.
// What they are drawn with, the kernel has sent before (RunPlane.for_page).
function previewOf(root, model, signal) {
  const drawn = document.createElement('div'), canvas = document.createElement('canvas');
  [drawn.className, canvas.className] = ['ll-rubber', 'll-points'];
  const pen = canvas.getContext('2d');
  const decoded = png => createImageBitmap(new Blob([png], {type: 'image/png'}));
  const numbers = (kind, view) => new kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  let points = null;
  follow(model, signal, 'points', async () => {
    const sent = model.get('points'), {side} = sent;
    if (!side) return;
    const [under, sheet] = await Promise.all([sent.under, sent.markers].map(decoded));
    const columns = sheet.width / side, squares = Array.from({length: columns * sheet.height / side}, (_, number) =>
      createImageBitmap(sheet, side * (number % columns), side * Math.floor(number / columns), side, side));
    const markers = await Promise.all(squares);  // parts of one picture would be drawn more slowly
    if (sent !== model.get('points')) return;
    const [scores, places] = [numbers(Float64Array, sent.scores), numbers(Int16Array, sent.places)];
    points = {...sent, under, markers, scores, places};
    [canvas.width, canvas.height] = [under.width, under.height];
  });
  const draw = ends => {
    const {limits, step, under, markers, scores, places} = points;
    const steps = ends.map((shares, axis) => {  // whole ones, as RunChoice.take_brush has them
      const [low, high] = shares.map(share => limits[axis][0] + share * (limits[axis][1] - limits[axis][0]));
      return [Math.floor(low / step), Math.ceil(high / step)];
    });
    if (canvas.isConnected && points.drawn === `${steps}`) return;
    points.drawn = `${steps}`;
    const [[left, right], [bottom, top]] = steps.map(([low, high]) => [low * step - 1e-9, high * step + 1e-9]);
    pen.drawImage(under, 0, 0);
    for (let point = 0; 2 * point < scores.length; point++) {
      const [x, y] = [scores[2 * point], scores[2 * point + 1]];
      if (x < left || x > right || y < bottom || y > top) continue;
      pen.drawImage(markers[places[3 * point]], places[3 * point + 1], places[3 * point + 2]);
    }
  };
  return {
    show(area, from, to) {
      const ends = from.map((share, axis) => [Math.min(share, to[axis]), Math.max(share, to[axis])]);
      const [[left, right], [bottom, top]] = ends;
      const sides = {left, bottom, width: right - left, height: top - bottom};
      for (const [side, share] of Object.entries(sides)) drawn.style[side] = `${100 * share}%`;
      if (drawn.parentNode !== area) area.append(drawn);
      if (!points) return;
      draw(ends);
      if (!canvas.isConnected) area.before(canvas);
    },
    end() {
      drawn.remove();
      canvas.remove();
    },
  };
}

// Follow the pointer until it is released; then `done` gets the corners, unless it has not moved: that picks.
// It is followed on the whole plane, since a brush may begin on a point; where there are thousands, it must.
function brush(plane, drawn, down, done, dropped) {
  let moved = false;
  plane.setPointerCapture(down.pointerId);
  const draw = event => {
    moved = moved || distance(event, down) >= 5;
    if (moved) drawn.to(event.clientX, event.clientY);
  };
  const released = new AbortController();
  const end = event => {
    released.abort();
    if (event.type === 'pointerup' && moved) done(drawn.corners());
    else dropped();
  };
  const events = {pointermove: draw, pointerup: end, pointercancel: end};
  for (const [type, act] of Object.entries(events)) plane.addEventListener(type, act, {signal: released.signal});
}

// The buttons of every explorer: undo, the code of this view, its pictures.
function tools(root, model, signal) {
  const make = (tag, name, more) => Object.assign(document.createElement(tag), {className: name, ...more});
  const bar = make('div', 'll-tools'), said = make('span', 'll-said'), code = make('pre', 'll-code', {hidden: true});
  said.setAttribute('role', 'status');
  code.tabIndex = 0;
  const say = words => { said.textContent = words };
  const button = (textContent, title, act) => {
    const made = make('button', 'jupyter-button widget-button', {type: 'button', textContent, title});
    made.addEventListener('click', () => {
      say('');
      act(made);
    });
    bar.append(made);
    return made;
  };
  const undo = button('Undo', 'take the last choice back: Ctrl+Z', () => model.send('undo'));
  const show = () => {
    undo.setAttribute('aria-disabled', !model.get('undoable'));  // not disabled: the focus would be lost
    code.textContent = model.get('code');
    say('');
  };
  for (const name of ['undoable', 'code']) follow(model, signal, name, show);
  const shown = button('Code', 'show and copy a line of Python that makes this view', async made => {
    code.hidden = !code.hidden;
    made.setAttribute('aria-expanded', !code.hidden);
    if (code.hidden) return;
    const copied = navigator.clipboard?.writeText(code.textContent);
    say(await worked(copied) ? 'The line is in the clipboard.' : 'Select the line to copy it.');
  });
  shown.setAttribute('aria-expanded', false);
  button('Copy picture', 'copy the pictures of this view as one', async () => {
    const picture = pictures(root);
    const item = window.ClipboardItem && new ClipboardItem({'image/png': picture});
    if (await worked(item && navigator.clipboard?.write([item]))) {
      say('The picture is in the clipboard.');
    } else {
      make('a', '', {href: URL.createObjectURL(await picture), download: 'explorer.png'}).click();
      say('The clipboard is not allowed here: the picture is saved as explorer.png.');
    }
  });
  bar.append(said);
  return [bar, code];
}

const worked = async promise => {
  try {
    await promise;
    return promise !== undefined;
  } catch {
    return false;
  }
};

// The pictures in their rows, with a ring around the point that is picked, as a PNG.
function pictures(root) {
  const rows = [], canvas = document.createElement('canvas');
  for (const image of root.querySelectorAll('img')) {
    if (!image.naturalWidth || !image.checkVisibility()) continue;
    const box = image.getBoundingClientRect();
    if (!rows.length || box.top >= rows.at(-1).bottom) rows.push({images: [], width: 0, height: 0});
    const row = rows.at(-1);
    row.images.push([image, row.width]);
    row.bottom = box.bottom;
    row.width += image.naturalWidth;
    row.height = Math.max(row.height, image.naturalHeight);
  }
  canvas.width = Math.max(...rows.map(row => row.width));
  canvas.height = rows.reduce((sum, row) => sum + row.height, 0);
  const pen = canvas.getContext('2d');
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  let y = 0;
  for (const row of rows) {
    for (const [image, x] of row.images) {
      pen.drawImage(image, x, y);
      const spot = image.closest('.ll-plane')?.querySelector('.ll-spot[aria-pressed="true"]');
      if (!spot) continue;
      const [left, top] = [spot.style.left, spot.style.top].map(place => parseFloat(place) / 100);
      pen.lineWidth = 2.5;
      pen.beginPath();
      pen.arc(x + left * image.naturalWidth, y + top * image.naturalHeight, 9, 0, 2 * Math.PI);
      pen.stroke();
    }
    y += row.height;
  }
  return new Promise(done => canvas.toBlob(done, 'image/png'));
}
