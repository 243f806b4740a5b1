"""Recipes of public corpora. Each module of this folder lists its own in `RECIPES`."""

from importlib import import_module
from pkgutil import iter_modules

from whisper_aut.corpora.recipes.base import Recipe
from whisper_aut.data.annotation import DOMAINS
from whisper_aut.errors import UserError, nearest


def load_recipes() -> dict[str, Recipe]:
    """Return the recipes of all modules by name, sorted by domain and name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    recipes = [recipe for module in modules for recipe in getattr(module, "RECIPES", ())]
    order = (*DOMAINS, "")
    recipes.sort(key=lambda recipe: (order.index(recipe.domain), recipe.name))
    return {recipe.name: recipe for recipe in recipes}


RECIPES = load_recipes()


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
