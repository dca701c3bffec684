"""Markdown pages as tests see them: fenced blocks, what they need, and the commands in them."""

import doctest
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = ("data", "a GPU", "data and GPUs", "the network", "the repository")
# A block that can't be run says so: in a paragraph above it, or in a comment, as the README does.
_MARK = rf"(?:\*Needs (?P<needs>{'|'.join(NEEDS)})\.\*\n\n|<!-- needs (?P<comment>data) -->\n)?"
_BLOCK = re.compile(rf"^{_MARK}```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
PARSERS = {  # the modules that have a command's parser
    "zoo-bench": "tools.benchmark",
    "zoo-convert": "tools.convert",
    "zoo-export": "tools.export",
    "zoo-look": "tools.look",
    "zoo-models": "tools.models",
    "zoo-report": "recipes.report",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, what it needs to be run, if anything, and the line it starts in."""

    language: str
    text: str
    needs: str | None
    line: int


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    page = path.read_text()
    return [
        Block(
            match["language"], match["text"], match["needs"] or match["comment"], page.count("\n", 0, match.start()) + 1
        )
        for match in _BLOCK.finditer(page)
    ]


def links(path: Path) -> list[str]:
    """Where a page's links and pictures lead, without those to other sites."""
    found = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", re.sub(_BLOCK, "", path.read_text()))
    return sorted(set(found))


def commands(found: list[Block]) -> list[list[str]]:
    """The zoo's commands in blocks for a shell, as words."""
    return [
        shlex.split(line, comments=True)
        for block in found
        if block.language == "bash"
        for line in block.text.replace("\\\n", " ").splitlines()
        if re.match(r"zoo-|torchrun", line)
    ]


def check_command(command: list[str], folder: Path) -> None:
    """Parse a command, and compose its configuration in `folder`, without running it."""
    if command[0] in PARSERS:
        importlib.import_module(f"zoo.{PARSERS[command[0]]}").parser().parse_args(command[1:])
        return
    if command[0] in ("zoo-predict", "zoo-embed"):
        importlib.import_module(f"zoo.recipes.commands.{command[0][4:]}").parse(command[1:])
        return
    words = [word for word in command if word != "-m" or "torchrun" in command]
    name = "eval" if words[0] == "zoo-eval" else "train"
    arguments = words[words.index("zoo.recipes.train") + 1 :] if words[0] == "torchrun" else words[1:]
    arguments = [word.partition(",")[0] if "-m" in command and words[0] != "torchrun" else word for word in arguments]
    if arguments and arguments[0].startswith("runs/"):
        (folder / arguments[0]).mkdir(parents=True, exist_ok=True)
    extra = [] if "--help" in arguments else ["--cfg", "job"]
    said, code = StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it in its own process
        patch.setattr(sys, "argv", [f"zoo-{name}", *arguments, *extra])
        try:
            importlib.import_module(f"zoo.recipes.commands.{name}").main()
        except SystemExit as end:
            code = end.code
    assert not code, said.getvalue()


def run_page(path: Path, folder: Path) -> None:
    """Run a page's blocks in `folder`, in order, each Python block by itself; `text` is what the one before prints.

    A Python block that begins with the name of a file, `# train.py`, is saved there instead. In `text`, ... stands for
    anything. A command whose output has an error in it has to fail.
    """
    found = blocks(path)
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.needs or block.language not in ("bash", "python"):
            continue
        expected = following.text if following and following.language == "text" else None
        where = f"{path.relative_to(ROOT)}, line {block.line}"
        if block.language == "python" and (name := re.match(r"# (\w+\.py)\n", block.text)):
            (folder / name[1]).write_text(block.text)
            continue
        if block.language == "python":
            printed = _run_python(block.text, where)
        else:
            printed = _run_shell(block.text, folder, "error:" in (expected or ""), where)
        if expected:
            _compare(expected, printed, where)


def _run_python(text: str, where: str) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(text, where, "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def _run_shell(text: str, folder: Path, fails: bool, where: str) -> str:
    scripts = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert bool(result.returncode) == fails, f"{where}: exit status {result.returncode}\n{result.stdout}"
    return result.stdout


def _compare(expected: str, printed: str, where: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(expected, printed, flags):
        pytest.fail(f"{where} prints\n{printed}\nbut the page says\n{expected}")


def notebook_cells(path: Path) -> list[tuple[str, str]]:
    """The source of each code cell of a notebook, and what it prints."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [
        (
            "".join(cell["source"]),
            "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"),
        )
        for cell in cells
    ]


def run_cells(sources: list[str], where: str) -> list[str]:
    """Run the cells of a notebook in this process, without a kernel, and return what each of them prints."""
    scope, found = {"__name__": "__main__"}, []
    for number, source in enumerate(sources, 1):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(source, f"{where}, cell {number}", "exec"), scope)
        found.append(printed.getvalue())
    return found


def execute_notebook(path: Path, folder: Path) -> None:
    """Execute a notebook in a kernel, in `folder`, and write its outputs into its file.

    Those to stderr are left out, and so are empty ones, the former places of progress bars.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and output.get("data") != {"text/plain": ""}
            ]
    notebook.metadata = metadata
    nbformat.write(notebook, path)
