"""The control API of a site, called over its socket as programs and peers do, without the command line in between."""

import http.client
import json
import socket


class Connection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def call(site, method, path, body=None, timeout=60):
    """The status of the answer, and what it says: the words of a refusal, or the answer, decoded if it is JSON. Raises `OSError` (or
    `http.client.HTTPException`) when the site is not there or goes away."""
    connection = Connection(site.control.removeprefix("unix:"), timeout)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.headers.get_content_type() != "application/json":
        return answer.status, text.decode()
    value = json.loads(text)
    return answer.status, value if answer.status < 300 else value["error"]
