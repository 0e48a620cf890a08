"""The metadata service of a cloud instance, as far as S3 clients ask it for credentials (IMDSv2)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

ROLE = "silo-role"
TOKEN = "metadata-token"


@asynccontextmanager
async def metadata_service(
    access_key_id: str, secret_access_key: str, session_token: str
) -> AsyncIterator[str]:
    """Serve one role's credentials; yields the service's URL."""
    credentials = {
        "Code": "Success",
        "Type": "AWS-HMAC",
        "AccessKeyId": access_key_id,
        "SecretAccessKey": secret_access_key,
        "Token": session_token,
        "LastUpdated": "2026-01-01T00:00:00Z",
        "Expiration": "2099-01-01T00:00:00Z",
    }
    answers = {
        "PUT /latest/api/token": TOKEN,
        "GET /latest/meta-data/iam/security-credentials": ROLE,
        f"GET /latest/meta-data/iam/security-credentials/{ROLE}": json.dumps(credentials),
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked = head.split(" HTTP/")[0].rstrip("/")
        allowed = asked.startswith("PUT") or f": {TOKEN}" in head
        body = answers.get(asked, "") if allowed else ""
        status = "200 OK" if body else "404 Not Found"
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield f"http://{host}:{port}"
