"""JSON Schemas of the published files: nothing is allowed that is not named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
VERSION: dict[str, Any] = {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"}
TRUTH: dict[str, Any] = {"type": "boolean"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 1}
NUMBER: dict[str, Any] = {"type": "number"}

OPERATOR = {
    "scale": NUMBER,
    "normalise_qk": TRUTH,
    "gate": {"enum": ["log_decay", "softplus", "bounded"]},
    "lower_bound": {"type": ["number", "null"], "minimum": -5, "exclusiveMaximum": 0},
    "beta": {"enum": ["strength", "sigmoid", "doubled_sigmoid"]},
    "state_v_first": TRUTH,
    "cu_seqlens": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
}
LATENT_ATTENTION = {"key_width": COUNT, "shared_key_width": COUNT, "value_width": COUNT, "scale": NUMBER}
ROUTING = {"num_chosen": COUNT, "factor": NUMBER, "renormalise": TRUTH, "num_groups": COUNT, "num_chosen_groups": COUNT}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False}


def listed(of: dict[str, Any], *, at_least: int = 0) -> dict[str, Any]:
    """Return the schema of a list without repetition."""
    return {"type": "array", "items": of, "uniqueItems": True, "minItems": at_least}


def index_schema(flags: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Return the schema of ``index.json``."""
    group = closed({"name": TEXT, "kind": TEXT, "cases": COUNT, "index": TEXT, "data": TEXT})
    limits = {name: {"type": "number", "exclusiveMinimum": 0} for name in ("element", "slice", "gain")}
    contents = {
        "version": VERSION,
        "limits": closed(limits),
        "arithmetic_classes": listed({"enum": list(classes)}, at_least=1),
        "flags": closed({name: closed({"bug": TEXT, "effect": TEXT}) for name in flags}),
        "groups": listed(group, at_least=1),
    }
    return {"$schema": DIALECT, "title": "Index of KDA test vectors"} | closed(contents)


def group_schema(flags: Sequence[str], classes: Sequence[str], formats: Sequence[str]) -> dict[str, Any]:
    """Return the schema of the description of a group."""
    gains = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}}
    case = {
        "id": {"type": "string", "pattern": r"^[a-z-]+-\d{3}$"},
        "comment": TEXT,
        "flags": listed({"enum": list(flags)}),
        "dtype": {"enum": ["bfloat16", "float32"]},
        "exact_in": listed({"enum": list(formats)}, at_least=1),
        "options": {"oneOf": [closed(OPERATOR), closed(LATENT_ATTENTION), closed(ROUTING), closed({})]},
        "inputs": listed(TEXT, at_least=1),
        "outputs": listed(TEXT, at_least=1),
        "permitted": listed({"enum": list(classes)}, at_least=1),
        "gain": {"type": "object", "properties": dict.fromkeys(classes, gains), "additionalProperties": False},
        "recipe": {"type": "string"},
    }
    contents = {"version": VERSION, "group": TEXT, "cases": {"type": "array", "items": closed(case), "minItems": 1}}
    return {"$schema": DIALECT, "title": "Group of KDA test vectors"} | closed(contents)
