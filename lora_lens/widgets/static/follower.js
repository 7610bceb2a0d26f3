// While a window's sliders move, what they move in pictures is drawn here; the kernel's pictures come after it and
// take its place (_follower.py). Canvases lie over those parts of a picture alone: its words are the kernel's.
const PREFIX = 'IPY_MODEL_';

export default {
  async render({model, el}) {
    const gone = new AbortController();
    const ids = ['rank', 'position'].map(name => model.get(name).slice(PREFIX.length));
    const sliders = await Promise.all(ids.map(id => model.widget_manager.get_model(id)));
    const begin = () => {  // a view is drawn before it is put into its place
      const root = el.closest('.ll-explorer');
      if (root) follow(root, model, sliders, gone.signal);
      else if (!gone.signal.aborted) requestAnimationFrame(begin);
    };
    begin();
    return () => gone.abort();
  },
};

function follow(root, model, [rank, position], signal) {
  let parts = {};
  const draw = () => {
    for (const image of root.querySelectorAll('img[data-follows]')) {
      const part = parts[image.dataset.follows], size = rank.get('value');
      for (const canvas of image.parentElement.querySelectorAll('canvas'))
        if (!part?.canvases.includes(canvas)) canvas.remove();
      if (!part) continue;
      const start = nearest(position.get('value') * (part.k - size)), shown = `${start}, ${start + size}`;
      if (size > part.k || shown === image.dataset.window) {  // the kernel has come
        part.canvases.forEach(canvas => canvas.remove());
      } else {
        if (shown !== part.canvases[0].dataset.window) part.draw(start, start + size);
        part.canvases.forEach((canvas, number) => lay(canvas, image, part.boxes[number], shown));
      }
    }
  };
  const listen = (about, event, act) => {
    about.on(event, act);
    signal.addEventListener('abort', () => about.off(event, act));
  };
  const take = async () => {
    const sent = model.get('parts');
    const made = await Promise.all(Object.entries(sent).map(async ([name, part]) =>
      [name, {...part, ...await KINDS[part.kind](part)}]));
    if (sent === model.get('parts')) parts = Object.fromEntries(made);
  };
  listen(model, 'change:parts', take);
  take();
  for (const slider of [rank, position]) listen(slider, 'change:value', draw);
  const observer = new MutationObserver(draw);  // a picture of the kernel's, perhaps of an earlier place
  observer.observe(root, {childList: true, subtree: true});
  signal.addEventListener('abort', () => observer.disconnect());
  const resized = new ResizeObserver(draw);  // and the pictures with it
  resized.observe(root);
  signal.addEventListener('abort', () => resized.disconnect());
}

// To the nearest whole number and of two to the even one, as Python rounds.
function nearest(value) {
  const whole = Math.round(value);
  return whole - value === 0.5 && whole % 2 ? whole - 1 : whole;
}

function lay(canvas, image, [left, top, width, height], shown) {
  canvas.dataset.window = shown;
  canvas.className = `ll-follows ${image.className}`;  // whose colours it has in the dark
  Object.assign(canvas.style, {
    left: `${image.offsetLeft + left * image.offsetWidth}px`, width: `${width * image.offsetWidth}px`,
    top: `${image.offsetTop + top * image.offsetHeight}px`, height: `${height * image.offsetHeight}px`,
  });
  if (!image.parentElement.contains(canvas)) image.after(canvas);
}

const floats = view => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const canvasOf = (width, height) => Object.assign(document.createElement('canvas'), {width, height});

// Values from `low` to `high` in the colours of a map, 256 of red, green, blue and opacity.
function paint(canvas, values, low, high, colours) {
  const pen = canvas.getContext('2d'), image = pen.createImageData(canvas.width, canvas.height);
  values.forEach((value, place) => {
    const colour = Math.min(255, Math.max(0, Math.floor(256 * (value - low) / (high - low))));
    for (let channel = 0; channel < 4; channel++)
      image.data[4 * place + channel] = colours.getUint8(4 * colour + channel);
  });
  pen.putImageData(image, 0, 0);
}

const KINDS = {
  // The shade over the curve.
  async spectrum({under, boxes: [[left, top, width, height]], limits: [low, high], shade}) {
    const picture = await createImageBitmap(new Blob([under], {type: 'image/png'}));
    const whole = {width: Math.round(width * picture.width), height: Math.round(height * picture.height)};
    const [x, y] = [Math.round(left * picture.width), Math.round(top * picture.height)];
    const canvas = canvasOf(whole.width, whole.height), pen = canvas.getContext('2d');
    pen.fillStyle = shade;
    canvas.style.imageRendering = 'auto';  // a curve, not cells of a matrix
    const place = component => (component - 0.5 - low) / (high - low) * whole.width;
    const draw = (start, stop) => {
      pen.drawImage(picture, -x, -y);
      pen.fillRect(place(start), 0, place(stop) - place(start), whole.height);
    };
    const pixels = [x / picture.width, y / picture.height, whole.width / picture.width, whole.height / picture.height];
    return {canvases: [canvas], boxes: [pixels], draw};
  },

  // The slice, `left` times `right`, and what it leaves of the whole.
  async matrices({k, rows, columns, left, right, whole, scale, colours}) {
    [left, right, whole] = [left, right, whole].map(floats);
    const canvases = [canvasOf(columns, rows), canvasOf(columns, rows)];
    const draw = (start, stop) => {
      const slice = new Float32Array(rows * columns);
      for (let row = 0; row < rows; row++)
        for (let component = start; component < stop; component++) {
          const share = left[row * k + component];
          for (let column = 0; column < columns; column++)
            slice[row * columns + column] += share * right[component * columns + column];
        }
      const top = slice.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
      paint(canvases[0], slice, -top, top, colours);
      paint(canvases[1], whole.map((value, place) => value - slice[place]), -scale, scale, colours);
    };
    return {canvases, draw};
  },

  // The lengths of what window and residual have at each patch: first all images of the one, then of the other.
  async maps({k, side, energies, rounding, colours}) {
    energies = floats(energies);
    const patches = energies.length / k, images = patches / side ** 2;
    const canvases = Array.from({length: 2 * images}, () => canvasOf(side, side));
    const draw = (start, stop) => {
      const lengths = [new Float32Array(patches), new Float32Array(patches)];
      for (let patch = 0; patch < patches; patch++) {
        let [inside, outside] = [0, 0];
        for (let component = 0; component < k; component++) {
          const energy = energies[patch * k + component];
          if (component >= start && component < stop) inside += energy;
          else outside += energy;
        }
        [lengths[0][patch], lengths[1][patch]] = [Math.sqrt(inside), Math.sqrt(outside)];
      }
      const tops = lengths.map(values => values.reduce((most, value) => Math.max(most, value), 0));
      canvases.forEach((canvas, number) => {
        const part = Math.floor(number / images), from = (number % images) * side ** 2;
        const top = tops[part] > rounding * Math.max(...tops) ? tops[part] : 1;
        paint(canvas, lengths[part].subarray(from, from + side ** 2), 0, top, colours);
      });
    };
    return {canvases, draw};
  },
};
