"""JSON schemas at random, and values that each of them allows.

All comes from a seed. The schemas have the keywords that arguments of tools can be held
to, and are small. Of grammars and of how values are written it knows nothing.
"""

import random
import string
from typing import Any

PATTERNS = {  # and how to make a text of each
    r"^[a-z]+$": lambda r: text(r, string.ascii_lowercase, 1, 6),
    r"^\d{3}-\d{4}$": lambda r: f"{digits(r, 3)}-{digits(r, 4)}",
    r"^(north|south|é|日本)$": lambda r: r.choice(["north", "south", "é", "日本"]),
    r"b+": lambda r: f"a{'b' * r.randint(1, 3)} c",
    r"^[\w.]+@[\w.]+?$|^/": lambda r: r.choice(["me.too@b.c", "/a/b"]),
    r"^[^\[\],{}]*\/$": lambda r: f"x y{r.randint(0, 9)}/",
}
FORMATS = {
    "date": "2024-02-28",
    "time": "10:20:30Z",
    "date-time": "2024-02-28T10:20:30.5+01:00",
    "duration": "P3D",
    "email": "a.b@example.org",
    "hostname": "example.org",
    "ipv4": "10.0.255.1",
    "ipv6": "1:2:3:4:5:6:7:abcd",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
    "uri": "https://example.org/a?b=c",
}
NAMES = [
    *("a", "b", "Z", "path", "path_to", "max-items", "$ref", "ä", "日本", "a b"),
    *("Content-Type", "x:y", "type", "enum", "properties", "0", "true", "call"),
]
LETTERS = string.ascii_letters + string.digits + " _-.,:;{}[]()<>|\"'\\/\n\té日😀"


def digits(r, count):
    return text(r, string.digits, count, count)


def text(r, letters=LETTERS, least=0, most=8):
    return "".join(r.choices(letters, k=r.randint(least, most)))


class Generator:
    """Makes one document and values of it.

    Args:
        seed: Of all choices.
    """

    def __init__(self, seed):
        self.r = random.Random(seed)
        self.definitions = {}

    def document(self):
        """The schema of a tool's arguments."""
        schema = self.object(depth=2)
        if self.definitions:
            schema["$defs"] = self.definitions
        return schema

    def schema(self, depth):
        """A schema of any kind."""
        simple = [
            *(self.string, self.string, self.integer, self.number, self.boolean),
            *(self.null, self.enum, self.const, self.types, self.anything),
        ]
        nested = [self.array, self.object, self.tuple, self.union, self.one_of]
        nested += [self.all_of, self.reference, self.tree, self.map]
        return self.r.choice([*simple, *(nested if depth else [])])(depth - 1)

    def string(self, depth=0):
        schema: dict[str, Any] = {"type": "string"}
        match self.r.randint(0, 5):
            case 0:
                least = self.r.randint(0, 4)
                schema |= {
                    "minLength": least,
                    "maxLength": least + self.r.randint(0, 9),
                }
            case 1:
                schema["pattern"] = self.r.choice(list(PATTERNS))
            case 2:
                schema["format"] = self.r.choice(list(FORMATS))
            case 3:
                schema["description"] = "a text"
        return schema

    def integer(self, depth=0):
        schema: dict[str, Any] = {"type": "integer"}
        if self.r.random() < 0.6:
            least = self.r.randint(-2000, 2000)
            most = least + self.r.randint(0, 3000)
            schema |= self.r.choice(
                [
                    {"minimum": least},
                    {"maximum": most},
                    {"minimum": least, "maximum": most},
                    {"exclusiveMinimum": least - 0.5, "exclusiveMaximum": most + 1},
                ]
            )
        if self.r.random() < 0.2:
            schema = {"type": "integer", "multipleOf": self.r.randint(1, 12)}
        return schema

    def number(self, depth=0):
        schema: dict[str, Any] = {"type": "number"}
        if self.r.random() < 0.5:
            least = self.r.randint(-20, 20) / 4
            most = least + self.r.randint(1, 100) / 8
            schema |= self.r.choice(
                [
                    {"minimum": least},
                    {"minimum": least, "maximum": most},
                    {"exclusiveMinimum": least, "exclusiveMaximum": most},
                ]
            )
        return schema

    def boolean(self, depth=0):
        return {"type": "boolean"}

    def null(self, depth=0):
        return {"type": "null"}

    def anything(self, depth=0):
        return self.r.choice([{}, True, {"description": "anything"}])

    def types(self, depth=0):
        kinds = ["string", "integer", "boolean", "null", "number"]
        return {"type": self.r.sample(kinds, self.r.randint(1, 3))}

    def enum(self, depth=0):
        values = [
            "a",
            "b c",
            "é😀",
            "",
            1,
            -2.5,
            True,
            False,
            None,
            [1, "x"],
            {"k": [None]},
        ]
        return {"enum": self.r.sample(values, self.r.randint(1, 6))}

    def const(self, depth=0):
        return {
            "const": self.r.choice(["only", 7, None, False, {"b": 1, "a": "x"}, []])
        }

    def array(self, depth):
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth)}
        if self.r.random() < 0.6:
            schema["minItems"] = self.r.randint(0, 2)
        if self.r.random() < 0.6:
            schema["maxItems"] = schema.get("minItems", 0) + self.r.randint(0, 2)
        return schema

    def tuple(self, depth):
        first = [self.schema(depth) for _ in range(self.r.randint(1, 3))]
        schema: dict[str, Any] = {"type": "array", "prefixItems": first}
        schema["items"] = self.r.choice([False, self.schema(depth)])
        if self.r.random() < 0.5:
            schema["minItems"] = self.r.randint(0, len(first))
        return schema

    def object(self, depth):
        names = self.r.sample(NAMES, self.r.randint(0, 4))
        properties = {name: self.schema(depth) for name in names}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if names and self.r.random() < 0.8:
            schema["required"] = self.r.sample(names, self.r.randint(0, len(names)))
        if self.r.random() < 0.6:
            schema["additionalProperties"] = False
        elif self.r.random() < 0.3:
            schema["additionalProperties"] = self.integer()
        if names and self.r.random() < 0.2:
            count = self.r.randint(len(schema.get("required", [])), len(names))
            word = self.r.choice(["minProperties", "maxProperties"])
            # Those that are not declared may be the same key twice.
            is_open = schema.get("additionalProperties", False) is not False
            is_least = word == "minProperties" and is_open
            least = max(len(schema.get("required", [])), 1)
            schema[word] = min(count, least) if is_least else count
        return schema

    def map(self, depth):
        schema: dict[str, Any] = {
            "type": "object",
            "additionalProperties": self.schema(depth),
        }
        if self.r.random() < 0.4:
            schema["minProperties"] = self.r.randint(0, 1)
        if self.r.random() < 0.4:
            schema["maxProperties"] = 3
        return schema

    def union(self, depth):
        options = [self.schema(depth) for _ in range(self.r.randint(1, 3))]
        return {"anyOf": options}

    def one_of(self, depth):
        kinds = self.r.sample(["circle", "square", "line"], 2)
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "size": self.number()},
                    "required": ["kind", "size"][: self.r.randint(1, 2)],
                    "additionalProperties": False,
                }
                for kind in kinds
            ]
        }

    def all_of(self, depth):
        return {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "string"}}},
                {"properties": {"b": self.schema(depth)}, "required": ["b"]},
                {"properties": {"a": {"maxLength": 5}}},
            ]
        }

    def reference(self, depth):
        name = f"D{len(self.definitions)}"
        self.definitions[name] = {}
        self.definitions[name] = self.schema(depth)
        return {"$ref": f"#/$defs/{name}"}

    def tree(self, depth):
        name = f"T{len(self.definitions)}"
        reference = {"$ref": f"#/$defs/{name}"}
        self.definitions[name] = {
            "type": "object",
            "properties": {
                "next": {"anyOf": [reference, {"type": "null"}]},
                "value": self.string(),
            },
            "required": ["value"],
            "additionalProperties": False,
        }
        return reference

    def value(self, schema):
        """A value that a schema allows; a key that it does not declare is new."""
        if isinstance(schema, bool):
            schema = {}
        if "$ref" in schema:
            return self.value(self.definitions[schema["$ref"].split("/")[-1]])
        for word in ("anyOf", "oneOf", "enum"):
            if word in schema:
                chosen = self.r.choice(schema[word])
                return chosen if word == "enum" else self.value(chosen)
        if "allOf" in schema:
            b = schema["allOf"][1]["properties"]["b"]
            found = {"a": text(self.r, most=5), "b": self.value(b)}
            return found if self.r.random() < 0.5 else {"b": found["b"]}
        if "const" in schema:
            return schema["const"]
        kind = schema.get("type", ["string", "number", "null"])
        kind = self.r.choice(kind) if isinstance(kind, list) else kind
        return getattr(self, f"value_of_{kind}")(schema)

    def value_of_null(self, schema):
        return None

    def value_of_boolean(self, schema):
        return self.r.random() < 0.5

    def value_of_string(self, schema):
        if "pattern" in schema:
            return PATTERNS[schema["pattern"]](self.r)
        if "format" in schema:
            return FORMATS[schema["format"]]
        least = schema.get("minLength", 0)
        return text(self.r, LETTERS, least, schema.get("maxLength", least + 8))

    def value_of_integer(self, schema):
        step = schema.get("multipleOf", 1)
        least = schema.get("minimum", schema.get("exclusiveMinimum", -9999.5) + 0.5)
        most = schema.get("maximum", schema.get("exclusiveMaximum", 10000) - 1)
        least, most = (least, most) if least <= most else sorted((least, most + 20000))
        if "maximum" in schema and "minimum" not in schema:
            least = min(least, schema["maximum"])
        if "minimum" in schema and "maximum" not in schema:
            most = max(most, schema["minimum"])
        return self.r.randint(int(-(-least // step)), int(most // step)) * step

    def value_of_number(self, schema):
        bounded = {"minimum", "exclusiveMinimum"} & schema.keys()
        if not bounded:
            choices = [0, -1, 2.5, 1e20, -1e-07, 123456789.125, self.r.random()]
            return self.r.choice(choices)
        least = schema[next(iter(bounded))]
        most = schema.get("maximum", schema.get("exclusiveMaximum", least + 1))
        return least + (most - least) * self.r.randint(1, 3) / 4

    def value_of_array(self, schema):
        first = schema.get("prefixItems", [])
        rest = schema["items"]
        least = schema.get("minItems", 0)
        most = schema.get("maxItems", max(least, len(first) + 2 * (rest is not False)))
        count = self.r.randint(least, most)
        kinds = [first[i] if i < len(first) else rest for i in range(count)]
        return [self.value(kind) for kind in kinds]

    def value_of_object(self, schema):
        properties, needed = schema.get("properties", {}), schema.get("required", [])
        least, most = schema.get("minProperties", 0), schema.get("maxProperties", 99)
        optional = [name for name in properties if name not in needed]
        num_kept = self.r.randint(
            max(least - len(needed), 0) if properties else 0,
            max(min(len(optional), most - len(needed)), 0),
        )
        names = [*needed, *self.r.sample(optional, num_kept)]
        found = {name: self.value(properties[name]) for name in names}
        other = schema.get("additionalProperties", False)
        while other is not False and len(found) < most:
            if len(found) >= least and self.r.random() < 0.6:
                break
            found[f"{text(self.r, 'abcé_-', 1, 3)}{len(found)}"] = self.value(other)
        return found
