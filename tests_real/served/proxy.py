"""A process between client and server that spoils the answers of generations on request: what a broken network or server looks like.

python proxy.py SERVER_URL MANNER FIRST LAST     generations FIRST to LAST (from 0) are spoilt, all else passes; prints its port

garbage   200 with a page of HTML          odd    200 with JSON that is no generation
cut       the connection ends midway       busy   503
lost      the server generates, then the connection ends midway
"""

import itertools
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

target, manner, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
generations = itertools.count()
SPOILT = {"garbage": (200, b"<html>"), "odd": (200, b"{}"), "busy": (503, b"later")}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(*self.passed(None))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path != "/generate" or not first <= next(generations) <= last:
            self.answer(*self.passed(body))
        elif manner in SPOILT:
            self.answer(*SPOILT[manner])
        else:
            if manner == "lost":
                self.passed(body)
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
            self.close_connection = True

    def passed(self, body):
        request = urllib.request.Request(target + self.path, body, {"content-type": "application/json"}, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
