"""What is uploaded names no path, user, computer or password of the machine it comes from.

Texts, YAML and JSON are read as what they are; elsewhere a word gives way to as many asterisks.
Archives are opened, within one another too. A last look at every byte refuses what is left.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import getpass
import io
import json
import os
import platform
import re
import socket
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

from tdmpc2_sb3.zoo.passwords import is_secret

MASK = "***"

#: Options of the zoo's command line that tell of the machine alone, and what is written for them.
NEUTRAL_OPTIONS = {
    "log_folder": "logs",
    "tensorboard_log": "",
    "trained_agent": "",
    "conf_file": None,
    "optimization_log_path": None,
    "storage": None,
    "study_name": None,
    "command": None,
    "wandb_entity": None,
    "wandb_group": None,
}

_ADDRESS = re.compile(
    r"(?<![\w+.-])(?:(?!https?:)[a-zA-Z][\w+.-]*://|https?://[^\s/'\"]*@)[^\s'\"<>)\]]*"
)
_PATH_REST = r"[^\s'\"<>|,;(){}\[\]]*"
_PATH = re.compile(
    r"(?:(?<![\w.~/:<*+\\-])/(?=[\w.~@%])|(?<!\w)~[\w.-]*/|(?<!\w)[A-Za-z]:[\\/]|\\{2,}(?=\w))"
    + _PATH_REST
)
_HOME = re.compile(r"[/\\](?:home|Users)[/\\]([^/\\\s'\"]+)")
_ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")

#: Shorter ones stand in numbers by chance.
MIN_BINARY_LENGTH = 6
MIN_LENGTH = 3

_WORD = "tag:yaml.org,2002:str"

#: Compressed pictures: no words.
_OPAQUE = (".mp4", ".png", ".gif")


def words_of_machine() -> set[str]:
    """Return what tells of this machine: folders, the user's and the computer's names."""
    home = os.path.expanduser("~")
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with contextlib.suppress(KeyError, OSError, ImportError):  # no such user on this system
        names.add(getpass.getuser())
    hosts = {socket.gethostname(), platform.node(), os.environ.get("HOSTNAME", "")}
    hosts |= {host.partition(".")[0] for host in hosts}
    folders = {home, os.path.realpath(home), os.getcwd(), sys.prefix}
    return names | hosts | folders | {os.path.basename(home)}


def words_of_text(text: str) -> set[str]:
    """Return the users, computers and passwords in the addresses and home folders of a text."""
    found = set(_HOME.findall(text))
    for match in re.finditer(r"://(?:([^\s:/@'\"]*)(?::([^\s@'\"]*))?@)?([^\s:/'\"?]*)", text):
        if match.group(1) or not text[: match.start()].endswith(("http", "https")):
            found |= {unquote(group) for group in match.groups() if group}
    return found


def secrets_of_yaml(text: str) -> set[str]:
    """Return the values of a YAML whose names say that they are secret, such as `api_key`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return set()
    found: set[str] = set()

    def visit(node: yaml.Node | None) -> None:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        for name, value in _pairs(node):
            scalars = isinstance(name, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)
            if not scalars or not is_secret(name.value):
                continue
            # No flag and no small number.
            if value.tag == _WORD or len(value.value) >= MIN_BINARY_LENGTH:
                found.add(value.value)
        for child in children:
            for each in child if isinstance(child, tuple) else (child,):
                visit(each)

    visit(root)
    return found


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """Names and values: those of a dictionary, and those of the zoo's, which are lists of pairs."""
    if isinstance(node, yaml.MappingNode):
        return list(node.value)
    if isinstance(node, yaml.SequenceNode) and len(node.value) == 2:
        return [(node.value[0], node.value[1])]
    return []


def _is_of_numbers(name: str, names: Collection[str]) -> bool:
    """Whether a part of an archive is a tensor's numbers: four of their bytes may read "/9ZB"."""
    folder, separator, _ = name.rpartition("data/")
    return bool(separator) and f"{folder}data.pkl" in names


class Scrubber:
    """Takes words out of files.

    :param words: names and folders
    :param keep: texts whose words stay, such as the repository's name
    """

    def __init__(self, words: Iterable[str], keep: Iterable[str] = ()):
        kept = {part for text in keep for part in re.split(r"[^\w]+", text)} | set(keep)
        chosen = {word for word in words if len(word) >= MIN_LENGTH and word not in kept}
        self._words = sorted(chosen - {MASK}, key=len, reverse=True)
        folders = [word for word in self._words if os.path.isabs(word)]
        names = [word for word in self._words if word not in folders]
        patterns = [re.escape(word) + _PATH_REST for word in folders]
        for word in names:
            whole = len(word) < MIN_BINARY_LENGTH  # short ones are parts of other words, too
            patterns.append(rf"(?<!\w){re.escape(word)}(?!\w)" if whole else re.escape(word))
        self._known = re.compile("|".join(patterns)) if patterns else None
        long = [word for word in self._words if len(word) >= MIN_BINARY_LENGTH]
        self._binary = {word.encode(code) for word in long for code in _ENCODINGS}

    def text(self, text: str) -> str:
        """Mask addresses with credentials, absolute paths and the words."""
        text = _ADDRESS.sub(MASK, text)
        if self._known is not None:
            text = self._known.sub(MASK, text)
        return _PATH.sub(MASK, text)

    def content(self, content: bytes, name: str) -> bytes:
        """Return a file's content without the words; the very same where there are none.

        :param content: of the file
        :param name: by whose suffix YAML is known
        """
        if name.lower().endswith(_OPAQUE):
            return content
        if content[:4] == b"PK\x03\x04" and zipfile.is_zipfile(io.BytesIO(content)):
            return self._archive(content)
        try:
            text = content.decode()
            if "\0" in text:
                return self._plain_bytes(content)
        except UnicodeDecodeError:
            return self._plain_bytes(content)
        if name.endswith((".yml", ".yaml")):
            scrubbed = self._yaml(text)
        elif text.lstrip()[:1] in ("{", "["):
            scrubbed = self._json(text)
        else:
            scrubbed = self.text(text)
        return content if scrubbed == text else scrubbed.encode()

    def _archive(self, content: bytes) -> bytes:
        result, changed = io.BytesIO(), False
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
            names = set(old.namelist())
            for entry in old.infolist():
                member = old.read(entry)
                if _is_of_numbers(entry.filename, names):
                    scrubbed = self._plain_bytes(member)
                else:
                    scrubbed = self.content(member, entry.filename)
                changed = changed or scrubbed != member
                new.writestr(entry, scrubbed, compress_type=entry.compress_type)
        return result.getvalue() if changed else content

    def _plain_bytes(self, content: bytes) -> bytes:
        for word in self._binary:  # the same length: what counts bytes stays right
            mask = bytes(b if b == 0 else ord("*") for b in word)
            content = content.replace(word, mask)
        return content

    def _yaml(self, text: str) -> str:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return self.text(text)
        if root is None or not self._scrub_node(root):
            return text
        return yaml.serialize(root, Dumper=yaml.SafeDumper)

    def _scrub_node(self, node: yaml.Node) -> bool:
        """Mask the values in a tree of YAML; return whether there were any."""
        if isinstance(node, yaml.ScalarNode):
            scrubbed = self.text(node.value)
            changed = scrubbed != node.value
            if changed:
                node.value, node.style, node.tag = scrubbed, "'", _WORD
            return changed
        is_mapping = isinstance(node, yaml.MappingNode)
        children = [value for _, value in node.value] if is_mapping else list(node.value)
        changed = False
        for key, value in _pairs(node):
            if isinstance(key, yaml.ScalarNode) and key.value in NEUTRAL_OPTIONS:
                changed = _neutralise(value, NEUTRAL_OPTIONS[key.value]) or changed
        for child in children:
            changed = self._scrub_node(child) or changed
        return changed

    def _json(self, text: str) -> str:
        try:
            document = json.loads(text)
        except ValueError:
            return self.text(text)
        scrubbed = self._json_value(document)
        return text if scrubbed == document else json.dumps(scrubbed, indent=1)

    def _json_value(self, value: Any, key: str = "") -> Any:
        if key == "tensorboard_log":
            return None
        if isinstance(value, dict):
            return {name: self._json_value(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self._json_value(item) for item in value]
        if not isinstance(value, str):
            return value
        if key in ("base64", ":serialized:"):  # ours, and Stable-Baselines3's
            return self._base64(value)
        return self.text(value)

    def _base64(self, text: str) -> str:
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return self.text(text)
        scrubbed = self._plain_bytes(content)
        return text if scrubbed == content else base64.b64encode(scrubbed).decode()

    def left(self, content: bytes) -> bool:
        """Whether a word is still in a content, or in a file within it."""
        if any(word in content for word in self._binary):
            return True
        if content[:4] == b"PK\x03\x04" and zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return any(self.left(archive.read(name)) for name in archive.namelist())
        return False


def _neutralise(node: yaml.Node, neutral: str | None) -> bool:
    value = "null" if neutral is None else neutral
    if not isinstance(node, yaml.ScalarNode) or node.value == value:
        return False
    node.value = value
    node.tag = f"tag:yaml.org,2002:{'null' if neutral is None else 'str'}"
    node.style = None if neutral is None else "'"
    return True


def scrub_folder(folder: Path, keep: Iterable[str], say: Callable[[str], None] = print) -> None:
    """Scrub all files of a folder that is to be uploaded.

    :param folder: whose files are changed
    :param keep: texts whose words stay: the repository's name, the environment's
    :param say: is told which files were changed
    :raises SystemExit: naming a file in which something is left
    """
    words = words_of_machine()
    for path in _files(folder):
        if path.suffix in (".yml", ".yaml"):
            text = path.read_text(errors="replace")
            words |= words_of_text(text) | secrets_of_yaml(text)
    scrubber = Scrubber(words, keep)
    for path in _files(folder):
        name = str(path.relative_to(folder))
        if scrubber.text(name) != name:
            raise SystemExit(
                f"The name of '{path}' tells of this machine, and it is not uploaded: rename it."
            )
        content = path.read_bytes()
        scrubbed = scrubber.content(content, path.name)
        if scrubbed != content:
            path.write_bytes(scrubbed)
            say(f"Taken out of '{path.name}': paths, names or addresses of this machine")
        if not path.name.endswith(_OPAQUE) and scrubber.left(scrubbed):
            raise SystemExit(
                f"'{path}' still names a path, user or computer and is not uploaded: remove it."
            )


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        # What the Hub's client does not upload either.
        if path.is_file() and not {".cache", ".git"} & set(path.relative_to(folder).parts):
            yield path
