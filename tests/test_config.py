"""Strict configuration: every wrong value is one line with file, path, what was seen and what is allowed."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cli import load_config, presets
from seqlab.config import dump_yaml, from_dict, load_yaml, merge, parse_override, to_dict
from seqlab.errors import UserError
from tasks.language_modeling import DnaConfig


@dataclass(frozen=True)
class Inner:
    size: int = 4
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size: must be 1 or more, got {self.size}")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    flag: bool = False
    maybe: int | None = None


def message(data, cls=Outer) -> str:
    with pytest.raises(UserError) as caught:
        from_dict(cls, data, "run.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_are_read_and_written_back():
    config = from_dict(Outer, {"inner": {"size": 8, "rate": 1, "kind": "b"}, "names": ["x"], "maybe": None})
    assert config == Outer(Inner(8, 1.0, "b"), ("x",), False, None)
    assert isinstance(config.inner.rate, float)
    assert from_dict(Outer, yaml.safe_load(dump_yaml(config))) == config
    assert from_dict(Outer, to_dict(config)) == config


def test_numbers_as_people_write_them():
    assert from_dict(Inner, yaml.safe_load("{size: 1_000_000, rate: 8e-3}")) == Inner(1_000_000, 8e-3)
    assert from_dict(Inner, {"size": 1e6}).size == 1_000_000


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"inner": {"sise": 1}}, "run.yaml: inner.sise: unknown; did you mean size?"),
        ({"qqq": 1}, "run.yaml: qqq: unknown; allowed: inner, names, flag, maybe"),
        ({"inner": {"size": "big"}}, "run.yaml: inner.size: expected a whole number, got big"),
        ({"inner": {"size": 1.5}}, "run.yaml: inner.size: expected a whole number, got 1.5"),
        ({"inner": {"size": True}}, "run.yaml: inner.size: expected a whole number, got true"),
        ({"flag": "true,"}, "run.yaml: flag: expected true or false, got 'true,'"),
        ({"flag": 1}, "run.yaml: flag: expected true or false, got 1"),
        ({"inner": {"kind": "c"}}, "run.yaml: inner.kind: expected one of a, b, got c"),
        ({"inner": 3}, "run.yaml: inner: expected keys and values, got 3"),
        ({"names": "x"}, "run.yaml: names: expected a list, each text, got x"),
        ({"names": [1]}, "run.yaml: names[0]: expected text, got 1"),
        ({"maybe": "no"}, "run.yaml: maybe: expected a whole number, got no"),
        ({"inner": {"rate": float("nan")}}, "run.yaml: inner.rate: expected a number, got nan"),
        ({"inner": {"size": 0}}, "run.yaml: inner.size: must be 1 or more, got 0"),
        ([1], "run.yaml: top level: expected keys and values, got [1]"),
    ],
)
def test_wrong_values(data, expected):
    assert message(data) == expected


def test_base_is_read_first_and_replaced_leaf_by_leaf(tmp_path):
    (tmp_path / "top.yaml").write_text("inner: {size: 2, kind: b}\nflag: true\n")
    (tmp_path / "run.yaml").write_text("base: top\ninner: {size: 3}\n")
    assert from_dict(Outer, load_yaml(tmp_path / "run.yaml")) == Outer(Inner(3, 0.5, "b"), (), True)
    (tmp_path / "deep.yaml").write_text("base: run.yaml\n")
    with pytest.raises(UserError, match="a base cannot have a base"):
        load_yaml(tmp_path / "deep.yaml")
    (tmp_path / "bad.yaml").write_text("base: [1]\n")
    with pytest.raises(UserError, match="base: expected the name of one YAML file"):
        load_yaml(tmp_path / "bad.yaml")


@pytest.mark.parametrize("text", ["a: [", "\t- x", "a: b: c", "!!python/object:os.system x", "a: &x [*x, *y]", "\x00"])
def test_broken_yaml_is_one_line(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        from_dict(Outer, load_yaml(path), "run.yaml")
    assert "\n" not in str(caught.value) and "run.yaml" in str(caught.value)


def test_missing_directory_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load_yaml(tmp_path)
    (tmp_path / "x.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="not a text file"):
        load_yaml(tmp_path / "x.yaml")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_any_bytes_give_a_config_or_one_line(tmp_path, data):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    try:
        from_dict(Outer, load_yaml(path), "run.yaml")
    except UserError as error:
        assert "\n" not in str(error)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["model", "data", "train", "optim", "d_model", "context", "lr", "max_steps", "devices", "strand"])


@settings(max_examples=200, deadline=None)
@example(data={"model": {"\n": None}})
@given(data=st.dictionaries(keys, plain | st.dictionaries(keys, plain, max_size=3), max_size=3))
def test_any_values_give_a_run_or_one_line(data):
    try:
        from_dict(DnaConfig, data, "run.yaml")
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("run.yaml: ")


def test_overrides():
    assert parse_override("model.d_model=256") == {"model": {"d_model": 256}}
    assert parse_override("a.b.c=[1, 2]") == {"a": {"b": {"c": [1, 2]}}}
    assert parse_override("train.max_minutes=") == {"train": {"max_minutes": None}}
    for text in ("novalue", "=3", "a..b=1", "a b=1", "x=["):
        with pytest.raises(UserError, match="--set"):
            parse_override(text)
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize("name", presets("dna"))
def test_every_preset_is_valid_and_follows_the_fields_recipe(name):
    config = load_config(DnaConfig, name, [], {})
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay, config.optim.clip) == (0.9, 0.95, 0.1, 1.0)
    assert config.train.tokens_per_step >= config.data.context


def test_the_promised_presets_are_there():
    promised = {"dna_demo", "dna_small", "dna_base", "caduceus_ps_131k", "caduceus_ph_131k", "hg38_1m"}
    assert promised <= set(presets())
    base = load_config(DnaConfig, "dna_base", [], {}).model
    assert (base.d_model, base.n_layer) == (256, 16)
    ps, ph = load_config(DnaConfig, "caduceus_ps_131k", [], {}), load_config(DnaConfig, "caduceus_ph_131k", [], {})
    assert (ps.model.direction, ps.model.strand, ph.model.strand) == ("bidirectional", "equivariant", "augment")
    assert ps.data.context == ph.data.context == 131_072 and ps.train.tokens_per_step == 2**20
    hg38 = load_config(DnaConfig, "hg38_1m", [], {})
    assert hg38.data.context == 2**20 and hg38.train.tokens_per_step == 2**24


def test_the_guide_lists_the_presets_of_dna_as_they_are():
    """It said 1,024 for a context that was 2,048."""
    guide = Path(__file__).resolve().parents[1] / "docs" / "training.md"
    rows = re.findall(r"^\| `(\w+)` \| (\w+).*?, (\d+) x (\d+)[^|]*\| ([\d,]+) \|", guide.read_text(encoding="utf-8"), re.M)
    listed = {name: (direction, int(layers), int(width), int(context.replace(",", ""))) for name, direction, layers, width, context in rows}
    configs = {name: load_config(DnaConfig, name, [], {}) for name in presets("dna")}
    assert listed == {name: (c.model.direction, c.model.n_layer, c.model.d_model, c.data.context) for name, c in configs.items()}


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean dna_small"):
        load_config(DnaConfig, "dna_smal", [], {})


def test_impossible_combinations_are_refused_with_their_path():
    with pytest.raises(UserError, match=r"dna_small: model\.strand: equivariant needs direction: bidirectional"):
        load_config(DnaConfig, "dna_small", ["model.strand=equivariant"], {})
    with pytest.raises(UserError, match="is more than train.tokens_per_step"):
        load_config(DnaConfig, "dna_small", ["data.context=1000000"], {})
