"""What each tenant may use, keep, and where: the file of setting ``tenants_file``, read once at a node's start.

    {"tenants": {"acme": {"bytes_max": "10GiB", "ttl_seconds": 86400, "regions": ["eu"]}},
     "default": {"ttl_seconds": 604800}}

``default`` holds for tenants without an entry and for blocks that name no tenant; what neither says is without limit. A limit
of an entry stands for itself: what it leaves out is not taken from ``default``.

Keys carry a tenant's tag, a digest of the name, so rules are found by tag.

Threads: any; nothing changes after `load`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from kvshare import keys
from kvshare.config import parse_bytes
from kvshare.errors import ConfigError

TTL_SECONDS_MAX = 10 * 365 * 86400
TENANTS_MAX = 100_000
FILE_BYTES_MAX = 64 << 20
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NAME_REMEDY = "use 1 to 64 letters, digits, '_', '.', '-'"


class TenantRules(msgspec.Struct, frozen=True):
    """bytes_max: in one tier (arenas, disk) of one node, 0: no limit. ttl_seconds: a block may be read for so long after it was
    computed, 0: as long as it is there. regions: labels of the nodes that may hold or read its blocks, empty: all."""

    bytes_max: int = 0
    ttl_seconds: int = 0
    regions: tuple[str, ...] = ()


FREE = TenantRules()


def tag_of(name: object) -> bytes | None:
    """The tag of a tenant's name as somebody gave it; None when it is no such name."""
    return keys.tenant_tag(name) if isinstance(name, str) and NAME.fullmatch(name) else None


class Tenants:
    """Rules by tenant. ``default``: of who has none."""

    def __init__(self, rules: Mapping[str, TenantRules] | None = None, default: TenantRules = FREE) -> None:
        self._default = default
        self._by_tag = {keys.tenant_tag(name): one for name, one in (rules or {}).items()}

    @staticmethod
    def load(path: str) -> Tenants:
        """The rules of a file; "" for none.

        Raises:
            ConfigError: it can't be read, or says what can't be followed; names file, tenant and remedy.
        """
        if not path:
            return Tenants()
        try:
            with Path(path).open("rb") as file:
                text = file.read(FILE_BYTES_MAX + 1)
            if len(text) > FILE_BYTES_MAX:
                raise ConfigError(f"tenants_file {path} is larger than {FILE_BYTES_MAX >> 20} MiB: use a shorter one.")
            content = json.loads(text, object_pairs_hook=_no_twins)
        except OSError as error:
            raise ConfigError(f"setting 'tenants_file' cannot be {path!r}: {error.strerror}; name a readable file.") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"tenants_file {path} is no JSON ({error}): correct it.") from error
        return _parse(path, content)

    def rules(self, tag: bytes) -> TenantRules:
        """What holds for the tenant of this tag (`kvshare.keys.tenant_of`)."""
        return self._by_tag.get(tag, self._default)

    def may_be_in(self, tag: bytes, region: str) -> bool:
        """May a node with this label hold or read its blocks? A tenant that is bound to regions is never where there is no
        label."""
        regions = self.rules(tag).regions
        return not regions or region in regions

    @property
    def bound(self) -> bool:
        """Is any tenant bound to regions?"""
        return bool(self._default.regions) or any(one.regions for one in self._by_tag.values())

    @property
    def limited(self) -> bool:
        """Has any tenant a limit of bytes or time?"""
        return any(one.bytes_max or one.ttl_seconds for one in (self._default, *self._by_tag.values()))


def _no_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _parse(path: str, content: object) -> Tenants:
    unknown = set(content) - {"tenants", "default"} if isinstance(content, dict) else {"?"}
    if not isinstance(content, dict) or unknown:
        raise ConfigError(f"tenants_file {path}: use an object with 'tenants' and 'default', and nothing else.")
    tenants = content.get("tenants", {})
    if not isinstance(tenants, dict) or len(tenants) > TENANTS_MAX:
        raise ConfigError(f"tenants_file {path}: 'tenants' must be an object of at most {TENANTS_MAX} tenants.")
    for name in tenants:
        if NAME.fullmatch(name) is None:
            raise ConfigError(f"tenants_file {path}: a tenant cannot be {name!r}: {NAME_REMEDY}.")
    rules = {name: _rules(path, f"tenant {name!r}", fields) for name, fields in tenants.items()}
    return Tenants(rules, _rules(path, "'default'", content.get("default", {})))


def _rules(path: str, who: str, fields: object) -> TenantRules:
    known = {"bytes_max": _bytes, "ttl_seconds": _seconds, "regions": _regions}
    if not isinstance(fields, dict):
        raise ConfigError(f"tenants_file {path}: {who} must be an object with some of {', '.join(known)}.")
    values: dict[str, object] = {}
    for field, value in fields.items():
        if field not in known:
            raise ConfigError(f"tenants_file {path}: {who} has an unknown field {field!r}: use some of {', '.join(known)}.")
        try:
            values[field] = known[field](value)
        except ValueError as error:
            raise ConfigError(f"tenants_file {path}: {field} of {who} cannot be {value!r}: {error}.") from error
    return TenantRules(**values)  # type: ignore[arg-type]


def _bytes(value: object) -> int:
    try:
        parsed = parse_bytes(value) if isinstance(value, str) else value
    except ValueError:
        parsed = None
    if not isinstance(parsed, int) or isinstance(parsed, bool) or not 0 <= parsed < 1 << 63:
        raise ValueError("use bytes as a whole number or as '10GiB', 0 for no limit")
    return parsed


def _seconds(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= TTL_SECONDS_MAX:
        raise ValueError(f"use whole seconds up to {TTL_SECONDS_MAX}, 0 for no end")
    return value


def _regions(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and NAME.fullmatch(one) for one in value) or not value:
        raise ValueError("use a list of labels as in setting 'region', or leave it out for all regions")
    return tuple(value)
