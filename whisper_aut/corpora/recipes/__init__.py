"""Public corpora, a recipe each, and the registry that names them.

In: a name. Out: its `Recipe`. Next: `corpora.recipes.build`. A new corpus is one `Recipe` and one line here.
"""

from whisper_aut.corpora.recipes import (
    captions,
    esc50,
    folder,
    freesound,
    gtzan,
    librispeech,
    music,
    speech_commands,
    voices,
    x_ares,
)
from whisper_aut.corpora.recipes.recipe import Recipe
from whisper_aut.errors import UserError, nearest

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        librispeech.RECIPE,
        speech_commands.V1,
        speech_commands.V2,
        voices.CREMA_D,
        voices.RAVDESS,
        voices.VOXLINGUA,
        esc50.RECIPE,
        freesound.FSD50K,
        freesound.URBANSOUND8K,
        voices.VOCALSOUND,
        captions.AUDIOCAPS,
        captions.CLOTHO,
        captions.WAVCAPS,
        gtzan.RECIPE,
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
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(
            f"There is no recipe {name!r}.{nearest(name, RECIPES)} List them: whisper-aut data list"
        )
    return RECIPES[name]
