"""A bucket of an object store (S3-compatible, or a folder), behind a patience that ends. The only module that knows obstore.

    start(work) ──> one of our threads: work(requests) ──> result(future)
                                            │ fails, or takes longer than ``seconds``
                                            └──> left alone for `AWAY_SECONDS`: all that comes is refused at once

A store that can't be reached or does not answer is left alone altogether; one that denies writing or has no room is only not
written to. Either is said once, with the remedy, and once more when it is over. An object that is not there is no failure.

A request that can't be interrupted (a folder on a dead network file system) keeps its thread; what it writes to is memory of
its own, so nobody else has to wait for it.

Threads: all methods from any thread; ours are daemons.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from kvshare.errors import ObjectStoreError
from kvshare.transport.workers import Workers

if TYPE_CHECKING:
    from obstore.store import ClientConfig, LocalStore, RetryConfig, S3Store

log = logging.getLogger("kvshare")

T = TypeVar("T")

THREADS = 8  # requests in flight
AWAY_SECONDS = 10.0  # so long a store that failed is left alone
CONNECT_SECONDS = 5.0
RETRIES = 2  # of requests that the store failed to serve (5xx)
CLOSE_SECONDS = 2.0
PUT_TRIES = 4
_PART_GONE = "os error 2)"  # ENOENT
_DENIED = ("PermissionDeniedError", "UnauthenticatedError", "PermissionError")
_NO_ROOM = ("os error 28", "os error 27", "os error 122", "os error 30")  # ENOSPC, EFBIG, EDQUOT, EROFS
_NO_SUCH_RANGE = ("416 Range", "InvalidRange", "Requested range was invalid")


class ObjectGone(ObjectStoreError):
    """The object is not there (any more)."""


class TooLong(ObjectStoreError):
    """The object is longer than anything of ours."""


class Listed(NamedTuple):
    """An object as a listing tells it. name: behind the folder; modified: seconds since 1970, by the store's clock."""

    name: str
    modified: float
    size: int


class Requests:
    """Single requests to the store, each one blocking; for works given to `Bucket.start`.

    All raise ObjectGone, or whatever obstore raises.
    """

    def __init__(self, store: S3Store | LocalStore, base: str, folder: Path | None) -> None:
        self._store = store
        self._base = base
        self._folder = folder  # of a store that is one

    def put(self, path: str, data: memoryview | bytes) -> None:
        """Atomic: nobody sees a part of it."""
        self._put(path, data, "overwrite")

    def create(self, path: str, data: bytes) -> bool:
        """As `put`, unless somebody else has put an object there: False then. The store decides between two."""
        import obstore

        try:
            self._put(path, data, "create")
        except obstore.exceptions.AlreadyExistsError:
            # By us, if the first answer was lost on its way and the request repeated.
            try:
                return bytes(self.get(path, len(data))) == data
            except (FileNotFoundError, TooLong):
                return False
        return True

    def _put(self, path: str, data: memoryview | bytes, mode: Literal["create", "overwrite"]) -> None:
        import obstore

        for left in reversed(range(PUT_TRIES)):
            try:
                obstore.put(self._store, self._base + path, data, use_multipart=False, mode=mode)
                return
            except Exception as error:
                # A purge takes half-written files away at any age, ours too.
                if not left or self._folder is None or _PART_GONE not in str(error):
                    raise

    def get(self, path: str, bytes_max: int) -> memoryview:
        """The whole object. Raises TooLong."""
        import obstore

        answer = obstore.get(self._store, self._base + path)
        if answer.meta["size"] > bytes_max:
            raise TooLong(f"{path} has {answer.meta['size']} bytes")
        return memoryview(answer.bytes())

    def get_range(self, path: str, start: int, length: int) -> memoryview:
        """Shorter than ``length`` where the object ends before."""
        import obstore

        try:
            return memoryview(obstore.get_range(self._store, self._base + path, start=start, length=length))
        except Exception as error:
            if any(sign in str(error) for sign in _NO_SUCH_RANGE):
                return memoryview(b"")
            raise

    def exists(self, path: str) -> bool:
        import obstore

        try:
            obstore.head(self._store, self._base + path)
        except FileNotFoundError:
            return False
        return True

    def list(self, folder: str, after: str = "") -> list[Listed]:
        """Objects directly in ``folder`` whose names sort after ``after``."""
        import obstore

        prefix = self._base + folder
        pages = obstore.list(self._store, prefix, offset=f"{prefix}/{after}" if after else None, chunk_size=1000)
        return [
            Listed(item["path"].rpartition("/")[2], item["last_modified"].timestamp(), item["size"])
            for page in pages
            for item in page
        ]

    def delete(self, paths: Sequence[str]) -> None:
        """Those that are not there are left so."""
        import obstore

        for path in paths:
            try:
                obstore.delete(self._store, self._base + path)
            except FileNotFoundError:
                pass

    def remove_partial(self, folder: str, before: float) -> int:
        """Remove what writers that died have left of objects, if older than ``before`` (seconds since 1970); returns how many.

        Only folders show such: obstore writes there to ``name#number`` and renames.
        """
        removed = 0
        for path in self._partial(folder):
            try:
                if path.stat().st_mtime < before:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:
                pass
        return removed

    def _partial(self, folder: str) -> Iterator[Path]:
        return iter(()) if self._folder is None else (self._folder / folder).glob("*#*")


class Bucket:
    """See the module's docstring. Made by `open`. ``name``: for people."""

    def __init__(self, name: str, requests: Requests, seconds: float) -> None:
        self.name = name
        self._requests = requests
        self._seconds = seconds
        self._workers = Workers("kvshare-object-store", THREADS)
        self._lock = threading.Lock()
        self._until = {False: 0.0, True: 0.0}  # reading, writing: refused until then (monotonic)
        self._said = {False: False, True: False}

    @staticmethod
    def open(url: str, cluster: str, seconds: float) -> Bucket:
        """``s3://bucket/prefix`` or ``file:///folder``; nothing is asked of the store yet.

        Raises:
            ObjectStoreError: the library is missing, or the URL, the environment or the folder can't be used. Says why and what
                to do, not which URL.
        """
        try:
            from obstore.store import LocalStore, S3Store
        except ImportError as error:
            raise ObjectStoreError("it needs a library: install 'kvshare[object]'") from error
        parts = urlsplit(url)
        store: S3Store | LocalStore
        try:
            if parts.scheme == "file":
                folder = Path(parts.path)
                store = LocalStore(folder, mkdir=True)
                return Bucket(url, Requests(store, f"{cluster}/", folder / cluster), seconds)
            if not parts.netloc:
                raise ValueError("it names no bucket")
            base = "/".join([*filter(None, [parts.path.strip("/")]), cluster, ""])
            store = S3Store(parts.netloc, client_options=_client(seconds), retry_config=_retries(seconds))
        except Exception as error:
            raise ObjectStoreError(f"{_first_line(error)}; see 'Object store' in docs/operations.md") from error
        return Bucket(url, Requests(store, base, None), seconds)

    def away(self, writing: bool = False) -> bool:
        """Is it being left alone?"""
        until = max(self._until[False], self._until[writing])
        return time.monotonic() < until

    def start(self, work: Callable[[Requests], T], writing: bool = False) -> Future[T]:
        """Do ``work`` in a thread; then ask `result`, once."""
        future: Future[T] = Future()
        self._workers.submit(lambda: self._carry_out(work, future, writing))
        return future

    def result(self, future: Future[T], writing: bool = False, requests: int = 1) -> T:
        """Wait for it, ``seconds`` for each of its ``requests``.

        Raises:
            ObjectGone: what was asked for is not there. ObjectStoreError: one sentence.
        """
        try:
            answer = future.result(self._seconds * requests)
        except ObjectStoreError:
            raise
        except FileNotFoundError as error:
            raise ObjectGone(_first_line(error)) from error
        except TimeoutError as error:
            if future.done():  # its own
                raise self._failed(error, writing) from error
            future.cancel()
            raise self._failed(None, writing) from error
        except Exception as error:
            raise self._failed(error, writing) from error
        self._answered(writing)
        return answer

    def call(self, work: Callable[[Requests], T], writing: bool = False, requests: int = 1) -> T:
        """Do ``work`` in a thread and wait for it; as `result`."""
        return self.result(self.start(work, writing), writing, requests)

    def close(self) -> None:
        """Wait a moment for what is under way; idempotent."""
        self._workers.close(CLOSE_SECONDS)

    def _carry_out(self, work: Callable[[Requests], T], future: Future[T], writing: bool) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self.away(writing):
                raise ObjectStoreError(f"the object store {self.name} is left alone for a while after a failure")
            result = work(self._requests)
        except BaseException as error:  # also what obstore raises when it panics: nobody may wait for ever
            future.set_exception(error)
        else:
            future.set_result(result)

    def _failed(self, error: Exception | None, writing: bool) -> ObjectStoreError:
        """Leave the store alone and say so once. error: None when it did not answer in time."""
        text, only_writing = self._explain(error, writing)
        with self._lock:
            self._until[only_writing] = time.monotonic() + AWAY_SECONDS
            said, self._said[only_writing] = self._said[only_writing], True
        if not said:
            what = "nothing is written to it" if only_writing else "its blocks are misses"
            log.warning("kvshare: %s; %s meanwhile", text, what)
        return ObjectStoreError(text)

    def _explain(self, error: Exception | None, writing: bool) -> tuple[str, bool]:
        """A sentence, and whether only writing is concerned."""
        reason = "" if error is None else f"{type(error).__name__} {error}"
        if error is None or "timed out" in reason or "TimedOut" in reason:
            return f"the object store {self.name} does not answer within {self._seconds} s (setting 'object_seconds')", False
        if any(sign in reason for sign in _DENIED) or "403 Forbidden" in reason:
            verb = "writing" if writing else "reading"
            remedy = "check the credentials (AWS_ACCESS_KEY_ID and others) and what they allow"
            return f"the object store {self.name} denies {verb}: {remedy}", writing
        if any(sign in reason for sign in _NO_ROOM):
            return f"the object store {self.name} takes no more ({_first_line(error)}): make room there", True
        return f"the object store {self.name} failed ({_first_line(error)}): check 'object_url' and AWS_ENDPOINT_URL", False

    def _answered(self, writing: bool) -> None:
        if self._said[writing] or self._said[False]:
            with self._lock:
                over = [kind for kind in {writing, False} if self._said[kind]]
                for kind in over:
                    self._said[kind] = False
            if over:
                log.warning("kvshare: the object store %s answers again", self.name)


def _client(seconds: float) -> ClientConfig:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    made: Any = {
        "timeout": timedelta(seconds=seconds),
        "connect_timeout": timedelta(seconds=min(seconds, CONNECT_SECONDS)),
        "allow_http": endpoint.startswith("http://"),
    }
    client: ClientConfig = made
    return client


def _retries(seconds: float) -> RetryConfig:
    backoff: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2}
    return {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=seconds), "backoff": backoff}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
