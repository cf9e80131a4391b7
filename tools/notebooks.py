"""Run a notebook as `make execute` does, and bring what it holds into one fixed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "book", ROOT / "chapters")
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
#: Seconds that one cell may take.
TIMEOUT = 300


def chapters() -> list[Path]:
    """The notebooks of the course, in order: the landing page, then the chapters."""
    return [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]


def read(path: Path) -> Any:
    """The notebook as it is stored."""
    return nbformat.read(path, as_version=4)


def write(notebook: Any, path: Path) -> bool:
    """Store the notebook where it changed; return whether it did."""
    text = nbformat.writes(notebook) + "\n"
    if path.exists() and path.read_text() == text:
        return False
    path.write_text(text)
    return True


def execute(path: Path) -> Any:
    """Run every cell in a fresh kernel, in the notebook's folder; return it normalised, unsaved.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        When a cell raises that is not tagged ``raises-exception``.
    """
    notebook = read(path)
    client = NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", store_widget_state=True,
                            record_timing=False, extra_arguments=["--log-level=ERROR"],
                            resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    return normalise(notebook)


def normalise(notebook: Any) -> Any:
    """Give the notebook a form that depends on its content alone: no times, no random ids, no versions."""
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    used = {cell.get("id") for cell in notebook.cells}
    for number, cell in enumerate(notebook.cells):
        cell.metadata.pop("execution", None)
        if not cell.get("id") or cell["id"].count("-") > 3:
            cell["id"] = next(name for name in (f"cell-{number:02}{suffix}" for suffix in ("", "a", "b", "c"))
                              if name not in used)
        for output in cell.get("outputs", []):
            if isinstance(output.get("text"), list):
                output["text"] = "".join(output["text"])
        cell.update(merge_streams(cell))
    return rename_models(notebook)


def merge_streams(cell: Any) -> dict[str, Any]:
    """Join neighbouring prints: how they were cut depends on the moment at which the kernel sent them."""
    if "outputs" not in cell:
        return {}
    merged: list[Any] = []
    for output in cell["outputs"]:
        last = merged[-1] if merged else None
        if last is not None and output["output_type"] == last["output_type"] == "stream" \
                and output["name"] == last["name"]:
            last["text"] += output["text"]
        else:
            merged.append(output)
    return {"outputs": merged}


def states(notebook: Any) -> dict[str, Any]:
    """The saved widget models by id."""
    return notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})


def views(notebook: Any) -> list[str]:
    """The ids of the models that outputs show, in order."""
    return [output["data"][VIEW]["model_id"] for cell in notebook.cells for output in cell.get("outputs", [])
            if VIEW in output.get("data", {})]


def rename_models(notebook: Any) -> Any:
    """Replace the random ids of widget models by numbers: first those that are shown, then those they refer to."""
    models = states(notebook)
    order = [name for name in dict.fromkeys(views(notebook)) if name in models]
    for name in order:  # grows while it is walked
        text = json.dumps(models[name])
        order.extend(other for other in models if other not in order and f'"IPY_MODEL_{other}"' in text)
    for name in [name for name in models if name not in order]:
        del models[name]  # nothing shows it
    text = nbformat.writes(notebook)
    for number, name in enumerate(order):
        text = text.replace(name, f"{number:032x}")
    renamed = nbformat.reads(text, as_version=4)
    if models := states(renamed):
        renamed.metadata["widgets"][STATE]["state"] = {name: models[name] for name in sorted(models)}
    else:
        renamed.metadata.pop("widgets", None)
    return renamed
