"""This file owns an HTTP server on this machine that serves a folder and misbehaves as it is told to, over real sockets."""

import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

Fault = str | int | None  # a name of `_Handler`, a status, or none


class Asked(NamedTuple):
    """One request: what for, its Range, and how it was answered."""

    name: str
    range: str | None
    fault: Fault


class HostileServer:
    """Serves the files of `folder` at `url`; `plans[name]` are the faults of the next requests for a file, then `always`."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.folder, self.ranges, self.asked = folder, ranges, list[Asked]()
        self.plans: dict[str, deque[Fault]] = {}
        self.always: Callable[[str], Fault] = lambda _: None
        self.over, self.lock = threading.Event(), threading.Lock()
        handler = type("Handler", (_Handler,), {"hostile": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HostileServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def plan(self, name: str, *faults: Fault) -> None:
        """Answer the next requests for a file so."""
        self.plans[name] = deque(faults)

    def times(self, name: str) -> int:
        """How often a file was asked for."""
        return sum(one.name == name for one in self.asked)

    def fault_of(self, name: str, told: str | None) -> Fault:
        with self.lock:
            planned = self.plans.get(name)
            fault = planned.popleft() if planned else self.always(name)
            self.asked.append(Asked(name, told, fault))
        return fault


class _Handler(BaseHTTPRequestHandler):
    hostile: HostileServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        told = self.headers.get("Range")
        fault = self.hostile.fault_of(name, told)
        if isinstance(fault, int):
            self._end(fault, {"Retry-After": "0"} if fault in (429, 503) else {})
            return
        target = self.hostile.folder / name.removeprefix("moved/")
        if fault is not None:
            kind, _, text = fault.partition(" ")
            if kind == "to":
                self._end(302, {"Location": text})
                return
            if kind == "later":
                self._end(429, {"Retry-After": text})
                return
        if not target.is_file():
            self._end(404, {})
            return
        self._serve(target.read_bytes(), told, fault)

    def _end(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def _serve(self, whole: bytes, told: str | None, fault: str | None) -> None:
        body, status, headers = whole, 200, {"ETag": f'"{len(whole)}-{hash(whole)}"'}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", told or "")
        if match and self.hostile.ranges and fault != "whole":
            start, stop = int(match[1]), min(int(match[2] or len(whole)), len(whole) - 1) + 1
            if start >= len(whole):
                self._end(416, {"Content-Range": f"bytes */{len(whole)}"})
                return
            body, status = whole[start:stop], 206
            shift = 1 if fault == "wrong_range" else 0
            headers["Content-Range"] = f"bytes {start + shift}-{stop - 1 + shift}/{len(whole)}"
        if fault == "other_bytes":
            body = bytes(byte ^ 1 for byte in body)
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        half = body[: len(body) // 2]
        length = {"lies_short": len(half), "lies_long": len(body) + 1000}.get(fault or "", len(body))
        if fault in ("refuse", "hang"):
            self._stop(hang=fault == "hang")
            return
        self.send_response(status)
        if fault == "chunked_cut":
            headers["Transfer-Encoding"] = "chunked"
        elif fault != "no_length_cut":
            headers["Content-Length"] = str(length)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        match fault:
            case "drop":
                self.wfile.write(half)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._stop()
            case "truncate" | "no_length_cut":
                self.wfile.write(half)
                self._stop()
            case "lies_short":
                self.wfile.write(half)
            case "lies_long":
                self.wfile.write(body)
                self._stop()
            case "chunked_cut":
                self.wfile.write(b"%x\r\n%s\r\n" % (len(half), half))
                self._stop()
            case "hang_body":
                self.wfile.write(half)
                self._stop(hang=True)
            case "drip":
                for byte in body:
                    if self.hostile.over.wait(0.05):
                        break
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
            case "slow":
                for start in range(0, len(body), 1 << 14):
                    time.sleep(0.02)
                    self.wfile.write(body[start : start + (1 << 14)])
            case _:
                self.wfile.write(body)

    def _stop(self, *, hang: bool = False) -> None:
        if hang:
            self.hostile.over.wait(60)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR) if not hang else None

    def handle(self) -> None:
        with suppress(OSError):  # the other side has gone
            super().handle()
