"""`the sound of a {category:words}` + a row → text.

In: a template over the columns of a table, and rows. Out: one text per row. Next: `corpora.manifest` makes it a clip's text or
label. `{column}` is the cell as it stands, `{column:words}` the cell with its underscores written as spaces.
"""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any


def plain(value: Any) -> str:
    """Write a cell as text: nothing for null, a list with commas."""
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    return "" if value is None else str(value)


def text_template(value: str) -> "Template":
    """Return a template, or the name of one column as a template."""
    return Template(value if "{" in value else f"{{{value}}}")


class Template(Formatter):
    """`str.format` over a row, with column names for fields: no attributes, no indices, and one format, `words`.

    Attributes:
        columns: the columns that it needs.
        fault: why the template cannot be used; empty where it can.
    """

    def __init__(self, template: str):
        self.template, self.columns, self.fault = template, [], ""
        try:
            for _, column, spec, conversion in self.parse(template):
                if column is None:
                    continue
                self.columns.append(column)
                if not column or spec not in ("", "words") or conversion:
                    self.fault = f"the field of {column!r} is not understood"
        except ValueError as error:
            self.fault = str(error)

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text; empty where a column that it needs is."""
        if not all(plain(row.get(column)).strip() for column in self.columns):
            return ""
        return self.vformat(self.template, (), row)

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        text = plain(value).strip()
        return " ".join(text.replace("_", " ").split()) if format_spec == "words" else text
