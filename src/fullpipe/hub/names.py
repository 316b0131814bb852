"""How people write the name of a model on Hugging Face: as an id, an address from the browser, or as llama.cpp and
Ollama do."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

from fullpipe.errors import ModelNotFound

_PART = r"[\w.-]+"
_ID = re.compile(rf"(?P<id>{_PART}/{_PART})(@(?P<revision>[\w./-]+?))?(:(?P<file>[\w.-]+))?/?", re.ASCII)
_PAGE = re.compile(rf"(?P<id>{_PART}/{_PART})(/(tree|blob|resolve|raw)/(?P<revision>[^/?#]+)(/(?P<file>[^?#]+))?)?/?"
                   r"([?#].*)?", re.ASCII)
_HOSTS = ("huggingface.co/", "www.huggingface.co/", "hf.co/", "hf://")
_NO_MODELS = ("datasets/", "spaces/", "collections/", "papers/", "docs/", "blog/", "api/")


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on Hugging Face.

    id: "org/name". revision: branch, tag or commit; None: the main one. gguf: which of its GGUF files, by name or by
    what is in the name, such as "Q4_K_M"; None: it was not said that there are any.
    """

    id: str
    revision: str | None = None
    gguf: str | None = None

    def __str__(self) -> str:
        return self.id + (f"@{self.revision}" if self.revision else "") + (f":{self.gguf}" if self.gguf else "")


def repository(name: str) -> Repository | None:
    """The repository that is meant; None where the name means something else. Raises `ModelNotFound` for an address
    that cannot be a model."""
    page = _after_host(name)
    if page is None:
        found = _ID.fullmatch(name)
        return Repository(found["id"], found["revision"], found["file"]) if found else None
    if page.startswith(_NO_MODELS):
        raise ModelNotFound(f"{name} is no model: it begins with {page.partition('/')[0]}/",
                            hint="Name a model: org/name, or the address of its page.")
    if found := _ID.fullmatch(page):
        return Repository(found["id"], found["revision"], found["file"])
    if found := _PAGE.fullmatch(page):
        file = unquote(found["file"] or "").rstrip("/")
        revision = unquote(found["revision"] or "")
        return Repository(found["id"], None if revision in ("", "main") else revision,
                          file if file.endswith(".gguf") else None)
    raise ModelNotFound(f"{name} is no address of a model on Hugging Face",
                        hint="Such as https://huggingface.co/org/name; org/name will do.")


def _after_host(name: str) -> str | None:
    """What follows Hugging Face's name, or that of the mirror in use, in an address; None if it is none.

    Raises `ModelNotFound` for one of somebody else.
    """
    bare = re.sub(r"^https?://", "", name)
    mirror = re.sub(r"^https?://", "", os.environ.get("HF_ENDPOINT", "")).rstrip("/") + "/"
    for host in (*_HOSTS, *([mirror] if len(mirror) > 1 else ())):
        if bare.lower().startswith(host):
            return bare[len(host):]
    if bare != name or "://" in name:
        raise ModelNotFound(f"{name} is an address, and Fullpipe fetches from Hugging Face alone",
                            hint="Download what is there, and name the file or folder. (For a mirror of Hugging Face "
                                 "set HF_ENDPOINT.)")
    return None
