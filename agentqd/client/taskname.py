"""A task's name, where nobody gave one: the first words of its prompt or argv, without what looks like a secret.

A name is for people: it stands in logs, alerts, subjects of mails and `list`. So these words are left out, and the next ones taken:

1. one with `=` in it (`API_KEY=...`, `--token=...`, `?key=...`), up to the end of what it quotes;
2. one with a run of 16 or more letters, digits, `_` and `-` that has both letters and digits (keys, hashes, UUIDs);
3. one with a part that begins as well-known keys do (`sk-`, `ghp_`, ...), or with a login as in `https://user:password@host`;
4. what follows a word that announces a secret (`--password`, `token:`, `Bearer`), as the next word or in the same one.

These are plain rules, not a promise: a password that is a common word looks like one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

NAME_CHARS_MAX: Final = 60
NAME_WORDS_MAX: Final = 8
_LOOKED_AT_CHARS: Final = 4096

_KINDS: Final = (
    "password", "passwd", "passphrase", "secret", "token", "apikey", "api-key", "api_key", "authorization",
)  # fmt: skip
_RUN: Final = re.compile(r"[A-Za-z0-9_-]{16,}")
_KEY: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:[spr]k[-_]|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|whsec_|AKIA|eyJ)[A-Za-z0-9]"
)
_LOGIN: Final = re.compile(r"(?::|//)[^\s/@]+@")
_TOLD: Final = re.compile(rf"(?:{'|'.join(_KINDS)})[\"']?:[^\s]", re.IGNORECASE)


def name_from(text: str) -> str:
    """From a prompt: printable, on one line, short."""
    printable = "".join(char if char.isprintable() else " " for char in text[:_LOOKED_AT_CHARS])
    name, count = "", 0
    for word in _harmless(printable.split()):
        if count == NAME_WORDS_MAX or (name and len(name) + 1 + len(word) > NAME_CHARS_MAX):
            break
        name, count = f"{name} {word}".strip(), count + 1
    return name[:NAME_CHARS_MAX] or "task"


def name_from_argv(argv: Iterable[str]) -> str:
    """From a command: an argument with `=` in it is left out whole, with all of its words."""
    return name_from(" ".join(word for word in argv if "=" not in word))


def _harmless(words: list[str]) -> Iterator[str]:
    quote, announced = "", False
    for word in words:
        if quote:
            quote = "" if quote in word else quote
            continue
        after, announced = announced, _announces(word) or (announced and word.lower() == "basic")
        if "=" in word:
            quote = _left_open(word)
        elif announced or not (after or _looks_secret(word)):
            yield word


def _announces(word: str) -> bool:
    bare = word.lstrip("'\"([{").lower()
    if bare == "bearer":
        return True
    return (bare[:1] == "-" or bare.rstrip("'\"")[-1:] == ":") and bare.rstrip("'\":").endswith(_KINDS)


def _left_open(word: str) -> str:
    """The quotation mark that an assignment opens and does not close."""
    value = word.partition("=")[2]
    return value[0] if value[:1] in ("'", '"') and value.count(value[0]) == 1 else ""


def _looks_secret(word: str) -> bool:
    mixed = any(any(map(str.isalpha, run)) and any(map(str.isdigit, run)) for run in _RUN.findall(word))
    return mixed or any(pattern.search(word) for pattern in (_KEY, _LOGIN, _TOLD))
