"""Random JSON schemas, and how many answers to them validate.

    python schemas.py --count 200 --model DIRECTORY     # exit status 1 if an answer is invalid or unfinished

Schemas use what the structured-output plugin supports, and are bounded, so that a model comes to an end; but for the
digits behind a point, which JSON doesn't count: an answer that was cut in a long row of them is told apart. The same
seed gives the same schemas.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from typing import Any

import jsonschema

ENDLESS = re.compile(r"\.\d{20,}$")
WORDS = ("name", "age", "city", "tags", "price", "kind", "when", "size", "note", "score")


def schema(r: random.Random, depth: int = 2) -> dict[str, Any]:
    """A random schema; at the top an object more often than not."""
    made = _object(r, depth) if r.random() < 0.6 else _any(r, depth)
    if r.random() < 0.15:  # the same behind a reference
        return {"$defs": {"thing": made}, "$ref": "#/$defs/thing"}
    return made


def _any(r: random.Random, depth: int) -> dict[str, Any]:
    leaves = (_string, _integer, _number, _enum, _other)
    branches = (_object, _array, _any_of)
    make = r.choice(leaves + branches if depth > 0 else leaves)
    return make(r, depth)


def _object(r: random.Random, depth: int) -> dict[str, Any]:
    names = r.sample(WORDS, r.randint(1, 4))
    required = [name for name in names if r.random() < 0.7]
    made: dict[str, Any] = {"type": "object", "properties": {name: _any(r, depth - 1) for name in names}}
    made["additionalProperties"] = False
    return made | ({"required": required} if required or r.random() < 0.5 else {})


def _array(r: random.Random, depth: int) -> dict[str, Any]:
    if r.random() < 0.2:
        items = [_any(r, depth - 1) for _ in range(r.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    low = r.randint(0, 2)
    return {"type": "array", "items": _any(r, depth - 1), "minItems": low, "maxItems": low + r.randint(0, 2)}


def _any_of(r: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(r, depth - 1) for _ in range(r.randint(2, 3))]}


def _string(r: random.Random, depth: int) -> dict[str, Any]:
    patterns = ("^[A-Z]{2,4}$", r"^\d{3}-\d{4}$", "^(red|green|blue)$", "^[a-f0-9]{8}$", r"^v\d{1,2}\.\d{1,2}$")
    kinds: tuple[dict[str, Any], ...] = (
        {"minLength": r.randint(0, 3), "maxLength": r.randint(3, 12)},
        {"pattern": r.choice(patterns)},
        {"format": r.choice(("date", "time", "uuid", "ipv4", "date-time"))},
    )
    return {"type": "string", **r.choice(kinds)}


def _integer(r: random.Random, depth: int) -> dict[str, Any]:
    low = r.randint(-100, 100)
    made: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + r.randint(0, 1000)}
    if r.random() < 0.3:
        made = {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10 ** r.randint(1, 4)}
    return made | ({"multipleOf": r.choice((2, 5))} if r.random() < 0.2 and made.get("maximum", 99) - low > 10 else {})


def _number(r: random.Random, depth: int) -> dict[str, Any]:
    low = round(r.uniform(-10, 10), 1)
    return {"type": "number", "minimum": low, "maximum": round(low + r.uniform(1, 100), 1)}


def _enum(r: random.Random, depth: int) -> dict[str, Any]:
    values = ["a", "B c", 'quote " and \\', 1, -2.5, True, None, "é", ["x", 1]]
    return {"const": r.choice(values)} if r.random() < 0.3 else {"enum": r.sample(values, r.randint(1, 4))}


def _other(r: random.Random, depth: int) -> dict[str, Any]:
    return {"type": r.choice(("boolean", "null", ["boolean", "null"]))}


def problems(pairs: list[tuple[dict[str, Any], str]]) -> list[str]:
    """What is wrong with the answers, as pairs of a schema and a text; a line for each that doesn't validate."""
    found = []
    for wanted, text in pairs:
        checker = jsonschema.Draft202012Validator(wanted, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        try:
            checker.validate(json.loads(text))
        except (ValueError, jsonschema.ValidationError) as error:
            found.append(f"{json.dumps(wanted)} got {text!r}: {str(error).splitlines()[0]}")
    return found


def main() -> int:
    from hf_paged import LLM, SamplingParams

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    r = random.Random(args.seed)
    wanted = [schema(r) for _ in range(args.count)]
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=args.max_tokens, structured_outputs={"json": one})
        for seed, one in enumerate(wanted)
    ]
    messages = [
        [{"role": "user", "content": f"Give an example of this JSON schema: {json.dumps(one)}"}] for one in wanted
    ]
    with LLM(args.model) as llm:
        answers = [output.outputs[0] for output in llm.chat(messages, params)]
    pairs = list(zip(wanted, answers, strict=True))
    finished = [(one, answer.text) for one, answer in pairs if answer.finish_reason == "stop"]
    cut = [(one, answer.text) for one, answer in pairs if answer.finish_reason != "stop"]
    unfinished = [(one, text) for one, text in cut if not ENDLESS.search(text)]
    wrong = problems(finished) + [f"{json.dumps(one)} unfinished: {text!r}" for one, text in unfinished]
    print("\n".join(wrong))
    counts = {"finished": len(finished), "endless_numbers": len(cut) - len(unfinished), "wrong": len(wrong)}
    print(json.dumps({"schemas": args.count, **counts}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
