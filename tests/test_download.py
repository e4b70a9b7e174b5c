"""Downloads, from a server on this machine: resumed, checked, from mirrors."""

from __future__ import annotations

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data import download, images, tiny_imagenet
from data.download import fetch
from tests.datafiles import error, md5, pixels, publish, write_files

CONTENT = pixels(1, 10_000).tobytes()
SUM = md5(CONTENT)


class Site(ThreadingHTTPServer):
    """A server whose faults a test sets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True  # whether it understands a request for a part
        self.breaks: list[int] = []  # bytes that an answer has before the connection ends
        self.codes: list[int] = []  # answered in place of the file
        self.stalls = 0  # so many answers stop after their headers
        self.asked: list[tuple[str, str | None]] = []  # path and Range
        self.ended = threading.Event()
        self.base = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site, part = self.server, self.headers["Range"]
        site.asked.append((self.path, part))
        content = site.files.get(self.path)
        if content is None or site.codes:
            return self.send_error(site.codes.pop(0) if site.codes else 404)
        start = int(part.removeprefix("bytes=").removesuffix("-")) if site.ranges and part else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if site.stalls:
            site.stalls -= 1
            return site.ended.wait(30) or site.files.clear()  # a client that waits so long fails
        self.wfile.write(content[start:][: site.breaks.pop(0) if site.breaks else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0)
    with Site() as server:
        server.files["/file"] = CONTENT
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def path(raw):
    return raw / "new" / "file"


def get(site, path, *urls):
    fetch("cifar10", urls or [f"{site.base}/file"], path, SUM)
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]


def test_a_whole_file_is_fetched_once(site, path):
    get(site, path)
    get(site, path)
    assert site.asked == [("/file", None)]
    path.write_bytes(b"another")
    get(site, path)  # replaces it
    assert "Not a directory" in error(lambda: get(site, path / "below" / "file"))


def test_a_connection_that_dies_or_stalls_is_resumed(site, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    for ranges, breaks, stalls, asked in (
        (True, [3000, 2500], 0, [None, "bytes=3000-", "bytes=5500-"]),
        (False, [3000], 0, [None, "bytes=3000-"]),  # a server without ranges starts over
        (True, [], 1, [None, None]),
    ):
        site.asked, site.ranges, site.breaks, site.stalls = [], ranges, breaks, stalls
        get(site, path)
        assert [part for _, part in site.asked] == asked
        path.unlink()


def test_what_an_earlier_process_left_is_resumed_or_dropped(site, path):
    for left, again in ((CONTENT[:7000], False), (CONTENT, False), (b"x" * 500, True), (b"x" * 20_000, True)):
        write_files(path.parent, {"file.part": left})
        site.asked.clear()
        get(site, path)
        assert site.asked == [("/file", f"bytes={len(left)}-")] + [("/file", None)] * again
        path.unlink()


def test_giving_up_keeps_the_part(site, path):
    site.breaks = [100] * 5
    assert error(lambda: get(site, path)) == (
        f"cifar10: fetching file failed ({site.base}/file: the connection ended after 500 of 10,000 bytes): "
        f"try again, or place file (md5 {SUM}) in {path.parent} by hand"
    )
    assert (path.parent / "file.part").read_bytes() == CONTENT[:500] and not path.exists()


def test_answers_of_the_server(site, path):
    site.files["/wrong"] = b"<html>"
    urls = [f"{site.base}/wrong", f"{site.base}/nothing", "http://127.0.0.1:9/file", "nonsense"]
    text = error(lambda: get(site, path, *urls))
    assert f"({urls[0]}: its md5 is {md5(b'<html>')}, wanted {SUM}; {urls[1]}: HTTP Error 404: Not Found; {urls[2]}: <urlopen " in text
    assert "; nonsense: " in text and not list(path.parent.iterdir())
    assert site.asked == [("/wrong", None), ("/nothing", None)]  # not again: the answers will be the same
    site.codes = [503, 429]
    site.asked.clear()
    get(site, path, *urls[:2], f"{site.base}/file")
    assert [path for path, _ in site.asked] == ["/wrong"] * 3 + ["/nothing", "/file"]


def test_mirrors_come_before_the_official_url(site, raw, monkeypatch):
    file, packed = "cifar-10-python.tar.gz", publish(monkeypatch, "cifar10").packed
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{site.base}/official/{file}")
    failed = f"cifar10: fetching {file} failed ({site.base}/official/{file}: HTTP Error 404: Not Found): "
    assert error(lambda: images.cifar10(str(raw), "cpu", download=True)).startswith(failed)
    site.files[f"/b/{file}"] = site.files[f"/official/{file}"] = packed
    site.asked.clear()
    bundle = images.cifar10(str(raw), "cpu", download=[f"{site.base}/a", f"{site.base}/b/", f"{site.base}/c"])
    assert len(bundle.splits["train"][1]) == 20
    images.cifar10(str(raw), "cpu", download=True)  # which is there
    images.cifar10(str(raw / "another"), "cpu", download=True)
    assert [path for path, _ in site.asked] == [f"/a/{file}", f"/b/{file}", f"/official/{file}"]


def test_what_is_missing_or_not_whole_is_fetched(site, raw, monkeypatch):
    cifar, svhn, tiny = (publish(monkeypatch, name) for name in ("cifar100", "svhn", "tiny_imagenet"))
    train, test = svhn.files.items()
    monkeypatch.setattr(tiny_imagenet, "URL", f"{site.base}/tiny-imagenet-200.zip")
    site.files = {"/cifar-100-python.tar.gz": cifar.packed, "/test_32x32.mat": test[1], "/tiny-imagenet-200.zip": tiny.packed}
    write_files(raw, cifar.files | {"cifar-100-python.tar.gz": cifar.packed[:100], "cifar-100-python/train": b"junk"} | dict([train]))
    assert len(images.cifar100(str(raw), "cpu", download=[site.base]).splits["train"][1]) == 20
    assert (raw / "cifar-100-python.tar.gz").read_bytes() == cifar.packed
    assert len(images.svhn(str(raw), "cpu", download=[site.base]).splits["test"][1]) == 10
    assert len(images.tiny_imagenet(str(raw), "cpu", download=True).splits["train"][1]) == 9
    assert [path for path, _ in site.asked[-2:]] == ["/test_32x32.mat", "/tiny-imagenet-200.zip"]
