"""An S3 server for the tests: moto in a process of its own (`tests.support.moto_process`), checking every signature.

moto starts without any user, and lets so many calls through unsigned; they create the one user that the tests
are. From then on a request with a wrong key, a wrong secret or a body that was not signed is refused, as it
would be anywhere.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import attrs

from tests.support.certificates import Authority

__all__ = ["S3Server", "moto_server"]

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
REGION = "us-east-1"
_UNSIGNED_CALLS = 3  # create_user, create_access_key, put_user_policy
_numbers = itertools.count()
_ROOT = Path(__file__).parents[2]
_RUNNING = re.compile(r"Running on (https?://\S+:\d+)")


@attrs.frozen
class S3Server:
    """Where a server listens, and who we are there."""

    endpoint: str
    access_key_id: str
    secret_access_key: str = attrs.field(repr=False)
    region: str = REGION
    ca_file: str | None = None
    pid: int = 0
    """Its process, for tests that freeze it."""

    def environment(self) -> dict[str, str]:
        """The variables by which any S3 client finds its credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, bucket: str, prefix: str = "", **options: str) -> str:
        """The URL of a store of ours in a bucket."""
        query = {"endpoint": self.endpoint, "region": self.region, "path_style": "true"} | options
        return f"s3://{bucket}/{prefix}?{urlencode(query)}"

    def boto_client(self, service: str):
        """A synchronous client of another project, for setting up and for looking from outside."""
        import boto3  # a second of importing, for those tests alone that use it

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            verify=self.ca_file,
        )

    def temporary_credentials(self) -> tuple[str, str, str]:
        """Key, secret and session token of a role that may do everything."""
        role = f"role-{next(_numbers)}"
        iam = self.boto_client("iam")
        trust = _policy(Principal={"AWS": "*"})
        arn = iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
        iam.put_role_policy(RoleName=role, PolicyName="all", PolicyDocument=_policy(Resource="*"))
        answer = self.boto_client("sts").assume_role(RoleArn=arn, RoleSessionName="tests")
        found = answer["Credentials"]
        return found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"]

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        self.boto_client("s3").create_bucket(Bucket=name)
        return name


class _Process:
    """A server that says on its output where it listens; what it says after that is kept for the obituary."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.output: deque[str] = deque(maxlen=100)
        self.endpoint = ""
        self._said = threading.Event()
        self.process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.output.append(line)
            if not self.endpoint and (found := _RUNNING.search(line)):
                self.endpoint = found[1]
                self._said.set()
        self._said.set()  # it died

    def wait_endpoint(self) -> str:
        if not self._said.wait(START_TIMEOUT_S) or not self.endpoint:
            raise RuntimeError("the S3 server did not start:\n" + "".join(self.output))
        return self.endpoint

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _policy(**whom: object) -> str:
    statement = {"Effect": "Allow", "Action": "*"} | whom
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


@contextmanager
def moto_server(authority: Authority | None = None, *, host: str = "127.0.0.1") -> Iterator[S3Server]:
    """moto on a free port of the loopback, with one user who may do everything and nobody else.

    With an authority it speaks TLS, as ``localhost``. Another ``host`` is for network namespaces of the tests' own.
    """
    certificate = authority.issue("server") if authority else ()
    environment = {
        "PATH": os.defpath,
        "INITIAL_NO_AUTH_ACTION_COUNT": str(_UNSIGNED_CALLS),
        "MOTO_HOST": host,
    }
    command = [sys.executable, "-m", "tests.support.moto_process", *map(str, certificate)]
    process = _Process(command, environment)
    try:
        endpoint, ca_file = process.wait_endpoint(), None
        if authority is not None:
            endpoint, ca_file = endpoint.replace("127.0.0.1", "localhost"), str(authority.path)
        iam = S3Server(endpoint, "nobody", "nothing", ca_file=ca_file).boto_client("iam")
        iam.create_user(UserName="silo")
        key = iam.create_access_key(UserName="silo")["AccessKey"]
        iam.put_user_policy(UserName="silo", PolicyName="all", PolicyDocument=_policy(Resource="*"))
        yield S3Server(
            endpoint, key["AccessKeyId"], key["SecretAccessKey"], ca_file=ca_file, pid=process.process.pid
        )
    finally:
        process.stop()
