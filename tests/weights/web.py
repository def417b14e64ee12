"""Local web server for download tests, with simulated failures."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Content and behaviour of a local server, with a log of its requests.

    Attributes:
        pages: Status, headers and body for each path.
        breaks: Number of upcoming responses that are cut off after half of the body.
        ranges: Whether range requests are supported.
        asked: Requested paths and ranges, in order.
    """

    def __init__(self, port: int):
        self.port = port
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.breaks = 0
        self.ranges = False
        self.asked: list[tuple[str, str | None]] = []

    def add(self, name: str, body: bytes, status: int = 200, **headers: str) -> str:
        """Serve a file and return its URL."""
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        headers = {"Content-Type": "application/octet-stream", "ETag": '"1"', **headers}
        self.pages[f"/{name}"] = (status, headers, body)
        return self.address(name)

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    timeout = 10
    site: Site

    def do_GET(self) -> None:  # noqa: N802 - name required by the base class
        site, wanted = self.site, self.headers.get("Range")
        site.asked.append((self.path, wanted))
        status, headers, body = site.pages.get(self.path, (404, {}, b"none"))
        headers = dict(headers)
        if wanted and site.ranges and self.headers.get("If-Range") == headers.get("ETag"):
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[start:]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if site.breaks > 0:
            site.breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Disable the logging of requests."""


@contextmanager
def serving():
    """Yield a site whose server runs until the ``with`` block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    site = Site(server.server_address[1])
    server.RequestHandlerClass = type("Handler", (_Handler,), {"site": site})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
