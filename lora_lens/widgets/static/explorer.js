// Runs once for each displayed explorer, with `root`, its element.
// A slider's handle takes the keys but has no name of its own: it gets that of its label.
for (const slider of root.querySelectorAll('.widget-slider, .widget-readout-slider')) {
  const label = slider.querySelector('.widget-label');
  for (const handle of slider.querySelectorAll('.noUi-handle, [contenteditable]'))
    if (label) handle.setAttribute('aria-label', label.textContent);
  const ends = slider.querySelectorAll('.noUi-handle');
  if (label && ends.length === 2)
    ends.forEach((end, i) => end.setAttribute('aria-label', `${label.textContent}, ${['from', 'to'][i]}`));
}

// Pictures with spots and a brush (clickable.py). A choice reaches Python as the value of a hidden text field.
const hand = (kind, value) => {
  const field = root.querySelector(`.${kind} input`);
  if (!field) return;
  field.value = value;
  for (const event of ['input', 'change']) field.dispatchEvent(new Event(event, {bubbles: true}));
};
const spotsOf = spot => [...spot.closest('.ll-plane').querySelectorAll('.ll-spot')];
const centre = element => {
  const box = element.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
};
const focusOn = spot => {
  for (const other of spotsOf(spot)) other.tabIndex = other === spot ? 0 : -1;
  spot.focus({preventScroll: true});
};
const pick = spot => {
  for (const other of spotsOf(spot)) other.setAttribute('aria-pressed', other === spot);
  focusOn(spot);
  hand('ll-picked', spot.value);
};
// Where points crowd, the button on top is not the one that was meant, and a finger is wider than a point.
const nearest = (plane, event) => {
  let best = null, least = event.pointerType === 'touch' ? 24 : 12;
  for (const spot of plane.querySelectorAll('.ll-spot')) {
    const [x, y] = centre(spot);
    const far = Math.hypot(event.clientX - x, event.clientY - y) + (spot === event.target ? 0 : 1e-3);
    if (far < least) [best, least] = [spot, far];
  }
  return best;
};
let pressed = null;
root.addEventListener('pointerdown', event => { pressed = event }, true);
root.addEventListener('click', event => {
  const plane = event.target.closest('.ll-plane');
  if (!plane) return;
  const byKey = event.detail === 0;
  const moved = !byKey && pressed ? Math.hypot(event.clientX - pressed.clientX, event.clientY - pressed.clientY) : 0;
  const spot = byKey ? event.target.closest('.ll-spot') : nearest(plane, event);
  if (spot && moved < 5) pick(spot);
});
const directions = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const next = (spot, key) => {
  const others = spotsOf(spot).filter(other => other === spot || !other.classList.contains('ll-aside'));
  const at = others.indexOf(spot);
  if (key === 'Home' || key === 'End') return others.at(key === 'Home' ? 0 : -1);
  if (key === 'PageUp' || key === 'PageDown') return others[at + (key === 'PageUp' ? -1 : 1)] || spot;
  const [right, down] = directions[key], [x, y] = centre(spot);
  let best = spot, least = Infinity;
  for (const other of others) {
    const [dx, dy] = centre(other).map((place, i) => place - [x, y][i]);
    const along = dx * right + dy * down, cost = along + 2 * Math.abs(dx * down + dy * right);
    if (along > 0.5 && cost < least) [best, least] = [other, cost];
  }
  return best;
};
root.addEventListener('keydown', event => {
  const spot = event.target.closest('.ll-spot');
  if (!spot || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (!(event.key in directions) && !['Home', 'End', 'PageUp', 'PageDown'].includes(event.key)) return;
  event.preventDefault();
  event.stopPropagation();
  focusOn(next(spot, event.key));
});
root.addEventListener('pointerdown', down => {
  const area = down.target.closest('.ll-brush');
  if (!area || down.button || down.pointerType === 'touch') return;  // a finger scrolls; sliders do the same
  down.preventDefault();  // no dragging of the image, no selecting of text
  const box = area.getBoundingClientRect();
  const share = (place, start, length) => Math.min(1, Math.max(0, (place - start) / length));
  const at = event => [share(event.clientX, box.left, box.width), share(event.clientY, box.top, box.height)];
  const [x0, y0] = at(down);
  const drawn = document.createElement('div');
  drawn.className = 'll-rubber';
  area.setPointerCapture(down.pointerId);
  const draw = event => {
    if (Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) >= 5) area.append(drawn);
    const [x, y] = at(event);
    const sides = {left: Math.min(x, x0), top: Math.min(y, y0), width: Math.abs(x - x0), height: Math.abs(y - y0)};
    for (const [side, length] of Object.entries(sides)) drawn.style[side] = `${100 * length}%`;
  };
  const end = event => {
    for (const [name, does] of events) area.removeEventListener(name, does);
    if (event.type === 'pointerup' && drawn.isConnected) {
      const [x, y] = at(event);
      hand('ll-brushed', [x0, 1 - y0, x, 1 - y].map(share => share.toFixed(4)).join(','));
    }
    drawn.remove();
  };
  const events = [['pointermove', draw], ['pointerup', end], ['pointercancel', end]];
  for (const [name, does] of events) area.addEventListener(name, does);
});
