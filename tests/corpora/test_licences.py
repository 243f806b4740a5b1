"""Licences as corpora write them, compared with what a config allows."""

import pytest

from whisper_aut.corpora.licences import allows, licence_id


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("CC BY 4.0", "CC-BY-4.0"),
        ("CC-BY-SA-4.0", "CC-BY-SA-4.0"),
        ("http://creativecommons.org/licenses/by/3.0/", "CC-BY-3.0"),
        ("http://creativecommons.org/licenses/by-nc/3.0/", "CC-BY-NC-3.0"),
        ("https://creativecommons.org/licenses/by-nc-nd/4.0/", "CC-BY-NC-ND-4.0"),
        ("Attribution-NonCommercial-ShareAlike 3.0 International", "CC-BY-NC-SA-3.0"),
        ("Attribution Noncommercial", "CC-BY-NC"),
        ("http://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("CC0", "CC0-1.0"),
        ("mit", "MIT"),
        (
            "http://creativecommons.org/licenses/sampling+/1.0/",
            "http://creativecommons.org/licenses/sampling+/1.0/",
        ),
        ("for research only", "for research only"),
        ("", ""),
    ],
)
def test_one_id_for_many_writings(written: str, expected: str):
    assert licence_id(written) == expected


def test_what_is_allowed():
    assert allows([], "")
    assert allows(["CC-BY"], "CC BY 3.0")
    assert allows(["CC-BY-4.0"], "https://creativecommons.org/licenses/by/4.0/")
    assert not allows(["CC-BY-4.0"], "CC BY 3.0")
    assert not allows(["CC-BY"], "CC BY-NC 4.0")
    assert not allows(["CC-BY", "MIT"], "")
