"""Licences as corpora write them: what is understood, and that everything else is allowed by
nothing.
"""

import pytest

from tests.support import REPOSITORY
from whisper_aut.config import load_settings
from whisper_aut.corpora.recipes import RECIPES
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.filters import licence_allowed, licence_id
from whisper_aut.errors import UserError

UNDERSTOOD = {
    "CC-BY-4.0": "CC-BY-4.0",
    "cc-by-sa-3.0": "CC-BY-SA-3.0",
    "CC BY 4.0": "CC-BY-4.0",
    "CC BY-NC-SA 4.0": "CC-BY-NC-SA-4.0",
    "CC-BY-NC 4.0": "CC-BY-NC-4.0",
    "CC BY‑NC‑ND 4.0": "CC-BY-NC-ND-4.0",  # with hyphens that do not break
    "cc_by_4.0": "CC-BY-4.0",
    "CC-BY": "CC-BY",
    "CC BY-SA 3.0 US": "CC-BY-SA-3.0",
    "http://creativecommons.org/licenses/by/3.0/": "CC-BY-3.0",
    "http://creativecommons.org/licenses/by-nc/3.0/": "CC-BY-NC-3.0",
    "https://creativecommons.org/licenses/by-nc-nd/4.0/deed.en": "CC-BY-NC-ND-4.0",
    "https://creativecommons.org/licenses/by-sa/4.0/legalcode": "CC-BY-SA-4.0",
    "http://www.creativecommons.org/licenses/by-nc-sa/2.5/ca/": "CC-BY-NC-SA-2.5",
    "creativecommons.org/licenses/by/4.0": "CC-BY-4.0",
    "Attribution": "CC-BY",
    "Attribution Noncommercial": "CC-BY-NC",
    "Attribution 4.0 International": "CC-BY-4.0",
    "Attribution Non Commercial 4.0": "CC-BY-NC-4.0",
    "Attribution-NonCommercial-ShareAlike 4.0 International": "CC-BY-NC-SA-4.0",
    "Attribution-Share Alike 3.0 United States": "CC-BY-SA-3.0",
    "Attribution-Noncommercial-Share Alike 3.0 United States": "CC-BY-NC-SA-3.0",
    "Attribution-Noncommercial-No Derivative Works 3.0 Germany": "CC-BY-NC-ND-3.0",
    "Attribution-NonCommercial-NoDerivatives (aka Music Sharing) 3.0 "
    "International": "CC-BY-NC-ND-3.0",
    "Attribution-NoDerivs 3.0 Unported": "CC-BY-ND-3.0",
    "Creative Commons Attribution 4.0 International (CC BY 4.0)": "CC-BY-4.0",
    "Creative Commons Attribution 4.0 International Public License": "CC-BY-4.0",
    "Creative Commons Attribution-NonCommercial 4.0 International License "
    "(CC BY-NC 4.0)": "CC-BY-NC-4.0",
    "CC0": "CC0-1.0",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
    "Creative Commons 0": "CC0-1.0",
    "http://creativecommons.org/publicdomain/zero/1.0/": "CC0-1.0",
    "https://creativecommons.org/publicdomain/mark/1.0/": "CC-PDM-1.0",
    "mit": "MIT",
    "The MIT License (MIT)": "MIT",
    "Apache License, Version 2.0": "Apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0.txt": "Apache-2.0",
    "Open Database License 1.0": "ODbL-1.0",
    "Open Data Commons Open Database License (ODbL) v1.0": "ODbL-1.0",
    "Free Art License 1.3": "LAL-1.3",
    "LicenseRef-our-recordings": "LicenseRef-our-recordings",
}
UNKNOWN = (
    "",
    "unknown",
    "other",
    "none stated",
    "All rights reserved by the BBC",
    "used by permission",
    "Copyright 2019, all rights reserved",
    "for research only",
    "academic use only",
    "Attribution required, no resale",
    "Public Domain",
    "Creative Commons",
    "CC",
    "CC BY 5.0",
    "CC BY 4.0 NC",
    "CC BY 4.0 non-commercial",
    "CC BY-SA-ND 4.0",
    "CC BY-NC 4.0 (CC BY 4.0)",
    "CC BY 4.0; see the record",
    "CC BY 4.0, clips per clip",
    "CC BY 4.0 and CC BY-NC 4.0",
    "CC0 and CC BY 3.0, per clip",
    "not CC BY 4.0",
    "MIT AND CC-BY-NC-4.0",
    "http://creativecommons.org/licenses/sampling+/1.0/",
    "Sampling Plus 1.0",
    "https://creativecommons.org/licenses/by/4.0/nc",
    "https://creativecommons.org/licenses/by/4.0/ except vocals",
    "https://creativecommons.org.example.com/licenses/by/4.0/",
    "https://example.com/creativecommons.org/licenses/by/4.0/",
    "FMA-Limited: Download Only",
    "Youtube standard licence",
)
# What each recipe states of all its clips; "" where that is no licence, or differs by clip.
OF_RECIPES = {
    "librispeech": "CC-BY-4.0",
    "speech_commands_v1": "CC-BY-4.0",
    "speech_commands_v2_35": "CC-BY-4.0",
    "crema_d": "ODbL-1.0",
    "ravdess": "CC-BY-NC-SA-4.0",
    "voxlingua": "",
    "esc50": "CC-BY-NC-3.0",
    "fsd50k": "",
    "urbansound8k": "CC-BY-NC-3.0",
    "vocalsound": "CC-BY-SA-4.0",
    "audiocaps": "",
    "clotho": "",
    "wavcaps": "",
    "gtzan_filtered": "",
    "nsynth": "CC-BY-4.0",
    "fma_small": "",
    "musiccaps": "",
    "musicbench": "",
    "folder": "",
    "x-ares": "",
}


@pytest.mark.parametrize("written", UNDERSTOOD)
def test_known_writings_have_one_id(written: str):
    assert licence_id(written) == UNDERSTOOD[written]
    assert licence_allowed([UNDERSTOOD[written]], written)


@pytest.mark.parametrize("written", UNKNOWN)
def test_anything_else_is_unknown_and_no_list_allows_it(written: str):
    assert licence_id(written) == ""
    assert not licence_allowed([*filter(None, UNDERSTOOD.values())], written)
    assert licence_allowed([], written)


def test_an_id_without_a_version_allows_every_version_of_those_very_terms():
    assert licence_allowed(["CC-BY"], "CC BY 3.0")
    assert licence_allowed(["CC-BY"], "Attribution")
    assert not licence_allowed(["CC-BY-4.0"], "CC BY 3.0")
    assert not licence_allowed(["CC-BY-4.0"], "CC BY")
    assert not licence_allowed(["CC-BY"], "CC BY-NC 4.0")


def test_a_recipe_states_a_licence_only_where_it_is_that_of_every_clip():
    assert {name: licence_id(recipe.licence) for name, recipe in RECIPES.items()} == OF_RECIPES


def test_an_allow_list_with_a_word_that_is_no_licence_is_an_error_of_the_config():
    with pytest.raises(UserError, match=r"data\.licences\.allow\.1: 'CC-BY-free' is not a known"):
        load_settings(REPOSITORY / "conf" / "smoke.yaml", ["data.licences.allow=[MIT, CC-BY-free]"])


def test_the_other_spelling_of_licence_in_foreign_tars_is_read():
    foreign = Annotation.from_mapping({"text": "a", "license": "All rights reserved"})
    assert foreign.licence == "All rights reserved"
    assert b"license" not in foreign.to_json()
    ours = Annotation.from_mapping({"text": "a", "licence": "MIT", "license": "GPL"})
    assert ours.licence == "MIT"
    listed = Annotation.from_mapping({"text": "a", "license": ["CC-BY-4.0", "CC-BY-NC-4.0"]})
    assert not licence_allowed(["CC-BY-4.0"], listed.licence)
