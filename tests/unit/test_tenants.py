"""The tenants' file: what it says is what holds, and what it can't say is refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvshare.errors import ConfigError
from kvshare.keys import NO_TENANT, tenant_tag
from kvshare.tenants import FREE, TenantRules, Tenants

ACME = tenant_tag("acme")


def load(tmp_path: Path, content: object) -> Tenants:
    path = tmp_path / "tenants.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Tenants.load(str(path))


def test_a_tenant_gets_what_its_entry_says(tmp_path: Path) -> None:
    entry = {"bytes_max": "10GiB", "ttl_seconds": 86400, "regions": ["eu", "us"]}
    tenants = load(tmp_path, {"tenants": {"acme": entry, "b": {"bytes_max": 5}}})
    assert tenants.rules(ACME) == TenantRules(10 << 30, 86400, ("eu", "us"))
    assert tenants.rules(tenant_tag("b")) == TenantRules(bytes_max=5)
    assert tenants.rules(tenant_tag("c")) == tenants.rules(NO_TENANT) == FREE


def test_the_default_holds_for_strangers_and_for_nobodys_blocks(tmp_path: Path) -> None:
    tenants = load(tmp_path, {"tenants": {"acme": {"ttl_seconds": 5}}, "default": {"bytes_max": 7}})
    assert tenants.rules(tenant_tag("stranger")) == tenants.rules(NO_TENANT) == TenantRules(bytes_max=7)
    assert tenants.rules(ACME) == TenantRules(ttl_seconds=5)


def test_without_a_file_nobody_has_limits() -> None:
    tenants = Tenants.load("")
    assert tenants.rules(ACME) == FREE
    assert tenants.may_be_in(ACME, "") and tenants.may_be_in(ACME, "eu")
    assert not tenants.bound and not tenants.limited


def test_a_bound_tenant_is_where_its_regions_are_and_never_where_there_is_no_label(tmp_path: Path) -> None:
    tenants = load(tmp_path, {"tenants": {"acme": {"regions": ["eu"]}}})
    assert tenants.may_be_in(ACME, "eu")
    assert not tenants.may_be_in(ACME, "us")
    assert not tenants.may_be_in(ACME, "")
    assert tenants.may_be_in(tenant_tag("other"), "")
    assert tenants.bound and not tenants.limited


def test_a_default_may_bind_everybody(tmp_path: Path) -> None:
    tenants = load(tmp_path, {"default": {"regions": ["eu"], "ttl_seconds": 1}})
    assert not tenants.may_be_in(NO_TENANT, "") and not tenants.may_be_in(ACME, "us")
    assert tenants.bound and tenants.limited


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["no JSON", "correct it"]),
        ("[" * 100_000, ["no JSON", "correct it"]),
        ('{"tenants": {"acme": {}, "acme": {}}}', ["'acme' is there twice"]),
        ([], ["an object with 'tenants' and 'default'"]),
        ({"tenant": {}}, ["an object with 'tenants' and 'default'"]),
        ({"tenants": []}, ["'tenants' must be an object"]),
        ({"tenants": {"a b": {}}}, ["'a b'", "1 to 64 letters"]),
        ({"tenants": {"": {}}}, ["''", "1 to 64 letters"]),
        ({"tenants": {"acme": 5}}, ["'acme'", "must be an object with some of bytes_max, ttl_seconds, regions"]),
        ({"tenants": {"acme": {"bytes": 5}}}, ["'acme'", "unknown field 'bytes'", "bytes_max"]),
        ({"tenants": {"acme": {"bytes_max": "10 apples"}}}, ["'acme'", "'10 apples'", "'10GiB'"]),
        ({"tenants": {"acme": {"bytes_max": -1}}}, ["'acme'", "-1", "whole number"]),
        ({"tenants": {"acme": {"bytes_max": True}}}, ["'acme'", "True", "whole number"]),
        ({"tenants": {"acme": {"bytes_max": 1.5}}}, ["'acme'", "1.5", "whole number"]),
        ({"tenants": {"acme": {"ttl_seconds": "1d"}}}, ["'acme'", "'1d'", "whole seconds"]),
        ({"tenants": {"acme": {"ttl_seconds": 10**12}}}, ["'acme'", "whole seconds"]),
        ({"tenants": {"acme": {"regions": "eu"}}}, ["'acme'", "'eu'", "a list of labels"]),
        ({"tenants": {"acme": {"regions": [""]}}}, ["'acme'", "a list of labels"]),
        ({"tenants": {"acme": {"regions": []}}}, ["'acme'", "a list of labels"]),
        ({"default": {"regions": [1]}}, ["'default'", "a list of labels"]),
        ({"default": None}, ["'default'", "must be an object"]),
    ],
)
def test_what_cannot_be_followed_is_refused_with_file_tenant_and_remedy(
    tmp_path: Path, content: object, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, content)
    assert "tenants.json" in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=r"'tenants_file' cannot be .*name a readable file"):
            Tenants.load(str(path))
