"""What the site has beyond the files of the repository, as an extension of Sphinx.

Pages of the reference and the gallery are written to ``docs/generated`` from the public names and their
docstrings. Names such as ``ll.attach`` link to the reference, and scripts that a page links to are shown.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from textwrap import indent
from types import ModuleType

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers import TextLexer
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

import lora_lens as ll

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "generated"
SHOWN = {".py": "python", ".sh": "bash"}  # what gets a page of its own: sources, and what pages link to


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("navigation", "", "env")
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_formula, None))
    app.add_lexer("mermaid", TextLexer)  # the diagram's arrows read well as text, and need no script
    app.add_transform(RepositoryLinks)
    app.add_transform(LinkedNames)
    app.add_transform(ExplorerStills)
    app.add_post_transform(LinkedFiles)
    app.connect("config-inited", lambda *_: write_pages())
    app.connect("source-read", _add_navigation)
    app.connect("autodoc-process-docstring", _bars_are_bars, priority=400)  # before napoleon
    app.connect("html-collect-pages", _pages_of_files)
    app.connect("build-finished", _front_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# Pages that are written


def rooms(name: str = "lora_lens", module: ModuleType = ll) -> Iterator[tuple[str, ModuleType, list[str]]]:
    """Each public package or module under the name that users write, and its public names."""
    names = getattr(module, "__all__", None) or [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]
    yield name, module, names
    for inner in names:
        if isinstance(getattr(module, inner), ModuleType):
            yield from rooms(f"{name}.{inner}", getattr(module, inner))


def _file(thing: object) -> Path:
    """Where it is defined."""
    return Path(getattr(inspect.getmodule(thing), "__file__", None) or "")


# The reference has each thing once: where the shortest name for it is.
HOMES: dict[int, str] = {}
SOURCES: set[Path] = set()  # the files that define them
for _room, _module, _names in sorted(rooms(), key=lambda room: room[0].count(".")):
    for _name in _names:
        _thing = getattr(_module, _name)
        HOMES.setdefault(id(_thing), f"{_room}.{_name}")
        SOURCES |= {_file(part) for part in getattr(_thing, "__mro__", [_thing])}
SOURCES = {file for file in SOURCES if file.is_relative_to(ROOT / "lora_lens")}


def write_pages() -> None:
    pages = {"gallery": "\n".join(_gallery())}
    pages |= {room: "\n".join(_reference(room, module, names)) for room, module, names in rooms()}
    GENERATED.mkdir(exist_ok=True)
    for old in GENERATED.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = GENERATED / f"{name}.rst"
        if not path.exists() or path.read_text() != text:  # what is unchanged is not read again
            path.write_text(text)


def _reference(room: str, module: ModuleType, names: list[str]) -> Iterator[str]:
    yield from _title(room.replace("lora_lens", "ll", 1), "=")
    yield f".. py:module:: {room}\n"
    yield f"{module.__doc__.strip()}\n"  # getdoc would strip the indentation of code, too
    yield ".. autosummary::\n   :nosignatures:\n"
    things = {name: getattr(module, name) for name in names}
    homes = {name: HOMES[id(thing)] for name, thing in things.items() if not isinstance(thing, ModuleType)}
    own = [name for name, home in homes.items() if home == f"{room}.{name}"]
    yield from (f"   {name if name in own else f'~{home}'}" for name, home in homes.items())
    yield ""
    for name in own:
        if inspect.isclass(things[name]):
            others = {base.__name__ for base in things[name].__mro__ if "lora_lens" not in base.__module__}
            yield f".. autoclass:: {homes[name]}\n   :members:\n   :inherited-members: {', '.join(others)}\n"
        else:
            yield f".. auto{'function' if callable(things[name]) else 'data'}:: {homes[name]}\n"


def _gallery() -> Iterator[str]:
    """The pictures of the examples in the docstrings of all plots, by the module that draws them."""
    yield from _title("Gallery", "=")
    yield ".. py:currentmodule:: lora_lens.plots\n"
    yield "Each picture is what the lines above it draw, in the folder of the project. All functions take"
    yield "``ax=`` or ``axes=``, and return matplotlib Axes.\n"
    things = [getattr(ll.plots, name) for name in ll.plots.__all__]
    for module in dict.fromkeys(thing.__module__ for thing in things if "._" not in thing.__module__):
        yield from _title(module.rpartition(".")[2].replace("_", " ").capitalize(), "-")
        for thing in things:
            if thing.__module__ == module:
                yield from _title(thing.__name__, "~")
                summary = inspect.getdoc(thing).partition("\n\n")[0]
                yield f":func:`{thing.__name__}`: {_escaped(' '.join(summary.split()))}\n"
                yield ".. plot::\n"
                yield indent(_example(thing), "   ")


def _example(thing: object) -> str:
    """The example of its docstring, as it is written there."""
    lines = inspect.getdoc(thing).splitlines()
    (tests,) = doctest.DocTestFinder(recurse=False).find(thing, "it")
    first = tests.examples[0].lineno
    return inspect.cleandoc("\n".join(lines[first:])) + "\n"


def _bars_are_bars(
    _app: Sphinx, _what: str, _name: str, _thing: object, _options: object, lines: list
) -> None:
    """The docstrings write norms as ``||W||``, which reStructuredText would take for a substitution."""
    example = False
    for place, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        lines[place] = line if example else _escaped(line)


def _escaped(text: str) -> str:
    return re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", text)


def _title(text: str, line: str) -> Iterator[str]:
    yield f"{text}\n{line * len(text)}\n"


# Links


class RepositoryLinks(SphinxTransform):
    """Folders are found in the reference or by their README, and Jupyter's anchors under MyST's names."""

    default_priority = 210

    def apply(self) -> None:
        here = ROOT / self.env.docname
        for node in list(self.document.findall(nodes.reference)):
            if node.get("id_link") and here.with_suffix(".ipynb").exists():
                node["refuri"] = "#" + re.sub(r"[^\w-]", "", node["refuri"].lower())
        for node in list(self.document.findall(pending_xref)):
            if node["reftype"] != "myst":
                continue
            target = node["reftarget"]
            if node["refdomain"] == "doc" and target not in self.env.found_docs:
                node.replace_self(node.children)  # app.ipynb is no page
            elif node["refdomain"] is None and (here.parent / target).is_dir():
                page = self._page_of((here.parent / target).resolve().relative_to(ROOT))
                if page is None:
                    node.replace_self(node.children)
                else:
                    node.attributes.update(refdomain="doc", reftarget=page, reftargetid=None)

    def _page_of(self, folder: Path) -> str | None:
        for part in (folder, *folder.parents[:-1]):
            for page in (f"docs/generated/{'.'.join(part.parts)}", f"{part}/README"):
                if page in self.env.found_docs and page != "docs/generated/lora_lens":
                    return page
        return None


class LinkedNames(SphinxTransform):
    """``ll.attach`` in code type leads to the reference."""

    default_priority = 220

    def apply(self) -> None:
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext().partition("(")[0]
            if name.startswith("ll.") and not isinstance(node.parent, nodes.reference | pending_xref):
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=_home(name), refwarn=False)
                link["refdoc"] = self.env.docname
                node.replace_self(link)
                link += node


def _home(name: str) -> str:
    """Where the reference has ``ll.something``, or a member of it."""
    thing, (_, *parts) = ll, name.split(".")
    home = "lora_lens"
    for part in parts:
        thing = getattr(thing, part, None)
        home = HOMES.get(id(thing), f"{home}.{part}")
    return home


class ExplorerStills(SphinxTransform):
    """The guide's lines that make an explorer are run, and its still copy is put below them."""

    default_priority = 230

    def apply(self) -> None:
        if self.env.docname == "docs/explorers":
            names: dict[str, object] = {}
            with chdir(ROOT):
                for block in list(self.document.findall(nodes.literal_block)):
                    if block.get("language") == "python":
                        shown = _value(block.astext(), names)
                        if shown is not None:
                            place = block.parent.index(block) + 1
                            block.parent.insert(place, nodes.raw("", shown.still(), format="html"))


def _value(code: str, names: dict[str, object]) -> object:
    """Of the last line, as a notebook's cell has one."""
    *lines, last = ast.parse(code).body
    ended = isinstance(last, ast.Expr)
    exec(compile(ast.Module(lines if ended else [*lines, last], []), "explorers.md", "exec"), names)
    return eval(compile(ast.Expression(last.value), "explorers.md", "eval"), names) if ended else None


class LinkedFiles(SphinxPostTransform):
    """Scripts that a page links to are shown, not downloaded."""

    default_priority = 5

    def run(self, **_: object) -> None:
        for node in list(self.document.findall(download_reference)):
            path = ((ROOT / self.env.docname).parent / node["reftarget"]).resolve().relative_to(ROOT)
            if path.suffix in SHOWN:
                uri = self.app.builder.get_relative_uri(self.env.docname, f"files/{path}")
                node.replace_self(nodes.reference("", "", *node.children, internal=True, refuri=uri))


def _pages_of_files(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    files = {Path(file) for file in app.env.dlfiles} | {file.relative_to(ROOT) for file in SOURCES}
    for file in files:
        if file.suffix in SHOWN:
            text = (ROOT / file).read_text()
            code = app.builder.highlighter.highlight_block(text, SHOWN[file.suffix], linespans="line")
            back = (
                f'<p><a href="{"../" * len(file.parts)}index.html">lora_lens</a></p>'  # there is no sidebar
            )
            yield f"files/{file}", {"title": str(file), "body": f"{back}<h1>{file}</h1>{code}"}, "page.html"


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The page of the file that defines a name, seen from a page in ``docs/generated``."""
    thing = ll
    for part in f"{info['module']}.{info['fullname']}".split(".")[1:]:
        thing = getattr(thing, part, None)
    thing = inspect.unwrap(getattr(thing, "fget", None) or thing)
    file = _file(thing)
    if file not in SOURCES:
        return None  # such as a field
    return f"../../files/{file.relative_to(ROOT)}.html#line-{inspect.getsourcelines(thing)[1]}"


def _add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == app.config.root_doc:
        blocks = app.config.navigation.split("{toctree}")[1:]
        source[0] += "".join(f"\n```{{toctree}}{block.rstrip()}\n```\n" for block in blocks)


def _front_page(app: Sphinx, failure: Exception | None) -> None:
    if failure is None:
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


# Formulas as MathML, which browsers draw by themselves: no script, no network


def _inline_formula(translator: object, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), False))
    raise nodes.SkipNode


def _formula(translator: object, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{_mathml(node.astext(), True)}</div>')
    raise nodes.SkipNode


def _mathml(formula: str, block: bool) -> str:
    formula = re.sub(r"\\dots\b", r"\\ldots", formula)  # docutils knows neither this
    formula = re.sub(r"\\([bB]ig)\b", r"\\\1l", formula)  # nor brackets that are not left or right
    return tex2mathml(formula, as_block=block)
