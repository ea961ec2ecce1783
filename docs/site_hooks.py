"""Pages of the documentation site that stand elsewhere or are made: the README and its companions, and the reference from docstrings and the parser."""

from __future__ import annotations

import argparse
import html
import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import qcompiler
from docs.pictures import pictures
from qcompiler.base.arguments import spelled
from qcompiler.cli.main import build_parser
from qcompiler.pipeline.options import ARGUMENTS, GROUPS, OPTIONS, TYPES

ROOT = Path(__file__).resolve().parent.parent
TAKEN = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository's root, and the pages that they become."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    pages = {page: (ROOT / source).read_text() for source, page in TAKEN.items()}
    pages |= {"reference/api.md": api_page(), "reference/cli.md": cli_page()}
    pages |= {f"pictures/{name}": text for name, text in pictures().items()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the repository become links of the site; to what the site does not have, plain text."""
    here = posixpath.dirname(page.file.src_uri)
    known = {f.src_uri for f in files}
    inside = "" if page.file.src_uri in TAKEN.values() else "docs"

    def link(found: re.Match[str]) -> str:
        text, address, anchor = found["text"], found["address"], found["anchor"] or ""
        if "://" in address or not address:
            return found[0]
        in_repository = posixpath.normpath(posixpath.join(inside, here, address))
        target = TAKEN.get(in_repository, in_repository.removeprefix("docs/"))
        return f"[{text}]({posixpath.relpath(target, here or '.')}{anchor})" if target in known else text

    return re.sub(r"\[(?P<text>[^\]\n]+)\]\((?P<address>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)", link, markdown)


def api_page() -> str:
    """Every public name of the package, from its signature and docstring; the options of a compilation once."""
    parts = ["# Python API", "Everything here is an attribute of `qcompiler`: functions, what they take and return, errors."]
    named = [(name, getattr(qcompiler, name)) for name in qcompiler.__all__]
    order = (
        ("Functions", [n for n in named if inspect.isfunction(n[1])]),
        ("Types", [n for n in named if inspect.isclass(n[1]) and not issubclass(n[1], Exception) and n[0] not in ("load", "Options")]),
        ("Errors", [n for n in named if inspect.isclass(n[1]) and issubclass(n[1], Exception)]),
    )
    for title, members in order:
        parts.append(f"## {title}")
        for name, member in members:
            parts += [f"### {name}", *_described(name, member, title != "Errors")]
            for method, function in vars(member).items() if title == "Types" else ():
                if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                    parts += [f"#### {name}.{method}", *_described(method, function)]
        if title == "Functions":
            parts += _options()
    return "\n\n".join(parts) + "\n"


def _described(name: str, member: Any, called: bool = True) -> list[str]:
    """Signature and docstring."""
    text, _, _ = inspect.cleandoc(member.__doc__ or "").partition("\nArguments:\n")
    try:
        signature = inspect.signature(member)
    except (TypeError, ValueError):
        return [text]
    whole = set(OPTIONS) <= set(signature.parameters)
    own = [p for p in signature.parameters.values() if p.name != "self" and not (whole and p.name in OPTIONS)]
    shown = [_parameter(p) for p in own]
    if stars := next((i for i, p in enumerate(own) if p.kind is p.KEYWORD_ONLY), None):
        shown.insert(stars, "*")
    shown += ["**options"] if whole else []
    returned = "" if signature.return_annotation is inspect.Signature.empty else f" -> {str(signature.return_annotation).strip(chr(39))}"
    lines = f"{name}({', '.join(shown)}){returned}"
    if len(lines) > 100:
        lines = f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){returned}"
    told = [f"- `{p.name}`: {ARGUMENTS[p.name].help}." for p in own if whole and p.name in ARGUMENTS]
    told += ["- `options`: see [Options](#options)."] if whole else []
    return [*([f"```python\n{lines}\n```"] if called else []), text, "\n".join(told)]


def _parameter(p: inspect.Parameter) -> str:
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    kind = "" if p.annotation is p.empty else f": {p.annotation!s}"
    default = "" if p.default is p.empty else f" = {'...' if callable(p.default) else repr(p.default)}"
    return f"{stars}{p.name}{kind}{default}"


def _options() -> list[str]:
    """The keyword arguments of every function that quantizes."""
    parts = ["### Options", "Keyword arguments of the functions that quantize; `qcompiler.Options` is a `TypedDict` of them."]
    for group, (title, what) in GROUPS.items():
        rows = []
        for name, option in OPTIONS.items():
            if option.group == group:
                kind, meaning = (text.replace("|", "&#124;") for text in (html.escape(spelled(TYPES[name])), option.help))
                rows.append(f"| `{name}` | <code>{kind}</code> | `{option.default!r}` | {meaning} |")
        parts += [f"#### {title[0].upper()}{title[1:]}", what, "| option | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)]
    return parts


def cli_page() -> str:
    """The help of every command."""
    parser = build_parser()
    parts = ["# Command line", "```text\n" + parser.format_help() + "```"]
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, sub in verbs.choices.items():
        parts += [f"## {name}", "```text\n" + sub.format_help() + "```"]
    return "\n\n".join(parts) + "\n"
