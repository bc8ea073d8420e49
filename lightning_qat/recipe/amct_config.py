"""AMCT's three ways to configure retraining, as recipe mappings, and its rules.

The simple configuration (``amct_cfg`` has read it), the JSON configuration of a network, and the
mapping that AMCT's layer constructors take. All have the same content: ``ulq_quantize`` for
activations, ``arq_retrain`` or ``ulq_retrain`` for weights, and integer types. Everything that
breaks a rule is collected and reported at once.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning_qat.recipe.amct_rules import (
    BITS,
    DATA_ALGORITHM,
    WEIGHT_ALGORITHMS,
    AmctRules,
    bit_pairs,
    bits_of,
)
from lightning_qat.recipe.checks import is_int

_DATA, _WEIGHT = "retrain_data_config", "retrain_weight_config"
_CFG_DATA, _CFG_WEIGHT = "retrain_data_quant_config", "retrain_weight_quant_config"
_LAYER_KEYS = ("retrain_enable", _DATA, _WEIGHT)


def is_json_config(values: Mapping[str, Any]) -> bool:
    """``True`` if a mapping is AMCT's JSON configuration: it has keys that no recipe has."""
    layers = (v for v in values.values() if isinstance(v, Mapping))
    return bool({"version", "batch_num"} & values.keys()) or any(
        set(_LAYER_KEYS) & set(layer) for layer in layers
    )


AMCT_FLOAT = ("type:MultiheadAttention", "type:Embedding")
"""Patterns of the layers that AMCT leaves float, although they have a QAT layer here."""


def is_layer_config(values: object) -> bool:
    """``True`` if a value is the mapping that AMCT's layer constructors take."""
    return isinstance(values, Mapping) and bool({_DATA, _WEIGHT} & values.keys())


def json_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a JSON configuration: what it enables, by name, and nothing else.

    Args:
        values: ``version`` 1, ``batch_num``, then one mapping per layer: ``retrain_enable``,
            ``retrain_data_config`` and ``retrain_weight_config``.

    Returns:
        Keys of ``Recipe``, with the preset that they change.

    Raises:
        ValueError: It breaks rules; all of them are named.
    """
    rules = AmctRules()
    version = values.get("version", 1)
    if not is_int(version) or version != 1:
        rules.broken("version", "must be 1", version)
    batches = rules.batches("batch_num", values.get("batch_num"))
    enabled: dict[str, Any] = {}
    for name, layer in values.items():
        if name in ("version", "batch_num") or not rules.keys(name, layer, _LAYER_KEYS):
            continue
        activation = rules.data(f"{name}.{_DATA}", layer.get(_DATA, {}), ("algo", "dst_type"))
        weight = rules.weight(f"{name}.{_WEIGHT}", layer.get(_WEIGHT, {}), "algo")
        rules.pair(name, activation, weight)
        if rules.flag(f"{name}.retrain_enable", layer.get("retrain_enable"), default=True):
            enabled[glob.escape(name)] = {
                "activation": activation | {"calibration_batches": batches},
                "weight": weight,
            }
    if not enabled:
        rules.problems.append("retrain_enable must be true for one layer at least; it is for none")
    rules.check("An AMCT JSON configuration")
    return {"preset": "amct", "include": list(enabled), "overrides": enabled}


def layer_recipe(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The recipe of a layer constructor's ``config``.

    Args:
        config: ``retrain_data_config`` (``dst_type``, ``batch_num``, ``fixed_min``, ``clip_min``,
            ``clip_max``) and ``retrain_weight_config`` (``dst_type``, ``weights_retrain_algo``,
            ``channel_wise``), each or both.
        kind: Name of the float class; ``Linear`` is per tensor.

    Raises:
        ValueError: It breaks rules; all of them are named.
    """
    rules = AmctRules()
    activation: dict[str, Any] = {}
    weight: dict[str, Any] = {}
    if rules.keys("config", config, (_DATA, _WEIGHT)):
        data = config.get(_DATA, {})
        activation = rules.data(_DATA, data, ("batch_num", "dst_type"))
        batches = rules.batches(
            f"{_DATA}.batch_num", data.get("batch_num") if isinstance(data, Mapping) else None
        )
        activation["calibration_batches"] = batches
        weight = rules.weight(_WEIGHT, config.get(_WEIGHT, {}), "weights_retrain_algo", kind)
        rules.pair("config", activation, weight)
    rules.check("AMCT's config of a layer")
    return {"preset": "amct", "activation": activation, "weight": weight}


def cfg_recipe(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a simple configuration.

    An override by layer wins over one by type, and that over the global configuration; each gives a
    whole data or weight configuration, so what it leaves out has AMCT's default. ``skip_*`` and
    ``quant_skip_*`` are united.

    Args:
        cfg: The result of ``amct_cfg.parse_cfg``.

    Returns:
        Keys of ``Recipe``, with the preset that they change.

    Raises:
        ValueError: It breaks rules; all of them are named.
    """
    rules = AmctRules()
    batches = rules.batches("batch_num", cfg.get("batch_num"))
    activation = rules.data(_CFG_DATA, _data_of(cfg), ("algo", "dst_type"))
    weight = rules.weight(_CFG_WEIGHT, _weight_of(cfg), "algo")
    rules.pair("the global configuration", activation, weight)
    overrides: dict[str, Any] = {"type:Linear": {"weight": {"granularity": "per_tensor"}}}
    types = {change.get("layer_type"): change for change in cfg.get("override_layer_types", ())}
    for field, key, changes in (
        ("override_layer_types", "layer_type", cfg.get("override_layer_types", ())),
        ("override_layer_configs", "layer_name", cfg.get("override_layer_configs", ())),
    ):
        named = Counter(change.get(key) for change in changes)
        rules.problems += [
            f"{field} must name each {key} once; {name!r} comes {count} times"
            for name, count in named.items()
            if count > 1
        ]
        for change in changes:
            name = change.get(key)
            if not name:
                rules.problems.append(f"{field} must have a {key}; one has none")
                continue
            kind = name if key == "layer_type" else ""
            pattern = f"type:{name}" if kind else glob.escape(name)
            asked = overrides.setdefault(pattern, {})
            where = f"{field} {name!r}"
            if _CFG_DATA in change:
                asked["activation"] = rules.data(where, _data_of(change), ("algo", "dst_type"))
            if _CFG_WEIGHT in change:
                own = rules.weight(where, _weight_of(change), "algo", kind)
                asked["weight"] = asked.get("weight", {}) | own
            # A layer's missing half may come from its type, which the text does not say.
            if len({_CFG_DATA, _CFG_WEIGHT} & change.keys()) == 2 or kind or not types:
                rules.pair(
                    where,
                    activation | asked.get("activation", {}),
                    weight | asked.get("weight", {}),
                )
    rules.check("A simple configuration")
    return {
        "preset": "amct",
        "activation": activation | {"calibration_batches": batches},
        "weight": weight,
        "exclude": [
            *AMCT_FLOAT,
            *(glob.escape(name) for name in _united(cfg, "skip_layers", "quant_skip_layers")),
            *(f"type:{kind}" for kind in _united(cfg, "skip_layer_types", "quant_skip_types")),
        ],
        "overrides": overrides,
    }


def json_config(
    batch_num: int,
    layers: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]],
    kinds: Mapping[str, str],
) -> dict[str, Any]:
    """The JSON configuration of a network.

    Args:
        batch_num: How many batches are calibrated with.
        layers: Fields of the ``ActivationSpec`` and the ``WeightSpec`` of every layer, by name.
        kinds: Name of the float class of every layer.

    Raises:
        ValueError: AMCT has no words for what they ask, or forbids it; every such layer is named.
    """
    problems: list[str] = []
    values: dict[str, Any] = {"version": 1, "batch_num": batch_num}
    for name, (activation, weight) in layers.items():
        wrong = _without_words(activation, weight, kinds[name])
        problems += [f"{name}: {problem}" for problem in wrong]
        if not wrong:
            values[name] = {"retrain_enable": True, **_json_layer(activation, weight)}
    if problems:
        raise ValueError("AMCT's configuration cannot say: " + "; ".join(problems) + ".")
    return values


def _without_words(
    activation: Mapping[str, Any], weight: Mapping[str, Any], kind: str
) -> list[str]:
    problems = []
    if activation["quantizer"] != "ulq":
        problems.append(
            f"the activation's quantizer must be 'ulq'; got {activation['quantizer']!r}"
        )
    if weight["quantizer"] not in WEIGHT_ALGORITHMS.values():
        problems.append(
            f"the weight's quantizer must be one of {sorted(WEIGHT_ALGORITHMS.values())}; got "
            f"{weight['quantizer']!r}"
        )
    if bits_of(activation, weight) not in bit_pairs():
        problems.append(
            f"activation and weight must be a pair of {bit_pairs()} bits; got "
            f"{bits_of(activation, weight)}"
        )
    if kind == "Linear" and weight["granularity"] == "per_channel":
        problems.append("channel_wise must be false for Linear, whose weight has one scale")
    return problems


def _json_layer(activation: Mapping[str, Any], weight: Mapping[str, Any]) -> dict[str, Any]:
    types = {bits: name for name, bits in BITS.items()}
    algorithms = {ours: theirs for theirs, ours in WEIGHT_ALGORITHMS.items()}
    data = {"algo": DATA_ALGORITHM, "dst_type": types[activation["bits"]]}
    if activation["clip"] is not None:
        data["clip_min"], data["clip_max"] = activation["clip"]
    if activation["fixed_min"] is not None:
        data["fixed_min"] = activation["fixed_min"]
    return {
        _DATA: data,
        _WEIGHT: {
            "algo": algorithms[weight["quantizer"]],
            "channel_wise": weight["granularity"] == "per_channel",
            "dst_type": types[weight["bits"]],
        },
    }


def _united(cfg: Mapping[str, Any], *names: str) -> list[str]:
    return list(dict.fromkeys(value for name in names for value in cfg.get(name, ())))


def _data_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A data configuration with the keys of the JSON configuration."""
    values: dict[str, Any] = dict(cfg.get(_CFG_DATA, {}).get(DATA_ALGORITHM, {}))
    clips: dict[str, Any] = values.pop("clip_max_min", {})
    return clips | values


def _weight_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A weight configuration with the keys of the JSON configuration."""
    found: Mapping[str, Any] = cfg.get(_CFG_WEIGHT, {})
    algorithms = list(found)
    if len(algorithms) > 1:
        return {"algo": " and ".join(algorithms)}
    return {"algo": algorithms[0], **found[algorithms[0]]} if algorithms else {}
