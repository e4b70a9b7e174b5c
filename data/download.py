"""Fetching a published file: resumed where it broke off, checked, and put in place only when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from data.formats import DataError, one_line

ATTEMPTS = 5  # per url
PAUSE = 2.0  # seconds between two of them
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18  # bytes


def fetch(name: str, urls: Sequence[str], path: Path, md5: str) -> None:
    """The file at `path`, from the first of the urls that gives it with this md5; nothing to do if it is there.

    Until it is whole it is `<path>.part`, which stays when all fails, and the next call goes on from there.
    Raises DataError, one line, if no url gives it: each url's fault, and how to place the file by hand.
    """
    with contextlib.suppress(OSError):
        if file_md5(path) == md5:
            return
    part = path.with_name(path.name + ".part")
    faults = []
    for url in urls:
        fault = _try(name, url, part, md5)
        if not fault:
            os.replace(part, path)
            return
        faults.append(f"{url}: {fault}")
    by_hand = f"place {path.name} (md5 {md5}) in {path.parent} by hand"
    raise DataError(f"{name}: fetching {path.name} failed ({'; '.join(faults)}): try again, or {by_hand}")


def file_md5(path: Path) -> str:
    """A file's md5, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _try(name: str, url: str, part: Path, md5: str) -> str:
    """What kept this url from completing `part`; "" if it is whole."""
    fault = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            resumed = _append(name, url, part)
            found = file_md5(part)
        except HTTPError as error:
            fault = one_line(error)
            if error.code < 500 and error.code not in (408, 429):  # asking again will not help
                return fault
            continue
        except (OSError, HTTPException, ValueError) as error:  # a network, a disk, a url that is none
            fault = one_line(error)
            continue
        if found == md5:
            return ""
        part.unlink()
        fault = f"its md5 is {found}, wanted {md5}"
        if not resumed:  # else the fault may lie in what was there before: once more, from the start
            return fault
    return fault


def _append(name: str, url: str, part: Path) -> bool:
    """Downloads what `part` lacks; whether it built on what was there. Raises OSError if the connection ends too early."""
    from tqdm import tqdm

    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "retable"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if start and error.code == 416:  # nothing follows: it is whole, which its md5 will tell, or of another file
            return True
        raise
    with response:
        if not str(response.headers["Content-Range"]).startswith(f"bytes {start}-"):
            start = 0  # the server sends all of it
        length = response.headers["Content-Length"]
        total = None if length is None else start + int(length)
        bar = tqdm(total=total, initial=start, desc=f"{name}: {part.stem}", unit="B", unit_scale=True, disable=None, leave=False)
        with open(part, "ab" if start else "wb") as file, bar:
            while chunk := response.read(CHUNK):
                bar.update(file.write(chunk))
            size = file.tell()
    if total is not None and size < total:
        raise ConnectionError(f"the connection ended after {size:,} of {total:,} bytes")
    return start > 0
