"""The configuration: what is accepted, where it comes from, and every refusal with its message."""

from __future__ import annotations

import json
import stat
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from vllm_sluice import config
from vllm_sluice.config import Config, ConfigError, load


@pytest.fixture
def write(tmp_path):
    def write_text(text: str):
        path = tmp_path / "sluice.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def refusal(path=None, **variables: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, variables)
    return str(caught.value)


def leaves(model: type[BaseModel], above: tuple[str, ...] = ()):
    """Yield the path of every setting with its field."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, (*above, name))
        else:
            yield (*above, name), field


SETTINGS = dict(leaves(Config))
RUNTIME = {path for path, field in SETTINGS.items() if (field.json_schema_extra or {}).get("runtime")}
BUILT_IN = {path for path in SETTINGS if path[0] in ("patches", "probes")} - RUNTIME
OTHER_VALUES: dict[tuple[str, ...], Any] = {
    ("patches", "gate", "source"): "checkpoint",
    ("patches", "gate", "granularity"): "element",
    ("patches", "gate", "enabled"): False,
    ("probes", "residual", "install"): False,
    ("probes", "residual", "enabled"): False,
    ("probes", "residual", "layers"): [0, 5],
    ("probes", "residual", "sample_rows"): 17,
    ("patches", "gate", "temperature"): 2.0,
    ("patches", "gate", "floor"): 0.25,
    ("probes", "residual", "interval_seconds"): 9.0,
    ("probes", "residual", "massive_min"): 101.0,
    ("probes", "residual", "massive_ratio"): 1001.0,
    ("probes", "residual", "delimiters"): ["."],
    ("probes", "attention", "install"): False,
    ("probes", "attention", "enabled"): False,
    ("probes", "attention", "layers"): [0, 5],
    ("probes", "attention", "queries"): 9,
    ("probes", "attention", "interval_seconds"): 5.0,
    ("probes", "attention", "max_context"): 8193,
    ("probes", "attention", "sink_threshold"): 0.31,
    ("probes", "gate", "install"): False,
    ("probes", "gate", "enabled"): False,
    ("probes", "gate", "layers"): [0, 5],
    ("probes", "gate", "closed_below"): 0.11,
    ("probes", "quantization", "install"): True,
    ("probes", "quantization", "enabled"): False,
    ("probes", "quantization", "layers"): [0, 5],
    ("probes", "quantization", "sites"): ["mlp_input"],
    ("probes", "quantization", "sample_rows"): 17,
    ("probes", "quantization", "interval_seconds"): 9.0,
}


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value


# ---------------------------------------------------------------------------------------------- what is accepted
def test_without_file_and_variables_everything_has_its_default():
    loaded = load(None, {})
    assert loaded.config == Config()
    assert loaded.origins == {}


def test_an_empty_file_is_the_default(write):
    assert load(write("# nothing yet\n"), {}).config == Config()


def test_the_file_is_found_through_its_variable(write):
    path = write("probes:\n  attention:\n    queries: 5\n")
    loaded = load(None, {"SLUICE_CONFIG": str(path)})
    assert loaded.config.probes.attention.queries == 5
    assert loaded.origins == {"probes.attention.queries": str(path)}


def test_a_named_file_counts_more_than_the_variable(write, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("enabled: false")
    assert load(write("enabled: true"), {"SLUICE_CONFIG": str(other)}).config.enabled is True


def test_the_file_counts_more_than_a_variable_and_origins_say_so(write):
    path = write("patches:\n  gate:\n    enabled: false\nlive:\n  enabled: false\nprobes: {}\n")
    variables = {
        "SLUICE_PATCHES__GATE__ENABLED": "true", "SLUICE_PATCHES__GATE__FLOOR": "0.5",
        "SLUICE_PROBES__GATE__ENABLED": "false",
    }  # fmt: skip
    loaded = load(path, variables)
    assert loaded.config.patches.gate.enabled is False
    assert loaded.config.patches.gate.floor == 0.5
    assert loaded.config.probes.gate.enabled is False
    assert loaded.origins == {
        "patches.gate.enabled": str(path),
        "patches.gate.floor": "SLUICE_PATCHES__GATE__FLOOR",
        "probes.gate.enabled": "SLUICE_PROBES__GATE__ENABLED",
        "live.enabled": str(path),
    }


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("SLUICE_PROBES__ATTENTION__QUERIES", "3", 3),
        ("SLUICE_PROBES__ATTENTION__SINK_THRESHOLD", "0.25", 0.25),
        ("SLUICE_PROBES__RESIDUAL__MASSIVE_MIN", "50", 50.0),
        ("SLUICE_PROBES__RESIDUAL__DELIMITERS", '[".", "\\n"]', (".", "\n")),
        ("SLUICE_PATCHES__GATE__SOURCE", "gates/a.safetensors", "gates/a.safetensors"),
        ("SLUICE_TELEMETRY__RUN_DIR", "/run/sluice", "/run/sluice"),
        ("SLUICE_LIVE__ENABLED", "no", False),
    ],
)
def test_variables_hold_yaml_values(variable, text, expected):
    settings: Any = load(None, {variable: text}).config
    for key in variable.removeprefix("SLUICE_").lower().split("__"):
        settings = getattr(settings, key)
    assert settings == expected


def test_variables_without_the_prefix_and_sluices_own_plumbing_are_left_alone(tmp_path):
    own = {"SLUICE_RUN_DIR": "/dev/shm/x", "SLUICE_SERVER_IDENTITY": "5e"}
    environ = {**own, "SLUICES": "1", "VLLM_PLUGINS": "sluice", "PATH": "/bin"}
    assert load(None, environ).config == Config()


def test_every_setting_can_be_written_out_and_read_back(write):
    text = config.as_yaml(Config())
    loaded = load(write(text), {})
    assert loaded.config == Config()
    assert set(loaded.origins) == {".".join(path) for path in SETTINGS}


def test_the_schema_describes_every_setting_and_forbids_others():
    schema = config.schema()
    assert schema["additionalProperties"] is False
    described = json.dumps(schema)
    for path in SETTINGS:
        assert f'"{path[-1]}"' in described
    for definition in schema["$defs"].values():
        for name, field in definition["properties"].items():
            assert field.get("description") or "$ref" in field, f"{definition['title']}.{name} has no description"


# ---------------------------------------------------------------------------------------------- what is refused
def test_an_unknown_key_is_refused_with_its_path_and_a_suggestion(write):
    message = refusal(write("patches:\n  gate:\n    enabld: true\n"))
    assert message.startswith("patches.gate.enabld (from ")
    assert "sluice.yaml): unknown key. Did you mean patches.gate.enabled?" in message


def test_a_key_in_the_wrong_place_is_found_where_it_belongs(write):
    assert "queries" in refusal(write("queries: 3\n"))
    assert "Did you mean probes.attention.queries?" in refusal(write("queries: 3\n"))


def test_an_unknown_key_like_no_other_gets_the_list_of_known_ones(write):
    message = refusal(write("telemetry:\n  zzz: 1\n"))
    assert "telemetry.zzz" in message
    assert "Known keys here:" in message
    assert "window_seconds" in message


def test_an_unknown_variable_is_refused_like_an_unknown_key():
    message = refusal(SLUICE_PROBES__ATTENTION__QUERYS="3")
    assert "probes.attention.querys (from SLUICE_PROBES__ATTENTION__QUERYS): unknown key" in message
    assert "Did you mean probes.attention.queries?" in message


def test_a_variable_that_is_no_setting_at_all_is_refused():
    assert "SLUICE_TYPO" in refusal(SLUICE_TYPO="1")


@pytest.mark.parametrize(
    ("text", "key", "found"),
    [
        ("enabled: 1\n", "enabled", "1"),
        ("enabled: 'yes'\n", "enabled", "'yes'"),
        ("probes:\n  attention:\n    queries: three\n", "probes.attention.queries", "'three'"),
        ("probes:\n  attention:\n    queries: 2.5\n", "probes.attention.queries", "2.5"),
        ("probes:\n  residual:\n    massive_min: big\n", "probes.residual.massive_min", "'big'"),
        ("probes:\n  residual:\n    delimiters: 5\n", "probes.residual.delimiters", "5"),
        ("patches:\n  gate:\n    granularity: row\n", "patches.gate.granularity", "'row'"),
        ("patches: 7\n", "patches", "7"),
        ("patches:\n", "patches", "None"),
        ("telemetry:\n  detail: some\n", "telemetry.detail", "'some'"),
    ],
)
def test_a_wrong_type_is_refused_with_key_origin_and_value(write, text, key, found):
    message = refusal(write(text))
    assert message.startswith(f"{key} (from ")
    assert message.endswith(f"found {found}")


@pytest.mark.parametrize(
    ("text", "key", "bound"),
    [
        ("probes:\n  attention:\n    queries: 0\n", "probes.attention.queries", "greater than or equal to 1"),
        ("probes:\n  attention:\n    queries: 0\n", "probes.attention.queries", "greater than or equal to 1"),
        ("probes:\n  attention:\n    sink_threshold: 1.0\n", "probes.attention.sink_threshold", "less than 1"),
        ("probes:\n  residual:\n    sample_rows: 5000\n", "probes.residual.sample_rows", "less than or equal to"),
        ("probes:\n  gate:\n    closed_below: 0.0\n", "probes.gate.closed_below", "greater than 0"),
        ("telemetry:\n  interval_seconds: 0.01\n", "telemetry.interval_seconds", "greater than or equal to 0.1"),
        ("live:\n  history_seconds: 1.0\n", "live.history_seconds", "greater than or equal to 60"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_bound(write, text, key, bound):
    message = refusal(write(text))
    assert message.startswith(key)
    assert bound in message


def test_a_window_shorter_than_two_intervals_is_refused(write):
    message = refusal(write("telemetry:\n  interval_seconds: 10.0\n  window_seconds: 15.0\n"))
    assert message.startswith("telemetry")
    assert "window_seconds 15 is below twice interval_seconds 10" in message
    assert "lengthen the window or shorten the interval" in message


def test_a_granularity_without_a_gate_is_refused(write):
    message = refusal(write("patches:\n  gate:\n    source: none\n    granularity: head\n"))
    assert "granularity 'head' asks for a gate but source is none" in message


def test_a_source_that_is_no_source_is_refused(write):
    message = refusal(write("patches:\n  gate:\n    source: chekpoint\n"))
    assert "'chekpoint' is neither auto, checkpoint or none nor the path of a .safetensors file" in message


def test_a_contradiction_across_file_and_variable_is_refused(write):
    path = write("telemetry:\n  window_seconds: 5.0\n")
    assert "lengthen the window" in refusal(path, SLUICE_TELEMETRY__INTERVAL_SECONDS="4")


def test_all_problems_are_reported_at_once(write):
    message = refusal(write("enabld: true\nlive:\n  enabled: 3\nprobes:\n  gate:\n    closed_below: 2.0\n"))
    assert len(message.splitlines()) == 3


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "none.yaml"
    assert refusal(path) == f"cannot read the configuration file {path}: No such file or directory"


def test_a_folder_is_refused(tmp_path):
    assert f"cannot read the configuration file {tmp_path}" in refusal(tmp_path)


def test_an_unreadable_file_is_refused(write, monkeypatch):
    path = write("enabled: true")
    path.chmod(stat.S_IWUSR)

    def denied(self, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_text", denied)  # root could read it
    assert refusal(path) == f"cannot read the configuration file {path}: Permission denied"


def test_what_is_no_yaml_is_refused(write):
    assert "sluice.yaml is not valid YAML" in refusal(write("patches: [\n"))


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "sluice.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert f"{path} is not valid YAML" in refusal(path)


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("just text\n", "str"), ("5\n", "int")])
def test_what_is_no_mapping_is_refused(write, text, kind):
    assert f"holds a {kind}; a mapping with keys such as patches: is needed" in refusal(write(text))


def test_yaml_that_builds_objects_is_refused(write):
    assert "is not valid YAML" in refusal(write("enabled: !!python/object/apply:os.getcwd []\n"))


def test_a_date_is_refused_as_no_plain_value(write):
    assert "a setting has to be a plain YAML value" in refusal(write("telemetry:\n  run_dir: 2026-01-01\n"))


def test_a_variable_that_is_no_yaml_is_refused():
    assert refusal(SLUICE_ENABLED="[") == "SLUICE_ENABLED is not a valid YAML value: '['"


def test_a_value_where_the_other_source_has_keys_is_refused(write):
    path = write("patches: 5\n")
    message = refusal(path, SLUICE_PATCHES__GATE__ENABLED="true")
    assert message == f"patches (from {path}): Input should be an object; found 5"
    message = refusal(write("patches:\n  gate:\n    enabled: true\n"), SLUICE_PATCHES="5")
    assert message == f"{path} sets a key below 'patches', which is set to 5 elsewhere"


# ---------------------------------------------------------------------------------------------- properties
def test_the_table_of_other_values_covers_every_setting_of_patches_and_probes():
    assert set(OTHER_VALUES) == BUILT_IN | RUNTIME


@given(st.sampled_from(sorted(OTHER_VALUES)))
def test_a_structural_key_changes_the_fingerprint_and_a_runtime_key_does_not(path):
    changed = Config.model_validate_json(json.dumps(nested(path, OTHER_VALUES[path])))
    assert changed != Config()
    same = changed.structural_fingerprint() == Config().structural_fingerprint()
    assert same is (path in RUNTIME)


@pytest.mark.parametrize("text", ["enabled: false", "telemetry: {window_seconds: 30.0}", "live: {enabled: false}"])
def test_settings_outside_the_model_leave_the_fingerprint_alone(write, text):
    assert load(write(text), {}).config.structural_fingerprint() == Config().structural_fingerprint()


@given(
    queries=st.integers(-10, 300),
    window=st.floats(-10, 4000, allow_nan=False),
    interval=st.floats(-1, 100, allow_nan=False),
)
def test_what_is_accepted_obeys_every_bound(queries, window, interval):
    environ = {
        "SLUICE_PROBES__ATTENTION__QUERIES": str(queries),
        "SLUICE_TELEMETRY__WINDOW_SECONDS": f"{window:.6f}",
        "SLUICE_TELEMETRY__INTERVAL_SECONDS": f"{interval:.6f}",
    }
    window, interval = round(window, 6), round(interval, 6)
    allowed = 1 <= queries <= 256 and 1 <= window <= 3600 and 0.1 <= interval <= 60 and window >= 2 * interval
    try:
        load(None, environ)
        accepted = True
    except ConfigError:
        accepted = False
    assert accepted is allowed


@given(
    st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3)
)
def test_any_mapping_is_accepted_or_refused_but_never_crashes(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("any") / "sluice.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    try:
        load(path, {})
    except ConfigError as error:
        assert str(error)


def test_the_origin_of_one_key_is_not_blamed_on_another_that_begins_alike(write):
    message = refusal(write("live:\n  enabled: 3\n"), SLUICE_ENABLED="true")
    assert "live.enabled (from " in message
    assert "SLUICE_ENABLED" not in message
