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
      if (root) explore(root, model, gone.signal);
      else if (!gone.signal.aborted) requestAnimationFrame(begin);
    };
    begin();
    return () => gone.abort();
  },
};

function explore(root, model, signal) {
  const listen = (type, act, capture = false) => root.addEventListener(type, act, {signal, capture});
  const tell = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const observer = new MutationObserver(() => nameSliders(root));  // they come one after another
  observer.observe(root, {childList: true, subtree: true});
  signal.addEventListener('abort', () => observer.disconnect());
  nameSliders(root);
  const working = () => root.classList.toggle('ll-working', model.get('busy'));
  model.on('change:busy', working);
  signal.addEventListener('abort', () => model.off('change:busy', working));
  working();

  let pressed = null;
  listen('pointerdown', event => { pressed = event }, true);
  listen('click', event => {
    const plane = event.target.closest('.ll-plane');
    if (!plane) return;
    const byKey = event.detail === 0;
    const moved = byKey || !pressed ? 0 : distance(event, pressed);
    const spot = byKey ? event.target.closest('.ll-spot') : nearest(plane, event);
    if (!spot || moved >= 5) return;
    for (const other of spotsOf(spot)) other.setAttribute('aria-pressed', other === spot);
    focusOn(spot);
    tell('picked', spot.value);
  });
  listen('keydown', event => {
    const spot = event.target.closest('.ll-spot');
    if (!spot || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (!(event.key in DIRECTIONS) && !['Home', 'End', 'PageUp', 'PageDown'].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    focusOn(next(spot, event.key));
  });
  listen('pointerdown', down => {
    const area = down.target.closest('.ll-brush');
    if (!area || down.button || down.pointerType === 'touch') return;  // a finger scrolls; sliders do the same
    down.preventDefault();  // no dragging of the image, no selecting of text
    brush(area, down, corners => tell('brushed', corners.map(share => share.toFixed(4)).join(',')));
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

// Follow the pointer until it is released; then `done` gets two corners, in shares from the lower left.
function brush(area, down, done) {
  const box = area.getBoundingClientRect();
  const share = (place, start, length) => Math.min(1, Math.max(0, (place - start) / length));
  const at = event => [share(event.clientX, box.left, box.width), share(event.clientY, box.top, box.height)];
  const [x0, y0] = at(down);
  const drawn = document.createElement('div');
  drawn.className = 'll-rubber';
  area.setPointerCapture(down.pointerId);
  const draw = event => {
    if (distance(event, down) >= 5) area.append(drawn);
    const [x, y] = at(event);
    const sides = {left: Math.min(x, x0), top: Math.min(y, y0), width: Math.abs(x - x0), height: Math.abs(y - y0)};
    for (const [side, length] of Object.entries(sides)) drawn.style[side] = `${100 * length}%`;
  };
  const released = new AbortController();
  const end = event => {
    released.abort();
    if (event.type === 'pointerup' && drawn.isConnected) {
      const [x, y] = at(event);
      done([x0, 1 - y0, x, 1 - y]);
    }
    drawn.remove();
  };
  const events = {pointermove: draw, pointerup: end, pointercancel: end};
  for (const [type, act] of Object.entries(events)) area.addEventListener(type, act, {signal: released.signal});
}
