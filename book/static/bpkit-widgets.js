// Draws the saved widgets of a page without a kernel and without any other library. The page carries the
// widgets' state and, where each is to stand, a small script that names its model; both come from the notebook.
(() => {
  const STATE = "application/vnd.jupyter.widget-state+json";
  const VIEW = "application/vnd.jupyter.widget-view+json";

  // What an anywidget module expects of a model. There is nobody to send to, and nothing to save.
  function createModel(values) {
    const listeners = new Map();
    const emit = (name) => (listeners.get(name) ?? new Set()).forEach((listener) => listener());
    return {
      get: (name) => values[name],
      set(name, value) {
        if (Object.is(values[name], value)) return;
        values[name] = value;
        emit(`change:${name}`);
        emit("change");
      },
      on(name, listener) {
        if (!listeners.has(name)) listeners.set(name, new Set());
        listeners.get(name).add(listener);
      },
      off: (name, listener) => listeners.get(name)?.delete(listener),
      save_changes() {},
      send() {},
    };
  }

  // Binary traits are kept apart from the rest of the state, in base64.
  function restoreBuffers({ state, buffers = [] }) {
    for (const { path, data } of buffers) {
      const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
      const owner = path.slice(0, -1).reduce((at, key) => at[key], state);
      owner[path.at(-1)] = new DataView(bytes.buffer);
    }
    return state;
  }

  async function importText(source) {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    try { return await import(url); } finally { URL.revokeObjectURL(url); }
  }

  function addStyle(id, css) {
    if (!css || document.getElementById(id)) return;
    const style = document.createElement("style");
    style.id = id;
    style.textContent = css;
    document.head.append(style);
  }

  // Views of one model share it, and with it the reader's choices.
  async function createWidget(saved) {
    const values = restoreBuffers(saved);
    const { default: exported } = await importText(values._esm);
    const definition = typeof exported === "function" ? await exported() : exported;
    const model = createModel(values);
    addStyle(`style-${values._anywidget_id}`, values._css);
    await definition.initialize?.({ model });
    return { model, definition };
  }

  async function drawView(script, models, made) {
    const id = JSON.parse(script.textContent).model_id;
    const saved = models[id];
    // A page may name this loader twice: once for a notebook's figures, once for a figure put in by hand.
    if (!saved?.state?._esm || script.dataset.drawn) return;
    script.dataset.drawn = "true";
    made[id] ??= createWidget(saved);
    const { model, definition } = await made[id];
    const place = document.createElement("div");
    place.className = "bpkit-widget";
    script.after(place);
    await definition.render({ model, el: place, live: false });
  }

  async function start() {
    const models = {};
    for (const script of document.querySelectorAll(`script[type="${STATE}"]`)) {
      Object.assign(models, JSON.parse(script.textContent).state);
    }
    const made = {};
    const views = [...document.querySelectorAll(`script[type="${VIEW}"]`)];
    await Promise.all(views.map((script) => drawView(script, models, made).catch((error) => {
      console.error("bpkit: this figure could not be drawn", error);
      script.after("This figure could not be drawn.");
    })));
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
