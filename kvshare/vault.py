"""The tenants' keys, and blocks sealed with them: AES-256-GCM for what lies on disk and in the object store.

    keys_dir/{tenant tag}.key ─> secrets of a tenant, by id     the newest seals, all unseal
                                     │
    block ── seal(tenant, aad) ──> bytes of the same length ─> disk, object store
                   └─> nonce, tag, key id ─> the block's header

Where a block lies is part of it (`associated`): moved to another slot, segment or key, it does not unseal. Each block has a key
of its own, derived from the tenant's secret and its place (keyed BLAKE2b), so that random nonces (96 bits) meet only where one
block is written to one place again; however much a tenant writes, on however many nodes, its secret need not change for it.

Destroying a tenant's secrets is erasure: no copy of a block sealed under them can be read again, and what the tenant writes
later is under another secret with another id. Whoever shares the folder looks at the file again once in `FRESH_SECONDS`, and
forgets what was destroyed. The file is overwritten before it goes; a file system or device that writes elsewhere (snapshots,
flash) may keep the old bytes for a while, so give ``keys_dir`` a place of its own, and no backup that outlives an erasure.

A file has mode 0600 and a line for each secret, ``kvshare-key 1 {id, 16 hex digits} {secret, 64 hex digits}``, oldest first.
It is made under another name and linked, so two nodes that begin at once agree on the first; more lines are only appended,
by who has it locked.

Threads: any; everything but `enabled` may wait for the file system, so call it in a pool's thread. Sealing and unsealing let
other threads run meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import threading
import time
from pathlib import Path
from typing import NamedTuple

from kvshare.errors import ConfigError, VaultError

log = logging.getLogger("kvshare")

FRESH_SECONDS = 1.0  # so long a secret is used without a look at its file: who shares the folder may have destroyed it
SECRETS_MAX = 64  # of one tenant; further rotation is refused, since dropping one would lose its blocks
TENANTS_MAX = 4096  # whose secrets are held in memory; others' are read again
NONCE_BYTES, TAG_BYTES, SECRET_BYTES = 12, 16, 32
_MAGIC, _VERSION = "kvshare-key", "1"
_LINE_BYTES = 96  # more than a line has
_PERSON = b"kvshare block"  # separates this use of BLAKE2b from all others


class Sealed(NamedTuple):
    """What the header says of a sealed block. key_id 0: it is not encrypted, nonce and tag are zeros."""

    nonce: bytes
    tag: bytes
    key_id: int


UNSEALED = Sealed(bytes(NONCE_BYTES), bytes(TAG_BYTES), 0)


class Ring(NamedTuple):
    """A tenant's secrets as its file had them."""

    by_id: dict[int, bytes]
    newest: int
    identity: tuple[int, ...]  # of the file


def associated(place_id: bytes, index: int, key: bytes, length: int) -> bytes:
    """The associated data of a block: where it lies and what it is.

    place_id: 16 random bytes of the region's superblock, or the segment's id. index: its slot, or its number in the segment.
    """
    return place_id + index.to_bytes(8, "little") + key + length.to_bytes(4, "little")


class Vault:
    """See the module's docstring. Made by `open`."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._rings: dict[bytes, Ring] = {}
        self._checked: dict[bytes, float] = {}  # when a ring's file was looked at last
        self._lock = threading.Lock()  # for changes of the two, and of files by this process
        self._said: set[bytes] = set()  # tenants whose trouble was said

    @staticmethod
    def open(keys_dir: str) -> Vault:
        """The vault of a folder; "" for one that is not `enabled`, whose blocks stay as they are.

        Raises:
            ConfigError: the folder is missing, can't be written, holds a file that others may read or that is no key file; or
                the library is missing.
        """
        if not keys_dir:
            return Vault(None)
        try:
            import cryptography.hazmat.primitives.ciphers  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"setting 'keys_dir' cannot be {keys_dir!r}: encryption needs a library, install 'kvshare[encrypt]'."
            ) from error
        vault = Vault(Path(keys_dir))
        try:
            _try_writing(Path(keys_dir))
            for path in sorted(Path(keys_dir).glob("*.key")):
                _read(path)
        except (OSError, VaultError) as error:
            raise ConfigError(
                f"setting 'keys_dir' cannot be {keys_dir!r}: {error}; use a folder that this user alone can read and write."
            ) from error
        return vault

    @property
    def enabled(self) -> bool:
        return self._folder is not None

    # --- blocks -------------------------------------------------------------------------------------------------------

    def seal(self, tenant: bytes, aad: bytes, source: memoryview, target: memoryview) -> Sealed | None:
        """Encrypt ``source`` into ``target``, of the same length and apart from it.

        tenant: its tag (`kvshare.keys.tenant_of`). aad: see `associated`. None, and said once, when the tenant's secret can't
        be had: the block must not be written. Of a vault that is not enabled: a copy, and `UNSEALED`.
        """
        assert len(source) == len(target)
        if self._folder is None:
            target[:] = source
            return UNSEALED
        ring = self._ring(tenant, make=True)
        if ring is None:
            return None
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        nonce = secrets.token_bytes(NONCE_BYTES)
        key = _block_key(ring.by_id[ring.newest], aad)
        encryptor = Cipher(algorithms.AES256(key), modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(aad)
        encryptor.update_into(source, target)
        encryptor.finalize()
        return Sealed(nonce, encryptor.tag, ring.newest)

    def unseal(self, tenant: bytes, aad: bytes, sealed: Sealed, source: memoryview, target: memoryview) -> bool:
        """Decrypt ``source`` into ``target``, of the same length and apart from it.

        False: the block is damaged, is not what or where ``aad`` says, or its secret is unknown or destroyed; ``target`` is
        undefined then. An enabled vault takes no block that is not encrypted, since anybody might have put it there; one that
        is not enabled takes no other.
        """
        assert len(source) == len(target)
        if self._folder is None:
            target[:] = source
            return sealed.key_id == 0
        ring = self._ring(tenant, wanted=sealed.key_id) if sealed.key_id else None
        if ring is None or sealed.key_id not in ring.by_id:
            return False
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        key = _block_key(ring.by_id[sealed.key_id], aad)
        decryptor = Cipher(algorithms.AES256(key), modes.GCM(sealed.nonce, sealed.tag)).decryptor()
        decryptor.authenticate_additional_data(aad)
        decryptor.update_into(source, target)
        try:
            decryptor.finalize()
        except InvalidTag:
            return False
        return True

    # --- keys ---------------------------------------------------------------------------------------------------------

    def rotate(self, tenant: bytes) -> int:
        """Give the tenant a new secret, which seals from now on; the old ones still unseal. Returns its id.

        Raises:
            VaultError: the folder can't be used, or the tenant has `SECRETS_MAX` secrets.
        """
        path = self._path(tenant)
        try:
            with self._lock:
                if not path.exists():
                    _create(path)
                else:
                    _append(path)
                ring = self._remember(tenant, _read(path))
        except OSError as error:
            raise VaultError(f"cannot write {path}: {error.strerror}; make keys_dir writable") from error
        return ring.newest

    def destroy(self, tenant: bytes) -> bool:
        """Erase: the tenant's secrets are gone, from the folder and from here. False when it had none.

        Raises:
            VaultError: the folder can't be used; the secrets may be there yet.
        """
        if self._folder is None:
            return False
        path = self._path(tenant)
        with self._lock:
            self._rings.pop(tenant, None)
            try:
                _overwrite(path)
            except FileNotFoundError:
                if not path.parent.is_dir():
                    raise VaultError(f"cannot erase {path}: keys_dir is away; bring it back and do it again") from None
                return False
            except OSError as error:
                raise VaultError(f"cannot erase {path}: {error.strerror}; make keys_dir writable and do it again") from error
        log.info("kvshare: the keys of tenant %s are destroyed: what was sealed with them can't be read again", tenant.hex())
        return True

    def _path(self, tenant: bytes) -> Path:
        assert self._folder is not None
        return self._folder / f"{tenant.hex()}.key"

    def _ring(self, tenant: bytes, wanted: int = 0, make: bool = False) -> Ring | None:
        """The tenant's secrets; None when there are none (and none shall be made) or they can't be had, which is said once.
        ``wanted``: an id that the caller needs, so a file that has changed is read at once."""
        ring = self._rings.get(tenant)
        fresh = ring is not None and time.monotonic() - self._checked.get(tenant, 0.0) < FRESH_SECONDS
        if ring is not None and fresh and (not wanted or wanted in ring.by_id):
            return ring
        with self._lock:
            try:
                ring = self._reread(tenant, make)
            except (OSError, VaultError) as error:
                if isinstance(error, VaultError):
                    self._rings.pop(tenant, None)  # it is being erased, or must not be trusted any more
                if make:
                    self._say(tenant, error)
                    return None
                # Who only reads goes on with what is known: the folder may be away for a while.
                return self._rings.get(tenant)
            self._said.discard(tenant)
            return ring

    def _reread(self, tenant: bytes, make: bool) -> Ring | None:
        path, ring = self._path(tenant), self._rings.get(tenant)
        try:
            if ring is None or _identity(os.stat(path)) != ring.identity:
                ring = _read(path)
        except FileNotFoundError:
            if path.parent.is_dir():
                self._rings.pop(tenant, None)  # destroyed by another process that shares the folder
            if not make:
                return self._rings.get(tenant)
            _create(path)
            ring = _read(path)
        return self._remember(tenant, ring)

    def _remember(self, tenant: bytes, ring: Ring) -> Ring:
        if tenant not in self._rings and len(self._rings) >= TENANTS_MAX:
            oldest = next(iter(self._rings))
            del self._rings[oldest]
            self._checked.pop(oldest, None)
        self._checked[tenant] = time.monotonic()
        self._rings[tenant] = ring
        return ring

    def _say(self, tenant: bytes, error: OSError | VaultError) -> None:
        if tenant not in self._said and len(self._said) < TENANTS_MAX:
            self._said.add(tenant)
            log.warning(
                "kvshare: blocks of tenant %s are not written to disk or object store while its key can't be had (%s): see to "
                "the folder of setting 'keys_dir'",
                tenant.hex(),
                error,
            )


def _block_key(secret: bytes, aad: bytes) -> bytes:
    return hashlib.blake2b(aad, key=secret, digest_size=SECRET_BYTES, person=_PERSON).digest()


# --- files ------------------------------------------------------------------------------------------------------------


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _try_writing(folder: Path) -> None:
    """Raises OSError when no file can be made in ``folder``."""
    path = folder / f".{secrets.token_hex(8)}.try"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    path.unlink()


def _new_line() -> bytes:
    key_id = secrets.randbits(64) or 1
    return f"{_MAGIC} {_VERSION} {key_id:016x} {secrets.token_hex(SECRET_BYTES)}\n".encode()


def _create(path: Path) -> None:
    """Make the file with a first secret, unless another process is quicker. Raises OSError."""
    made = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.new")
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, _new_line())
        os.fsync(fd)  # before a block is sealed with it
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
    finally:
        os.close(fd)
        made.unlink()
    _sync_folder(path.parent)


def _append(path: Path) -> None:
    """Add a secret. Raises OSError; VaultError when there are too many."""
    with contextlib.closing(os.fdopen(os.open(path, os.O_RDWR | os.O_CLOEXEC), "r+b", buffering=0)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        if os.fstat(file.fileno()).st_nlink == 0:
            raise OSError(errno.ESTALE, "it was destroyed meanwhile")
        if text.count(b"\n") >= SECRETS_MAX:
            raise VaultError(f"{path} has {SECRETS_MAX} secrets: purge the tenant, or leave it as it is")
        file.write((b"" if text.endswith(b"\n") else b"\n") + _new_line())  # a torn line stays alone
        os.fsync(file.fileno())


def _overwrite(path: Path) -> None:
    """Fill the file with zeros, then remove it. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, bytes(os.fstat(fd).st_size), 0)
        os.fsync(fd)
        path.unlink()
    finally:
        os.close(fd)
    _sync_folder(path.parent)


def _read(path: Path) -> Ring:
    """The secrets in a file.

    Raises:
        OSError: it can't be read. VaultError: others may read it, or it is not what we write.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_mode & 0o077:
            raise VaultError(f"{path} may be read by other users: chmod 600 it, and rotate or erase its keys if they were")
        text = os.read(fd, _LINE_BYTES * SECRETS_MAX * 2)
    finally:
        os.close(fd)
    by_id: dict[int, bytes] = {}
    for line in text.decode(errors="replace").splitlines(keepends=True):
        match line.split():
            case [magic, version, *_] if line.endswith("\n") and magic == _MAGIC and version != _VERSION:
                raise VaultError(f"{path} is of version {version}, ours is {_VERSION}")
            case [magic, _, key_id, secret] if magic == _MAGIC and (len(key_id), len(secret)) == (16, 2 * SECRET_BYTES):
                with contextlib.suppress(ValueError):
                    by_id[int(key_id, 16)] = bytes.fromhex(secret)
    if not by_id:
        raise VaultError(f"{path} is no key file of kvshare, or is damaged: restore it, or remove it to give its blocks up")
    return Ring(by_id, next(reversed(by_id)), _identity(status))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
