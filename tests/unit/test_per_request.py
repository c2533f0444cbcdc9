"""What requests may ask for, and the cache salts that keep their states apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_sluice.control.per_request import InstalledOnRanks, RequestCheck
from vllm_sluice.telemetry.snapshot import Series


def check(enabled: bool = True) -> RequestCheck:
    return RequestCheck(enabled, ["gate", "attention_sink"], there("gate", "attention_sink"))


def there(*patches: str, probes: tuple[str, ...] = ("residual",)) -> SimpleNamespace:
    return SimpleNamespace(patches=lambda: set(patches), probes=lambda: set(probes))


def test_the_salt_names_the_choice_and_keeps_the_requests_own():
    def salt(arguments: dict[str, Any], own: str | None) -> str | None:
        admitted, found = check().admit("r", arguments, own)
        assert admitted == arguments
        return found

    assert salt({}, None) is None
    assert salt({"other": 1}, "mine") == "mine"
    assert salt({"sluice.gate": True}, None) == "sluice:gate=1"
    assert salt({"sluice.gate": 0, "sluice.attention_sink": 1}, "mine") == "mine|sluice:attention_sink=1,gate=0"


@pytest.mark.parametrize("length", [90, 114, 115, 128])
def test_salts_stay_apart_and_within_what_vllm_takes(length):
    salts = {
        check().admit("r", {"sluice.gate": choice}, letter * length)[1] for choice in (False, True) for letter in "ab"
    }
    assert len(salts) == 4
    assert all(salt is not None and len(salt) <= 128 and not set("@/\\\0") & set(salt) for salt in salts)


def test_a_salt_that_contains_ours_is_refused_only_where_requests_may_choose():
    with pytest.raises(Exception, match=r"cache_salt 'a\|sluice:gate=1' contains 'sluice:', which Sluice adds itself"):
        check().admit("r", {}, "a|sluice:gate=1")
    assert check(enabled=False).admit("r", {}, "a|sluice:gate=1") == ({}, "a|sluice:gate=1")


def test_the_guard_puts_requests_that_choose_nothing_into_groups():
    trial = {"number": 7, "patch": "gate", "enabled": False, "share": 0.5}
    guarded = RequestCheck(False, ["gate"], there("gate"), lambda: trial)
    seen = {}
    for index in range(20):
        arguments, salt = guarded.admit(f"r{index}", {"other": 1}, None)
        label, _, request = arguments["sluice.guard"].rpartition(":")
        assert request == f"r{index}"
        seen[label] = ({k: v for k, v in arguments.items() if k != "sluice.guard"}, salt)
    assert seen == {
        "7:canary": ({"other": 1, "sluice.gate": 0}, "sluice:gate=0"),
        "7:rest": ({"other": 1}, None),
    }
    chooses = RequestCheck(True, ["gate"], there("gate"), lambda: trial)
    assert chooses.admit("r1", {"sluice.gate": 1}, None) == ({"sluice.gate": 1}, "sluice:gate=1")
    with pytest.raises(Exception, match="which Sluice adds itself"):  # before a trial too
        RequestCheck(False, ["gate"], there("gate"), lambda: None).admit("r1", {}, "sluice:gate=0")
    with pytest.raises(Exception, match=r"sluice\.guard: unknown key"):
        chooses.admit("r1", {"sluice.guard": "7:canary"}, None)


def test_inputs_that_come_in_parts_choose_nothing():
    """All parts keep the first part's salt, so no part may run under another state."""
    trial = {"number": 7, "patch": "gate", "enabled": False, "share": 1.0}
    guarded = RequestCheck(True, ["gate"], there("gate"), lambda: trial)
    for streams in (True, True, False):
        assert guarded.admit("r1", {}, None, streams) == ({}, None)
    assert guarded.admit("r1", {}, None)[1] == "sluice:gate=0"
    with pytest.raises(Exception, match="a streamed input cannot choose"):
        guarded.admit("r2", {"sluice.gate": 1}, None, True)


@pytest.mark.parametrize("value", ["true", 2, -1, 0.0, 1.0, [0], None])
def test_a_choice_is_true_or_false(value):
    with pytest.raises(Exception, match=r"sluice\.gate: true or false expected, found"):
        check().validate({"sluice.gate": value})


def test_a_patch_must_be_installed_and_a_probe_on_on_every_rank():
    def rank(probe: float, **patches: float) -> SimpleNamespace:
        series = [Series("sluice_patch_enabled", (("patch", "gate"),))]
        series += [Series("sluice_probe_enabled", (("probe", "residual"),))]
        series += [Series("sluice_patch_installed", (("patch", kind),)) for kind in patches]
        return SimpleNamespace(series=series, values=np.array([1.0, probe, *patches.values()]))

    now = 0.0
    ranks = [rank(1, gate=1, attention_sink=1), rank(1, gate=1, attention_sink=0)]
    installed = InstalledOnRanks(SimpleNamespace(snapshots=lambda: ranks), clock=lambda: now)
    assert installed.patches() == {"gate"}
    assert installed.probes() == {"residual"}
    ranks.append(rank(0, gate=0))
    assert installed.patches() == {"gate"}  # not read again at once
    now = 6.0
    assert installed.patches() == installed.probes() == set()
    ranks.clear()
    now = 12.0
    assert installed.patches() == set()
