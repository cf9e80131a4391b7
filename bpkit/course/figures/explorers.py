"""Interactive figures that are live in JupyterLab and still work on a page without a kernel.

An explorer is an anywidget whose view is computed in JavaScript from synced data. The JavaScript lies in
small modules in ``static/``; `bundle` joins those that a figure needs, so that a later explorer is a new main
module and reuses the rest.
"""

from __future__ import annotations

import html
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from bpkit.measure import FORMAT, Parts
from bpkit.measure import scaling as measure_scaling
from bpkit.plan.action import VERBS
from bpkit.show.looks import css

#: The parts of a step time, in the order in which the figure stacks them.
PARTS = tuple(Parts.__dataclass_fields__)
#: Modules of the scaling explorer, each after those that it imports.
MODULES = ("text", "dom", "data", "speedup", "bars", "kinds", "timeline", "describe", "controls", "explorer")
# A progress message costs the kernel and the browser more than it tells a reader.
SECONDS_BETWEEN_MESSAGES = 0.1

_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([\w-]+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:function|const|class) (\w+))", re.MULTILINE)
_DEFAULT = re.compile(r"^export default ", re.MULTILINE)


def bundle(*modules: str) -> str:
    """Join JavaScript modules of ``static/`` into one, since an anywidget's source is a single module.

    Each module becomes a function that is called once and returns what it exports, so names that it does not
    export stay its own.

    Parameters
    ----------
    modules : str
        Names without ``.js``, each after those that it imports. The last is the figure: a default export.

    Returns
    -------
    str
        The source of one module without imports.
    """
    *parts, main = [_wrap(_source(name)) for name in modules]
    named = [f"const ${name} = {part}" for name, part in zip(modules, parts, strict=False)]
    return "\n".join([*named, f"export default {main}"])


def _source(name: str) -> str:
    """The text of a module; that of ``kinds``, how each kind of action is drawn, comes from the one table of them."""
    if name == "kinds":
        return f"export const LOOKS = {json.dumps({kind: verb.look for kind, verb in VERBS.items()})};\n"
    return (files("bpkit.course.figures") / "static" / f"{name}.js").read_text(encoding="utf-8")


def _wrap(source: str) -> str:
    names = ", ".join(match.group(2) for match in _EXPORT.finditer(source))
    taken = _IMPORT.sub(lambda found: f"const {found[1].replace(' as ', ': ')} = ${found[2]};", source)
    body = _EXPORT.sub(r"\1", taken)
    if not names:
        return f"(() => {{\n{_DEFAULT.sub('return ', body)}}})();"
    return f"(() => {{\n{body}return {{ {names} }};\n}})();"


def stylesheet(name: str) -> str:
    """The text of a stylesheet of ``static/``; the colours of kinds and parts come before that of the explorers."""
    text = (files("bpkit.course.figures") / "static" / f"{name}.css").read_text(encoding="utf-8")
    return css() + text if name == "explorer" else text


class Explorer(anywidget.AnyWidget):
    """The figure of a scaling experiment; made by `explorer`, which describes it.

    What the reader does is synced, so a cell can read it: ``workers``, ``scaling``, ``choice`` (index of the
    recorded run), ``revealed``, ``prediction`` (``{"strong": {"2": 1.8}}``) and ``own`` (the measurements
    made with the button). After a failed run, ``failure`` holds the exception.
    """

    _esm = bundle(*MODULES)
    _css = stylesheet("explorer")

    recorded: Any = traitlets.List().tag(sync=True)
    own: Any = traitlets.List().tag(sync=True)
    workers = traitlets.Int(1).tag(sync=True)
    scaling = traitlets.Unicode("strong").tag(sync=True)
    choice = traitlets.Int(0).tag(sync=True)
    prediction = traitlets.Dict().tag(sync=True)
    revealed = traitlets.Bool(False).tag(sync=True)
    measurable = traitlets.Bool(False).tag(sync=True)
    measure_workers = traitlets.List(traitlets.Int()).tag(sync=True)
    #: "", "starting", "running", "stopping", "stopped", "measured" or "failed"; the figure has the words for it.
    phase = traitlets.Unicode("").tag(sync=True)
    progress = traitlets.Float(0.0).tag(sync=True)
    status = traitlets.Unicode("").tag(sync=True)
    error = traitlets.Unicode("").tag(sync=True)

    def __init__(self, run: Callable[..., dict[str, Any]] | None = None, **traits: Any) -> None:
        super().__init__(measurable=run is not None, **traits)
        self.failure: BaseException | None = None
        self._run = run
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # an observer of a trait may call stop()
        self.on_msg(self._receive)

    def __repr__(self) -> str:
        # Fixed: an address here would make every execution of a notebook differ.
        return f"Explorer({len(self.recorded)} recorded)"

    def _receive(self, widget: Explorer, content: dict[str, Any], buffers: list[memoryview]) -> None:
        # Returns at once. A run inside this callback would keep the kernel from ever receiving "stop".
        if content.get("kind") == "measure":
            self.measure(content.get("scaling", "strong"))
        elif content.get("kind") == "stop":
            self.stop()

    def measure(self, scaling: str = "strong") -> None:
        """Start a measurement on this machine in a thread of its own, and return at once.

        Parameters
        ----------
        scaling : "strong" or "weak"
            Fixed global batch, or fixed batch a worker.

        Raises
        ------
        RuntimeError
            If the explorer was made without a network and data. While a run is under way, a call does
            nothing.
        """
        if self._run is None:
            raise RuntimeError("nothing to measure: pass network= and data= to bp.course.explorer")
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stop.clear()
            # A daemon: the kernel's Restart must not wait for a measurement.
            self._thread = threading.Thread(target=self._measure, args=(scaling,), daemon=True)
            self._show(phase="starting", progress=0.0, status="", error="")
            self._thread.start()

    def stop(self) -> None:
        """Ask the running measurement to end; it polls for this between steps."""
        with self._lock:
            self._stop.set()
            if self._thread is not None and self._thread.is_alive():
                self._show(phase="stopping")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the running measurement, for scripts and tests; true when none is left running."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """Stop a running measurement, and close the figure."""
        self._stop.set()
        super().close()

    def _measure(self, scaling: str) -> None:
        self.failure = None
        try:
            values = {"phase": "measured", "own": [*self.own, self._call_run(scaling)], "progress": 1.0}
        except BaseException as failure:  # whatever a run raises belongs in the figure, not in a lost thread
            self.failure, values = failure, {"phase": "failed", "error": sentence(failure)}
        if self._stop.is_set():
            self.failure, values = None, {"phase": "stopped"}
        with self._lock:
            self._show(**values)
            # From here on a click may start the next run, though this thread takes a moment to end.
            self._thread = None

    def _call_run(self, scaling: str) -> dict[str, Any]:
        assert self._run is not None
        last = -SECONDS_BETWEEN_MESSAGES

        def report(fraction: float, text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_MESSAGES:
                last = time.monotonic()
                with self._lock:
                    phase = "stopping" if self._stop.is_set() else "running"
                    self._show(phase=phase, progress=min(1.0, max(0.0, float(fraction))), status=str(text))

        return self._checked(self._run(progress=report, stop=self._stop, scaling=scaling))

    def _checked(self, found: Any) -> dict[str, Any]:
        return check(found, "the new measurement")

    def _show(self, **values: Any) -> None:
        with self.hold_sync():
            for name, value in values.items():
                self.set_trait(name, value)


def fragment(*figures: Explorer, loader: str) -> str:
    """HTML that shows figures on a page that is no notebook, such as the book's landing page.

    Parameters
    ----------
    figures : Explorer
        Their state is written into the page as it is now; the same state gives the same text.
    loader : str
        The address of ``bpkit-widgets.js``, seen from the page.

    Returns
    -------
    str
        Scripts that hold the state, name the places, and load the loader.
    """
    state, places = {}, []
    for number, figure in enumerate(figures, 1):
        # References to other widgets (its layout) are of use in Jupyter only, and their ids are random.
        kept = {k: v for k, v in figure.get_state().items() if not str(v).startswith("IPY_MODEL_")}
        state[f"explorer-{number}"] = {"model_name": "AnyModel", "model_module": "anywidget", "state": kept}
        places.append({"version_major": 2, "version_minor": 0, "model_id": f"explorer-{number}"})
    scripts = [_script("state", {"version_major": 2, "version_minor": 0, "state": state})]
    scripts += [_script("view", place) for place in places]
    return "\n".join([*scripts, f'<script src="{html.escape(loader)}"></script>'])


def _script(kind: str, content: Any) -> str:
    # "</script>" inside a text would end the element.
    text = json.dumps(content, sort_keys=True).replace("</", "<\\/")
    return f'<script type="application/vnd.jupyter.widget-{kind}+json">{text}</script>'


def sentence(failure: BaseException) -> str:
    """One line that names an error; the whole of it stays in `Explorer.failure`."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or ["no message was given"]
    # A worker's error is a heading with a colon, and its traceback, whose last line says what was wrong.
    text = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return f"{type(failure).__name__}: {text[:300]}"


def check(measurement: Any, source: str) -> dict[str, Any]:
    """Return `measurement` as a dictionary after looking at what the figure relies on.

    Raises
    ------
    ValueError
        If the format or a field is not what ``bpkit.measure`` writes; the message names `source` and field.
    """
    if hasattr(measurement, "to_json"):
        measurement = measurement.to_json()
    if not isinstance(measurement, dict) or measurement.get("format") != FORMAT:
        raise ValueError(f'{source} is not a measurement of bp.scaling: its "format" must be "{FORMAT}"')
    missing = [name for name in ("machine", "experiment", "points") if not measurement.get(name)]
    if missing:
        raise ValueError(f"{source} has no {' and no '.join(missing)}")
    for point in measurement["points"]:
        there = point.keys() | point.get("parts", {}).keys()
        lacking = {"workers", "step_s", "throughput", "speedup", "efficiency", *PARTS} - there
        if lacking:
            workers = point.get("workers", "?")
            raise ValueError(f"{source}: the point for {workers} workers lacks {sorted(lacking)}")
    return measurement


def _read(source: Any) -> list[dict[str, Any]]:
    if not isinstance(source, str | Path):
        return [check(source, "the measurement")]
    path = Path(source)
    if path.is_dir():
        texts = [(file.name, file.read_text(encoding="utf-8")) for file in sorted(path.glob("*.json"))]
        return [check(json.loads(text), name) for name, text in texts if f'"{FORMAT}"' in text]
    if not path.is_file():
        raise ValueError(f"there is no measurement file {path}")
    try:
        return [check(json.loads(path.read_text(encoding="utf-8")), path.name)]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def _load(measurements: Any) -> list[dict[str, Any]]:
    if measurements is None:
        return []
    alone = isinstance(measurements, str | Path | dict) or hasattr(measurements, "to_json")
    sources: Iterable[Any] = [measurements] if alone else measurements
    return [one for source in sources for one in _read(source)]


def _bind(network: Any, data: Any, workers: Sequence[int], measure: Callable[..., Any], options: dict[str, Any]) -> Any:
    if network is None and data is None:
        if options:
            raise TypeError(f"{sorted(options)}: settings of a measurement, which needs network= and data=")
        return None
    if network is None or data is None:
        raise ValueError("a measurement needs both network= and data=")

    return lambda **live: measure(network, data, workers=list(workers), **{**live, **options})


def explorer(
    measurements: Any = None,
    network: Any = None,
    data: Any = None,
    workers: Sequence[int] = (1, 2, 4),
    *,
    revealed: bool = False,
    measure: Callable[..., Any] = measure_scaling,
    **options: Any,
) -> Explorer:
    """An interactive figure of how training scales with the number of workers.

    A slider picks the worker count. The figure shows the speedup against the ideal line, where the time of a
    step goes, the bytes sent, the throughput beside the time to a target accuracy, and the timeline of one
    step. The reader predicts the speedup before the measurement appears. Every state is also said in words.
    In JupyterLab, an explorer with a network and data has a Measure button, which runs real workers and lays
    the result over the recorded ones; on a page without a kernel the recorded ones remain.

    Parameters
    ----------
    measurements : path, dict, Scaling, or a list of these, optional
        Recorded measurements in the format of `bpkit.measure`; a folder stands for all that lie in it.
    network, data : optional
        What Measure trains. Both or neither.
    workers : sequence of int
        The worker counts that Measure runs.
    revealed : bool
        Show the measurement at once, without asking for a prediction.
    measure : callable, optional
        Called as ``measure(network, data, workers=[...], scaling=..., progress=f(fraction, text), stop=Event,
        **options)`` in place of `bpkit.measure.scaling`.
    **options
        Passed to the measurement, e.g. ``batch=256``.

    Returns
    -------
    Explorer
        The last expression of a cell, or `IPython.display.display` of it, draws the figure.

    Raises
    ------
    ValueError
        If a measurement cannot be read, worker counts are not positive, or only one of network and data is
        given.
    """
    recorded = _load(measurements)
    if not workers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in workers):
        raise ValueError(f"workers must be positive integers, e.g. (1, 2, 4); got {workers!r}")
    counts = sorted({point["workers"] for one in recorded[:1] for point in one["points"]} or set(workers))
    run = _bind(network, data, workers, measure, options)
    return Explorer(run=run, recorded=recorded, workers=counts[-1], measure_workers=list(workers), revealed=revealed)
