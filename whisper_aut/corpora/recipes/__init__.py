"""Recipes of corpora: NAME.yaml describes corpora, and NAME.py has a function for each of them."""

from importlib import import_module
from pathlib import Path

from whisper_aut.corpora.recipes.base import Recipe, read_recipes
from whisper_aut.data.annotation import DOMAINS
from whisper_aut.errors import UserError, nearest


def load_recipes() -> dict[str, Recipe]:
    """Return the recipes of this folder by name, sorted by domain and name."""
    tables = [table for folder in __path__ for table in sorted(Path(folder).glob("*.yaml"))]
    modules = [import_module(f"{__name__}.{table.stem}") for table in tables]
    recipes = [recipe for module in modules for recipe in read_recipes(module).values()]
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
