"""As much of a Confluent-compatible schema registry as its client asks for, over HTTP; it can be made to fail.

There is no server of one that tests could fetch. What the loop does when it is slow, closed or gone is tested with it.
Source: the paths and answers of Confluent's Schema Registry API reference, version 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote

_NOT_FOUND = {"error_code": 40403, "message": "Schema not found"}


class RegistryServer(ThreadingHTTPServer):
    """Schemas by id, in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.schemas: list[dict[str, Any]] = []
        self.subjects: dict[str, list[int]] = {}
        self.status = 200  # other than 200: the answer to everything
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def id_of(self, schema: dict[str, Any], *, register: bool, subject: str) -> int | None:
        """From 1 on; None if it is not there and may not be added."""
        if schema not in self.schemas and register:
            self.schemas.append(schema)
        found = self.schemas.index(schema) + 1 if schema in self.schemas else None
        if found is not None and register and found not in self.subjects.setdefault(subject, []):
            self.subjects[subject].append(found)
        return found if found in self.subjects.get(subject, []) else None


class _Handler(BaseHTTPRequestHandler):
    server: RegistryServer

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """`/schemas/ids/ID` and `/subjects/SUBJECT/versions/VERSION`; Protobuf as source, unless asked otherwise."""
        path, _, query = self.path.partition("?")
        parts, number = path.split("/"), int(path.rpartition("/")[2])
        subject = unquote(parts[2]) if parts[1] == "subjects" else ""
        ids = self.server.subjects.get(subject, []) if subject else range(1, len(self.server.schemas) + 1)
        if not 0 < number <= len(ids):
            return self._answer(None)
        found = self.server.schemas[ids[number - 1] - 1]
        if found["schemaType"] == "PROTOBUF" and parse_qs(query).get("format") != ["serialized"]:
            found = {**found, "schema": 'syntax = "proto3";'}
        return self._answer(
            {**found, **({"subject": subject, "version": number, "id": ids[number - 1]} if subject else {})}
        )

    def do_POST(self) -> None:
        """`/subjects/SUBJECT/versions` registers, `/subjects/SUBJECT` looks up."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.path.partition("?")[0].split("/")
        schema = {"schema": body["schema"], "schemaType": body.get("schemaType") or "AVRO"}
        if body.get("references"):
            schema["references"] = body["references"]
        subject = unquote(path[2])
        found = self.server.id_of(schema, register=path[-1] == "versions", subject=subject)
        version = None if found is None else self.server.subjects[subject].index(found) + 1
        self._answer(None if found is None else {"id": found, "version": version, "subject": subject, **schema})

    def _answer(self, found: dict[str, Any] | None) -> None:
        self.server.requests.append(self.path)
        status = self.server.status if self.server.status != 200 else 200 if found is not None else 404
        answer = found if status == 200 else _NOT_FOUND if status == 404 else {"error_code": status, "message": "no"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def registry_server() -> Iterator[RegistryServer]:
    """One, for as long as the `with` lasts."""
    with RegistryServer() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
