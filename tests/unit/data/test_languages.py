"""Language tags: every way of writing a language that corpora use leads to Whisper's code, and
nothing else does.
"""

import pytest
from iso639 import Language
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from whisper_aut.data.annotation import language_name, whisper_codes

JAVANESE = {"jw": "jv"}  # Whisper's code is one that ISO 639 withdrew


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_language_of_whisper_is_known_by_all_its_iso_codes_and_names(code: str):
    language = Language.match(JAVANESE.get(code, code))
    codes = [code, language.part1, language.part2b, language.part2t, language.part3]
    names = [LANGUAGES[code], language.name]
    names += [name for name, known in TO_LANGUAGE_CODE.items() if known == code]
    for tag in [*filter(None, codes), *names]:
        for written in (tag, tag.upper(), f" {tag} "):
            assert whisper_codes(written)[:1] == (code,), written
    assert language_name(code) == LANGUAGES[code].title()


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        *[("deu", "de"), ("ger", "de"), ("fra", "fr"), ("fre", "fr"), ("zho", "zh"), ("chi", "zh")],
        *[("cmn", "zh"), ("jv", "jw"), ("nb", "no"), ("nob", "no"), ("nn", "nn"), ("fil", "tl")],
        *[("arb", "ar"), ("arz", "ar"), ("pes", "fa"), ("ekk", "et"), ("lvs", "lv"), ("zsm", "ms")],
        *[("iw", "he"), ("in", "id"), ("ji", "yi"), ("mo", "ro"), ("mol", "ro"), ("scc", "sr")],
        *[
            ("fr-FR", "fr"),
            ("pt_BR", "pt"),
            ("zh-Hant-TW", "zh"),
            ("zh_CN", "zh"),
            ("es-419", "es"),
        ],
        *[("deu_Latn", "de"), ("sr-Latn-RS", "sr"), ("sr@latin", "sr"), ("de_DE.UTF-8", "de")],
        *[("eng-USA", "en"), ("en-GB-oxendict", "en"), ("en-US-u-ca-gregory", "en")],
        *[("zh-yue", "yue"), ("zh-cmn-Hans-CN", "zh"), ("Cantonese", "yue"), ("Mandarin", "zh")],
        *[("Norwegian Bokmål", "no"), ("Chinese, Mandarin", "zh"), ("Farsi", "fa")],
        *[("Portuguese (Brazil)", "pt"), ("Modern Greek (1453-)", "el"), ("Flemish", "nl")],
    ],
)
def test_a_tag_leads_to_whispers_code(tag: str, code: str):
    assert whisper_codes(tag)[0] == code


@pytest.mark.parametrize(
    "tag",
    [
        *["", "und", "mul", "zxx", "tlh", "Klingon", "xq", "translate", "transcribe", "nospeech"],
        *["no_speech", "no-speech", "en accent", "<|de|>", "0", "sh", "Toki Pona", "deu/fra"],
    ],
)
def test_what_is_no_language_of_whispers_has_no_code(tag: str):
    assert whisper_codes(tag) == ()


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        *[("et", "Estonian"), ("deu", "German"), ("he", "Hebrew"), ("iw", "Hebrew")],
        *[("yue", "Cantonese"), ("ab", "Abkhazian"), ("ceb", "Cebuano"), ("eo", "Esperanto")],
        *[("gn", "Guarani"), ("gv", "Manx"), ("ia", "Interlingua"), ("sco", "Scots")],
        *[("war", "Waray"), ("Klingon", "Klingon"), ("und", ""), ("", ""), ("no_speech", "")],
    ],
)
def test_languages_have_english_names_whether_whisper_knows_them_or_not(tag: str, name: str):
    assert language_name(tag) == name
