"""Docstrings as they stand in the code, in Sphinx's notation, made readable for mkdocstrings.

``:param x:`` and its kin are read by griffe's own Sphinx parser. What that leaves alone is done
here: roles such as ``:func:`simnorm` `` become links, and examples at a ``>>>`` become code blocks.
"""

from __future__ import annotations

import html
import inspect
import re

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod):`~?([\w.]+)`")
EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?:\.\.\. |>>> ).*\n?)*)", re.M)


def full_name(name: str, place: griffe.Object) -> str:
    """Returns the dotted path of what a docstring means by a name; unknown names as they are.

    :param name: of a role, such as "LatentDynamics.step"
    :param place: the object in whose docstring it stands
    """
    first, *rest = name.split(".")
    try:
        return ".".join([place.resolve(first), *rest])
    except griffe.NameResolutionError:
        return name


def link(name: str, place: griffe.Object) -> str:
    """Returns a link to what the reference shows, which elsewhere is shown as code alone."""
    identifier = html.escape(full_name(name, place), quote=True)
    return f'<autoref optional identifier="{identifier}"><code>{html.escape(name)}</code></autoref>'


def readable(text: str, place: griffe.Object) -> str:
    """Returns a docstring as Markdown.

    :param text: in Sphinx's notation
    :param place: the object whose docstring it is
    """
    text = ROLE.sub(lambda match: link(match[1], place), text)
    return EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)


class SphinxNotation(griffe.Extension):
    """Rewrites each docstring once its module is loaded, so that names can be looked up."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """See griffe: called when a package with all its modules is there."""
        self._visit(pkg)

    def _visit(self, place: griffe.Object) -> None:
        if place.docstring is not None:
            text = readable(inspect.cleandoc(place.docstring.value), place)
            # griffe finds no signature in a NamedTuple, whose fields it knows as attributes.
            if place.is_class and "NamedTuple" in map(str, place.bases):
                text = text.replace(":param ", ":ivar ")
            place.docstring.value = text
        for member in place.members.values():
            if not member.is_alias:
                self._visit(member)
