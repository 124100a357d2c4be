"""Splits of a data set by the names of their files, the same for text and images."""

import re

VALIDATION_ONE_IN = 50

# "training", "valid-00001" and "test_set" are splits; "value", "devices" and "testament" are words.
SPLIT_NAME = re.compile(
    r"(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|dev(?:elopment)?)|(?P<test>test(?:ing)?)", re.I
)
SPLIT_NAME_END = re.compile(r"(?:[ _-]?(?:set|data|split))?(?![a-z])", re.I)


def named_split(name: str) -> str | None:
    match = SPLIT_NAME.match(name)
    if match is None or not SPLIT_NAME_END.match(name, match.end()):
        return None
    return match.lastgroup
