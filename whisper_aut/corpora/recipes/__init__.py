"""Registry of the recipes of public corpora.

To add a corpus, write a `Recipe` and list it here.
"""

from whisper_aut.corpora.recipes import captions, folder, music, sound, speech, x_ares
from whisper_aut.corpora.recipes.base import Recipe
from whisper_aut.errors import UserError, nearest

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        speech.LIBRISPEECH,
        speech.SPEECH_COMMANDS_V1,
        speech.SPEECH_COMMANDS_V2,
        speech.CREMA_D,
        speech.RAVDESS,
        speech.VOXLINGUA,
        sound.ESC50,
        sound.FSD50K,
        sound.URBANSOUND8K,
        speech.VOCALSOUND,
        captions.AUDIOCAPS,
        captions.CLOTHO,
        captions.WAVCAPS,
        music.GTZAN,
        music.NSYNTH,
        music.FMA_SMALL,
        captions.MUSICCAPS,
        captions.MUSICBENCH,
        folder.RECIPE,
        x_ares.RECIPE,
    )
}


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UserError: there is no recipe of that name.
    """
    if name not in RECIPES:
        raise UserError(
            f"There is no recipe {name!r}.{nearest(name, RECIPES)} List them: whisper-aut data list"
        )
    return RECIPES[name]
